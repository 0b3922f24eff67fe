"""Numbers that say whether distillation works and what the cache knows of today's student.

Each is a function of [C, S] columns and the live top-k, and gives one value per row; the paper's
E_t is the mean over positions, which the trainer takes. S(p) and S(q) are the top-k of the live
student and of the teacher. A new metric is a function here and a line in METRICS.

Source: Rethinking On-Policy Distillation, arXiv 2604.13016, Eq.6-10. Its released code logs other
quantities under similar names: there the advantage has the training weights, and masses are
averaged over the rows with an overlap only.

The k of a row. A teacher that kept fewer than k ids of a row has not told us its S(q) at k. Both
top-k are then taken at what it kept, k' = min(k, kept): that is exact, where padding S(q) would
not be. With k <= k_min of the score request k' = k everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcask.engine.packing.targets import Targets
from logitcask.kernels.fused_objective import OverlapSums
from logitcask.kernels.objective_input import ObjectiveInput

METRIC_K = 16
"""The paper's k."""

LOG_RATIO_BOUND = 20.0
"""Largest |log ratio| that drift looks at: one mad row must not drown the mean (e^20 is 5e8)."""

OFF = -1e9
"""Stands for log 0 where -inf would turn an empty support into NaN."""


def renormalised(log_x: Tensor, on: Tensor) -> Tensor:
    """log_x [C, S] normalised over the ids in `on`; about OFF elsewhere, never NaN by masking."""
    return torch.where(on, log_x, OFF).log_softmax(-1)


@dataclass(frozen=True, slots=True)
class Seen:
    """C rows seen from both sides; what the metrics share."""

    view: ObjectiveInput
    rows: Targets
    """The same C rows."""
    log_q: Tensor
    """[C, S] rows.q_log_p in the dtype of the view."""
    k: Tensor
    """[C] int64, the k' of each row."""
    both: Tensor
    """[C, S] bool: I = S(p) & S(q) at k'."""
    top_cached: Tensor
    """[C, K] bool: the live top-k id is one whose teacher log-prob is stored."""

    @property
    def count(self) -> Tensor:
        """[C] int64, |I|."""
        return self.both.sum(-1)


def see(
    view: ObjectiveInput, rows: Targets, k: int = METRIC_K, *, places: Tensor | None = None
) -> Seen:
    """`rows` are the rows of `view`; `places` is rows.places(view.top_ids), if it is known. Where
    the view holds fewer than k live ids, those are used.
    """
    if places is None:
        places = rows.places(view.top_ids)
    k = min(k, view.top_ids.shape[1])
    row_k = rows.kept.clamp(1, k)
    # One more slot, for what is not in the live top-k or has no score.
    slot = torch.where(rows.cached, places, k).clamp(max=k)
    top_cached = torch.zeros_like(view.top_ids[:, :1], dtype=torch.bool).repeat(1, k + 1)
    top_cached.scatter_(1, slot, True)
    return Seen(
        view=view,
        rows=rows,
        log_q=rows.q_log_p.to(view.log_p.dtype),
        k=row_k,
        both=(places < row_k[:, None]) & (rows.q_rank < row_k[:, None]),
        top_cached=top_cached[:, :k],
    )


def overlap_ratio(seen: Seen) -> Tensor:
    """Eq.6: |S(p) & S(q)| / k."""
    return seen.count.to(seen.log_q.dtype) / seen.k


def overlap_mass_student(seen: Seen) -> Tensor:
    """Eq.9: the student's raw mass on the overlap."""
    return _mass(seen.view.log_p, seen.both)


def overlap_mass_teacher(seen: Seen) -> Tensor:
    """Eq.10: the teacher's raw mass on the overlap."""
    return _mass(seen.log_q, seen.both)


def overlap_advantage(seen: Seen) -> Tensor:
    """Eq.7: (1 / |I|) sum_I p-(v) [log q-(v) - log p-(v)], p- and q- renormalised on I; <= 0.

    It is 0 in rows with |I| <= 1, which stay in the mean as the paper's E_t has them: read it
    beside overlap/empty_share and the masses. Ids that one side excludes (-inf) are not in I.
    """
    on = seen.both & (seen.view.log_p != -torch.inf) & (seen.log_q != -torch.inf)
    log_p, log_q = renormalised(seen.view.log_p, on), renormalised(seen.log_q, on)
    terms = torch.where(on, log_p.exp() * (log_q - log_p), 0.0)
    return terms.sum(-1) / on.sum(-1).clamp(min=1)


def overlap_empty(seen: Seen) -> Tensor:
    """1 where S(p) and S(q) are disjoint; its mean is the share of rows that Eq.7 cannot judge."""
    return (seen.count == 0).to(seen.log_q.dtype)


