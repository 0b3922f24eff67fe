"""Made-up rows of teacher scores that resemble a large model's, from a seed.

Three kinds of positions, as in a model's own text: most are almost certain, some are a choice
between a few ids, and some are open with a long tail. The log-probs of a row are those of ranked
draws from a Pareto distribution; ids are drawn from lists that belong to a context and from the
whole vocabulary, both with Zipf's frequencies. Each table states the rows' mean entropy, their
share with one sure id, and the mass of the best 16, 64 and 256.

Shapes: P rows, W entries of a row, V the vocabulary.
"""

from dataclasses import dataclass, replace

import numpy as np

from logitcask.engine.types import Array, Prompt, Rollouts, Scores

V, W = 151_936, 256
CONTEXTS, LISTED = 2048, 1024
"""Number of contexts, and length of the list of ids of each."""
SURE, FEW, OPEN = 0.65, 0.20, 0.15
PROMPT_TOKENS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class WideRows:
    """A teacher's best W entries on P rows, more than any request keeps."""

    ids: Array
    """[P, W] uint32, best first."""
    lp: Array
    """[P, W] float32."""
    log_tail: Array
    """[P] float32, log of the mass outside the W."""
    entropy: Array
    """[P] float32, nats."""
    lengths: Array
    """[N] rows of each sequence."""

    def summary(self) -> dict[str, float]:
        """Return entropy, share of sure rows and mass of the best ids."""
        p = np.exp(self.lp, dtype=np.float64)
        mass = p.cumsum(1)
        return {
            "entropy_nats": float(self.entropy.mean()),
            "sure_share": float((p[:, 0] > 0.95).mean()),
            **{f"mass_{k}": float(mass[:, k - 1].mean()) for k in (16, 64, 256)},
        }


def synthetic(positions: int, seed: int = 0) -> WideRows:
    """Return made-up rows."""
    rng = np.random.default_rng(seed)
    lp, log_tail, entropy = _log_probs(positions, rng)
    return WideRows(
        ids=_ids(positions, rng),
        lp=lp,
        log_tail=log_tail,
        entropy=entropy,
        lengths=_lengths(positions, rng),
    )


