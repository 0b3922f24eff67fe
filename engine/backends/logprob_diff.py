"""Is a teacher the same one as before, or as another engine's? Asked by what it says.

A served model has no weights to digest. What identifies it is how it behaves: its log-probs on a
fixed probe, compared with those that were kept when its scores were begun. Engines do not repeat
themselves to the bit (a batch of another size adds up in another order), so the tolerance is a
control: the same rows scored twice by the same engine, in another order and in other batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from logitcask.engine.backends.base import Scorer
from logitcask.engine.errors import IdentityError
from logitcask.engine.models.fingerprint import (
    MAX_SPREAD,
    MIN_PROB,
    MIN_TOLERANCE,
    SPREAD_FACTOR,
    ModelFingerprint,
)
from logitcask.engine.store.format import ragged
from logitcask.engine.types import LENGTH, Array, Prompt, Rollouts, ScoreParams, Scores

PROBE_ROWS = 16
PROBE_IDS = 64
"""The probe is of the first ids, which every vocabulary has: what it is over may differ."""
PROBE_K = 4
"""Best ids of a row that the probe keeps: few enough for every record of a store."""


def probe_rollouts(n_vocab: int, sequences: int = 1, rows: int = PROBE_ROWS) -> Rollouts:
    """Sequences that no tokenizer is needed for, the same whenever they are asked for; the first
    is the probe. Each is a prompt of one token and a response of `rows`.
    """
    step = np.arange(1, rows + 2)
    ids = (step * 7919 + np.arange(sequences)[:, None] * 104_729) % min(n_vocab, PROBE_IDS)
    return Rollouts(
        prompts=tuple(Prompt(id=f"probe-{i}", token_ids=(int(s[0]),)) for i, s in enumerate(ids)),
        seq_prompt=np.arange(sequences, dtype=np.uint32),
        seq_off=np.arange(sequences + 1, dtype=np.int64) * rows,
        tokens=ids[:, 1:].reshape(-1).astype(np.uint32),
        loss_mask=np.ones(sequences * rows, np.uint16),
        b_lp=np.zeros(sequences * rows, np.float32),
        finish=np.full(sequences, LENGTH, np.uint16),
        version_start=np.zeros(sequences, np.int64),
        version_end=np.zeros(sequences, np.int64),
    )


def probe_request(n_vocab: int, k: int = PROBE_K) -> ScoreParams:
    """Up to k best ids: where ids of a padded head are among them, a row has fewer."""
    return ScoreParams(top_p=1.0, k_min=1, k_max=min(k, n_vocab), at_student=False)


def behaviour(scorer: Scorer, n_vocab: int) -> ModelFingerprint:
    """How a scorer behaves on the probe; one short sequence."""
    scores = scorer.score(probe_rollouts(n_vocab), probe_request(n_vocab))
    # Where ids of a padded head were among the best, a row has fewer.
    ids, valid = ragged.matrix(scores.ids, scores.cnt, 0)
    lp, _ = ragged.matrix(scores.entry_lp, scores.cnt, -np.inf)
    last = np.where(valid, lp, np.inf).min(1, keepdims=True)
    return ModelFingerprint(
        ids=np.where(valid, ids.astype(np.int64), -1), lp=np.where(valid, lp, last)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobDiff:
    """Two scorings of the same rows, at ids above LIKELY that both name."""

    largest: float
    """Nats."""
    mean: float
    compared: int
    """Log-probs."""
    same_best: float
    """Share of rows whose likeliest id is the same."""


def compare(a: Scores, b: Scores) -> LogprobDiff:
    """Scores of the same rollouts, by two engines or twice by one; entries are best ids."""
    place = ragged.find(b.ids.astype(np.uint32), b.cnt, a.ids.astype(np.uint32), a.cnt)
    there = place >= 0
    twin = (np.repeat(ragged.starts(b.cnt)[:-1], a.cnt.astype(np.int64)) + place)[there]
    likely = a.entry_lp[there] > np.log(MIN_PROB)
    gap = np.abs(a.entry_lp[there].astype(np.float64) - b.entry_lp[twin])[likely]
    sampled = a.lp > np.log(MIN_PROB)
    gap = np.concatenate([gap, np.abs(a.lp.astype(np.float64) - b.lp)[sampled]])
    first_a, first_b = ragged.starts(a.cnt)[:-1], ragged.starts(b.cnt)[:-1]
    both = (a.cnt > 0) & (b.cnt > 0)
    same = a.ids[first_a[both]] == b.ids[first_b[both]]
    return LogprobDiff(
        largest=float(gap.max(initial=0.0)),
        mean=float(gap.mean()) if len(gap) else 0.0,
        compared=len(gap),
        same_best=float(same.mean()) if len(same) else 1.0,
    )


def control(scorer: Scorer, rollouts: Rollouts, request: ScoreParams) -> LogprobDiff:
    """The scorer against itself: all sequences at once, then backwards and in two batches."""
    count = len(rollouts.finish)
    once = scorer.score(rollouts, request)
    halves = [each for each in np.array_split(np.arange(count)[::-1], 2) if len(each)]
    again = [scorer.score(part_of(rollouts, half), request) for half in halves]
    # Back in the order of the first, so that rows stand beside their own.
    order = np.concatenate(halves)
    return compare(once, scores_of(joined(again), rollouts.lengths()[order], np.argsort(order)))


def first_rows(rollouts: Rollouts, rows: int) -> Rollouts:
    """The first sequences, of at most so many rows together, but one at least."""
    lengths = rollouts.lengths()
    return part_of(rollouts, np.arange(max(1, int((np.cumsum(lengths) <= rows).sum()))))


def tolerance(spread: float) -> float:
    """Nats that two scorings of one model may differ by, where it differs from itself by `spread`.

    Raises IdentityError for an engine so unsteady that another model could hide behind it.
    """
    allowed = max(MIN_TOLERANCE, SPREAD_FACTOR * spread)
    if allowed > SPREAD_FACTOR * MAX_SPREAD:
        raise IdentityError(
            f"the engine differs from itself by {spread:.3g} nats when it scores the same rows in "
            f"another order, and {MAX_SPREAD} is the most that can be told from another model",
            hint="Serve it in float32 or bfloat16, without quantisation of the cache, or ask "
            "for batch-invariant kernels (VLLM_BATCH_INVARIANT=1).",
        )
    return allowed


def part_of(rollouts: Rollouts, sequences: Sequence[int] | Array) -> Rollouts:
    """These sequences alone, in this order, without the student's own scores of them."""
    rows = [np.arange(rollouts.seq_off[i], rollouts.seq_off[i + 1]) for i in np.asarray(sequences)]
    flat = np.concatenate([np.zeros(0, np.int64), *rows])
    index = np.asarray(sequences, np.int64)
    return replace(
        rollouts,
        seq_prompt=rollouts.seq_prompt[index],
        seq_off=ragged.starts(np.array([len(each) for each in rows], np.int64)),
        tokens=rollouts.tokens[flat],
        loss_mask=rollouts.loss_mask[flat],
        b_lp=rollouts.b_lp[flat],
        finish=rollouts.finish[index],
        version_start=rollouts.version_start[index],
        version_end=rollouts.version_end[index],
        student=None,
        draws=None,
        reward=None,
    )


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores of one part of some rollouts after another."""
    return Scores(
        **{
            name: np.concatenate([getattr(each, name) for each in parts])
            for name in ("lp", "entropy", "log_tail", "cnt", "ids", "entry_lp")
        }
    )


def scores_of(scores: Scores, lengths: Array, sequences: Sequence[int] | Array) -> Scores:
    """Scores of these sequences alone, in this order; lengths: [N] rows of all that are scored."""
    start = ragged.starts(lengths)
    rows = np.concatenate(
        [np.zeros(0, np.int64), *(np.arange(start[i], start[i + 1]) for i in sequences)]
    )
    cnt = scores.cnt.astype(np.int64)
    entries = np.repeat(ragged.starts(cnt)[:-1][rows], cnt[rows]) + ragged.within(cnt[rows])
    return Scores(
        lp=scores.lp[rows],
        entropy=scores.entropy[rows],
        log_tail=scores.log_tail[rows],
        cnt=scores.cnt[rows],
        ids=scores.ids[entries],
        entry_lp=scores.entry_lp[entries],
    )