def entropy_student(seen: Seen) -> Tensor:
    """H(p) of the live student, full vocabulary, nats."""
    return seen.view.entropy


def entropy_teacher(seen: Seen) -> Tensor:
    """H(q), full vocabulary, nats, as stored; of an interval the least."""
    return seen.rows.q_entropy.to(seen.log_q.dtype)


def entropy_gap(seen: Seen) -> Tensor:
    """Eq.8: |H(q) - H(p)|. Where H(q) is an interval, how far H(p) lies from it, 0 inside: a lower
    bound."""
    return _gap(entropy_student(seen), seen.rows)


def coverage(seen: Seen) -> Tensor:
    """The live student's mass on ids whose teacher log-prob is stored."""
    return _mass(seen.view.log_p, seen.rows.cached)


def miss_mass(seen: Seen) -> Tensor:
    """The live student's mass on ids of its top-k whose teacher log-prob is not stored."""
    top_log_p = seen.view.top_log_p[:, : seen.top_cached.shape[1]]
    return _mass(top_log_p, ~seen.top_cached)


def drift_k3(seen: Seen) -> Tensor:
    """r - 1 - log r >= 0, r = p(y) today / p(y) of the student that sampled y.

    Its mean over y of that student is KL(that student || today's), with less variance than -log r
    (J. Schulman, "Approximating KL divergence", k3). log r is clamped to +-LOG_RATIO_BOUND.
    """
    return _drift(seen.view, seen.rows)


METRICS: dict[str, Callable[[Seen], Tensor]] = {
    "overlap/ratio": overlap_ratio,
    "overlap/mass_student": overlap_mass_student,
    "overlap/mass_teacher": overlap_mass_teacher,
    "overlap/advantage": overlap_advantage,
    "overlap/empty_share": overlap_empty,
    "entropy/gap": entropy_gap,
    "entropy/student": entropy_student,
    "entropy/teacher": entropy_teacher,
    "cache/coverage": coverage,
    "cache/miss_mass": miss_mass,
    "cache/drift_k3": drift_k3,
}
"""name -> (rows) -> [C]: finite wherever the student's and the teacher's numbers are."""

TEACHER_WIDTH = "entropy/teacher_width"
"""Beside them where H(q) is an interval: the most that it can be less the least, nats."""


def row_metrics(
    view: ObjectiveInput, rows: Targets, *, k: int = METRIC_K, places: Tensor | None = None
) -> dict[str, Tensor]:
    """Every metric of C rows, name -> [C]; arguments as of `see`."""
    seen = see(view, rows, k, places=places)
    return {name: metric(seen) for name, metric in METRICS.items()} | _width(rows, view)


def summed_metrics(view: ObjectiveInput, sums: OverlapSums, rows: Targets) -> dict[str, Tensor]:
    """The same, of rows whose overlap the kernels have summed up already."""
    return {
        "overlap/ratio": sums.shared / sums.k,
        "overlap/mass_student": sums.mass_student,
        "overlap/mass_teacher": sums.mass_teacher,
        "overlap/advantage": sums.advantage,
        "overlap/empty_share": (sums.shared == 0).to(sums.k.dtype),
        "entropy/gap": _gap(view.entropy, rows),
        "entropy/student": view.entropy,
        "entropy/teacher": rows.q_entropy.to(view.entropy.dtype),
        "cache/coverage": sums.coverage,
        "cache/miss_mass": sums.miss_mass,
        "cache/drift_k3": _drift(view, rows),
        **_width(rows, view),
    }


def _width(rows: Targets, view: ObjectiveInput) -> dict[str, Tensor]:
    if rows.q_entropy_hi is None:
        return {}
    return {TEACHER_WIDTH: (rows.q_entropy_hi - rows.q_entropy).to(view.entropy.dtype)}


def _gap(entropy: Tensor, rows: Targets) -> Tensor:
    """[C] nats: how far `entropy` [C] lies from what is known of the teacher's."""
    least = rows.q_entropy.to(entropy.dtype)
    if rows.q_entropy_hi is None:
        return (least - entropy).abs()
    most = rows.q_entropy_hi.to(entropy.dtype)
    return (least - entropy).clamp(min=0) + (entropy - most).clamp(min=0)


def _mass(log_x: Tensor, on: Tensor) -> Tensor:
    return torch.where(on, log_x.exp(), 0.0).sum(-1)


def _drift(view: ObjectiveInput, rows: Targets) -> Tensor:
    live = view.log_p.gather(1, rows.token_col[:, None])[:, 0]
    log_r = (live - rows.s_lp.to(live.dtype)).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.expm1(log_r) - log_r