def _log_probs(positions: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Return log-probs [P, W], log tail [P] and entropy [P]."""
    kind = rng.choice(3, positions, p=[SURE, FEW, OPEN])
    low, high = np.asarray([[1.3, 2.2], [1.3, 2.1], [1.15, 1.9]])[kind].T
    power = rng.uniform(low, high)
    # The j-th best of many Pareto draws: -power x log of a sum of j exponentials.
    z = -power[:, None] * np.log(np.cumsum(rng.exponential(1.0, (positions, W)), 1))
    z -= z[:, :1]
    lead = np.select(
        [kind == 0, kind == 1],
        [rng.gamma(4.0, 1.6, positions) + 3.2, rng.uniform(1.0, 5.0, positions)],
        rng.exponential(0.5, positions),
    )
    z[:, 1:] -= lead[:, None]
    near = (kind == 1)[:, None] & (np.arange(W) < rng.integers(2, 5, positions)[:, None])
    z = -np.sort(-np.where(near, z / 4, z), 1)
    # Beyond W the same power holds to the end of the vocabulary.
    beyond = (W / (power - 1)) * (1 - (V / W) ** (1 - power))
    tail = np.exp(z[:, -1]) * beyond
    total = np.exp(z).sum(1) + tail
    lp = z - np.log(total)[:, None]
    p, q = np.exp(lp), tail / total
    entropy = -(p * lp).sum(1) - q * (np.log(q) - np.log(V)) / 2
    return lp.astype(np.float32), np.log(q).astype(np.float32), entropy.astype(np.float32)


def _ids(positions: int, rng: np.random.Generator) -> Array:
    """Return ids [P, W] uint32, distinct in a row."""
    rank = np.argsort(np.argsort(np.log(np.arange(V) + 1.0) + rng.normal(0, 0.8, V)))
    log_weight = -1.05 * np.log(rank + 10.0)
    lists = np.stack(
        [
            np.argsort(-(0.85 * log_weight + rng.gumbel(0, 1.3, V)).astype(np.float32))[:LISTED]
            for _ in range(CONTEXTS)
        ]
    ).astype(np.uint32)
    cumulative = np.cumsum(np.exp(log_weight))
    context = (CONTEXTS * rng.random(positions) ** 2.2).astype(int)
    ids = np.empty((positions, W), np.uint32)
    prior = -1.1 * np.log(np.arange(LISTED) + 1.0)
    for first in range(0, positions, 16_384):
        part = slice(first, min(first + 16_384, positions))
        rows = part.stop - part.start
        order = np.argsort(-(prior + rng.gumbel(0, 1.0, (rows, LISTED))).astype(np.float32), 1)
        drawn = np.take_along_axis(lists[context[part]], order[:, : 2 * W], 1)
        anywhere = np.searchsorted(cumulative, rng.random((rows, 2 * W)) * cumulative[-1])
        drawn = np.where(rng.random(drawn.shape) < 0.15, anywhere.astype(np.uint32), drawn)
        ids[part] = _first_distinct(drawn)
    return ids


def _first_distinct(drawn: Array) -> Array:
    """Return the first W different ids [n, W] of every row of [n, 2 W]."""
    order = np.argsort(drawn, 1, kind="stable")
    ascending = np.take_along_axis(drawn, order, 1)
    is_repeat = np.zeros(drawn.shape, bool)
    is_repeat[:, 1:] = ascending[:, 1:] == ascending[:, :-1]
    repeated = np.zeros(drawn.shape, bool)
    np.put_along_axis(repeated, order, is_repeat, 1)
    first = np.argsort(repeated, 1, kind="stable")[:, :W]
    assert not np.take_along_axis(repeated, first, 1).any(), "half of the draws are enough"
    distinct: Array = np.take_along_axis(drawn, first, 1)
    return distinct


def _lengths(positions: int, rng: np.random.Generator) -> Array:
    """Return log-normal lengths [N] with the sum `positions`."""
    drawn = np.clip(rng.lognormal(6.4, 0.9, 1 + positions // 100).astype(int), 16, 8192)
    ends = drawn.cumsum()
    lengths = drawn[: np.searchsorted(ends, positions)]
    left = positions - lengths.sum()
    found: Array = np.append(lengths, left) if left else lengths
    return found


# Input of a store.


def kept_mask(rows: WideRows, top_p: float, k_min: int, k_max: int) -> Array:
    """Return [P, W] bool: the entries that a request keeps."""
    mass = np.exp(rows.lp[:, :k_max], dtype=np.float64).cumsum(1)
    cnt = np.clip((mass < top_p).sum(1) + 1, k_min, k_max)
    mask: Array = np.arange(W) < cnt[:, None]
    return mask


def student_of(rows: WideRows, noise: float, k: int = 16, seed: int = 1) -> tuple[Array, Array]:
    """Return order [P, k] and log-probs [P, W] of a student: the teacher with Gaussian noise."""
    rng = np.random.default_rng(seed)
    lp = rows.lp + rng.normal(0, noise, rows.lp.shape).astype(np.float32)
    tail = rows.log_tail + rng.normal(0, noise / 2, len(rows.lp)).astype(np.float32)
    total = np.logaddexp(np.logaddexp.reduce(lp, axis=1), tail)
    lp = (lp - total[:, None]).astype(np.float32)
    return np.argsort(-lp, 1, kind="stable")[:, :k], lp


def scores_of(rows: WideRows, mask: Array, listed: Array | None = None, seed: int = 2) -> Scores:
    """Return a scorer's result: entries in `mask`, and at columns `listed` [P, k] of the rows."""
    p = len(rows.lp)
    outside = ~mask
    if listed is not None:
        np.put_along_axis(outside, listed, False, 1)
    left = np.logaddexp.reduce(np.where(outside, rows.lp, -np.inf), axis=1)
    tail = np.logaddexp(left, rows.log_tail).astype(np.float32)
    at_lp = None if listed is None else np.take_along_axis(rows.lp, listed, 1).reshape(-1)
    return Scores(
        lp=rows.lp[np.arange(p), _sampled(rows, seed)],
        entropy=rows.entropy,
        log_tail=tail,
        cnt=mask.sum(1).astype(np.uint16),
        ids=rows.ids[mask],
        entry_lp=rows.lp[mask],
        at_lp=at_lp,
    )


def rollouts_of(
    rows: WideRows, student: tuple[Array, Array] | None = None, seed: int = 2
) -> Rollouts:
    """Return sequences with tokens drawn from the rows, and the student's own scores."""
    p, n = len(rows.lp), len(rows.lengths)
    rng = np.random.default_rng(seed + 1)
    at = _sampled(rows, seed)
    own = None
    # A factor, not a term: it stays a log-prob where the row is all but certain.
    b_lp = rows.lp[np.arange(p), at] * np.exp(rng.normal(0, 0.1, p)).astype(np.float32)
    if student is not None:
        order, lp = student
        every = np.ones(rows.lp.shape, bool)
        np.put_along_axis(every, order, False, 1)
        own = Scores(
            lp=lp[np.arange(p), at],
            entropy=(rows.entropy * rng.uniform(0.9, 1.1, p)).astype(np.float32),
            log_tail=np.logaddexp.reduce(np.where(every, lp, -np.inf), axis=1).astype(np.float32),
            cnt=np.full(p, order.shape[1], np.uint16),
            ids=np.take_along_axis(rows.ids, order, 1).reshape(-1),
            entry_lp=np.take_along_axis(lp, order, 1).reshape(-1),
        )
        # Sampled and scored by the same weights: they differ by the rounding of two passes.
        b_lp = (own.lp * (1 + rng.normal(0, 1e-6, p))).astype(np.float32)
    seq_off = np.concatenate([[0], rows.lengths.cumsum()]).astype(np.int64)
    return Rollouts(
        prompts=tuple(
            Prompt(id=f"p{i}", token_ids=tuple(rng.integers(0, V, PROMPT_TOKENS).tolist()))
            for i in range(n)
        ),
        seq_prompt=np.arange(n, dtype=np.uint32),
        seq_off=seq_off,
        tokens=rows.ids[np.arange(p), at],
        loss_mask=np.ones(p, np.uint16),
        b_lp=b_lp,
        finish=np.zeros(n, np.uint16),
        version_start=np.zeros(n, np.int64),
        version_end=np.zeros(n, np.int64),
        student=own,
    )


def first(rows: WideRows, positions: int) -> WideRows:
    """Return the first sequences with at most so many positions."""
    ends = rows.lengths.cumsum()
    n = int(np.searchsorted(ends, positions, side="right"))
    p = int(ends[n - 1])
    return replace(
        rows,
        **{name: getattr(rows, name)[:p] for name in ("ids", "lp", "log_tail", "entropy")},
        lengths=rows.lengths[:n],
    )


def _sampled(rows: WideRows, seed: int) -> Array:
    """Return [P] the column of the sampled token."""
    mass = np.exp(rows.lp, dtype=np.float64).cumsum(1)
    u = np.random.default_rng(seed).random(len(mass)) * mass[:, -1]
    at: Array = np.minimum((mass < u[:, None]).sum(1), W - 1)
    return at
