"""Fingerprint of a model by its log-probs on a fixed probe, and log-prob differences of scorings.

The weights of a remote model cannot be hashed. Its identity is its fingerprint, compared with the
one that was stored when its scores were begun. Engines are not reproducible bit by bit (another
batch size changes the order of a sum), so the tolerance is measured: the engine scores the same
rows twice, in another order and in other batches.
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
"""The probe has only ids below this, which every vocabulary has."""
PROBE_K = 4
"""Top-k of a probe row: small enough to store with every segment."""


def probe_rollouts(n_vocab: int, sequences: int = 1, rows: int = PROBE_ROWS) -> Rollouts:
    """Build deterministic sequences of one prompt token and `rows` response tokens.

    They need no tokenizer. The first sequence is the probe of the fingerprint.
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
    """Return a request for up to k best ids a row; ids of a padded head reduce their number."""
    return ScoreParams(top_p=1.0, k_min=1, k_max=min(k, n_vocab), at_student=False)


def fingerprint(scorer: Scorer, n_vocab: int) -> ModelFingerprint:
    """Score the probe, one short sequence, and return the fingerprint."""
    scores = scorer.score(probe_rollouts(n_vocab), probe_request(n_vocab))
    ids, valid = ragged.matrix(scores.ids, scores.cnt, 0)
    lp, _ = ragged.matrix(scores.entry_lp, scores.cnt, -np.inf)
    last = np.where(valid, lp, np.inf).min(1, keepdims=True)
    return ModelFingerprint(
        ids=np.where(valid, ids.astype(np.int64), -1), lp=np.where(valid, lp, last)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobDiff:
    """Log-prob differences of two scorings of the same rows, at shared ids above MIN_PROB."""

    largest: float
    """Nats."""
    mean: float
    compared: int
    """Number of log-probs."""
    same_best: float
    """Share of rows with the same best id."""


def compare_scores(a: Scores, b: Scores) -> LogprobDiff:
    """Compare two scorings of the same rollouts; their entries are top-k ids."""
    place = ragged.find(b.ids.astype(np.uint32), b.cnt, a.ids.astype(np.uint32), a.cnt)
    shared = place >= 0
    in_b = (np.repeat(ragged.starts(b.cnt)[:-1], a.cnt.astype(np.int64)) + place)[shared]
    likely = a.entry_lp[shared] > np.log(MIN_PROB)
    gap = np.abs(a.entry_lp[shared].astype(np.float64) - b.entry_lp[in_b])[likely]
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


def self_consistency(scorer: Scorer, rollouts: Rollouts, request: ScoreParams) -> LogprobDiff:
    """Compare a scorer with itself: all sequences at once, then reversed and in two batches."""
    count = len(rollouts.finish)
    once = scorer.score(rollouts, request)
    halves = [each for each in np.array_split(np.arange(count)[::-1], 2) if len(each)]
    again = [scorer.score(select_sequences(rollouts, half), request) for half in halves]
    order = np.concatenate(halves)
    restored = select_scores(concat_scores(again), rollouts.lengths()[order], np.argsort(order))
    return compare_scores(once, restored)


def take_rows(rollouts: Rollouts, rows: int) -> Rollouts:
    """Return the first sequences with at most `rows` rows together, but at least one sequence."""
    lengths = rollouts.lengths()
    return select_sequences(rollouts, np.arange(max(1, int((np.cumsum(lengths) <= rows).sum()))))


def tolerance(spread: float) -> float:
    """Return the nats that two scorings of one model may differ by.

    spread: the largest difference of the engine from itself. Raises IdentityError for a spread
    that could hide another model.
    """
    allowed = max(MIN_TOLERANCE, SPREAD_FACTOR * spread)
    if allowed > SPREAD_FACTOR * MAX_SPREAD:
        raise IdentityError(
            f"the engine differs from itself by {spread:.3g} nats when it scores the same rows in "
            f"another order, and above {MAX_SPREAD} another model cannot be detected",
            hint="serve it in float32 or bfloat16, without a quantised cache, or with "
            "batch-invariant kernels (VLLM_BATCH_INVARIANT=1)",
        )
    return allowed


def select_sequences(rollouts: Rollouts, sequences: Sequence[int] | Array) -> Rollouts:
    """Return these sequences in this order, without the student's scores."""
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


def concat_scores(parts: Sequence[Scores]) -> Scores:
    """Concatenate scores of consecutive parts of some rollouts."""
    return Scores(
        **{
            name: np.concatenate([getattr(each, name) for each in parts])
            for name in ("lp", "entropy", "log_tail", "cnt", "ids", "entry_lp")
        }
    )


def select_scores(scores: Scores, lengths: Array, sequences: Sequence[int] | Array) -> Scores:
    """Return the scores of these sequences in this order; lengths: [N] rows of each sequence."""
    start = ragged.starts(lengths)
    rows = np.concatenate(
        [np.zeros(0, np.int64), *(np.arange(start[i], start[i + 1]) for i in sequences)]
    )
    cnt = scores.cnt.astype(np.int64)
    entries = np.repeat(ragged.starts(cnt)[:-1][rows], cnt[rows]) + ragged.index_in_row(cnt[rows])
    return Scores(
        lp=scores.lp[rows],
        entropy=scores.entropy[rows],
        log_tail=scores.log_tail[rows],
        cnt=scores.cnt[rows],
        ids=scores.ids[entries],
        entry_lp=scores.entry_lp[entries],
    )
