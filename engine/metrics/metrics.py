"""Metrics of a distillation: agreement of student and teacher, and coverage by the cache.

Each has one value per row; the paper's E_t is the mean over rows, which the trainer computes. p is
the current student, q the teacher; S(p) and S(q) are their top-k. Source: Rethinking On-Policy
Distillation, arXiv 2604.13016, Eq.6-10. Its released code logs other quantities under similar
names, see paper_code.py.

The k of a row: with fewer than k kept ids of the teacher, S(q) at k is unknown. Both top-k are then
taken at k' = min(k, n_kept), which is exact. With k <= k_min of the score request k' = k.

To add a metric, write a function of MetricInput, an entry in METRICS and a worked example in the
tests. Both paths use the table: the plain path calls every function, and fused kernels, which have
summed over the overlap, call `from_sums` where an entry has it. So a new metric needs no kernel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from logitcask.engine.packing.targets import Targets
from logitcask.kernels.fused_objective import OverlapSums
from logitcask.kernels.objective_input import ObjectiveInput
from logitcask.kernels.plain_maths import FLOOR

METRIC_K = 16
"""The paper's k."""

LOG_RATIO_BOUND = 20.0
"""Bound of |log ratio| in approx_kl: one extreme row must not dominate the mean (e^20 is 5e8)."""

LOG_ZERO = -1e9
"""Used for log 0 where -inf would turn an empty support into NaN."""


def renormalised(log_x: Tensor, mask: Tensor) -> Tensor:
    """Normalise log_x [C, S] over the ids in `mask`; about LOG_ZERO elsewhere, without NaN."""
    return torch.where(mask, log_x, LOG_ZERO).log_softmax(-1)


@dataclass(frozen=True)
class MetricInput:
    """C rows of both models; the derived tensors are computed on first use."""

    view: ObjectiveInput
    rows: Targets
    """The same C rows."""
    max_k: int
    """The metrics' k, at most the number of the view's top ids."""
    known_index: Tensor | None = None
    """rows.topk_index(view.top_ids), if computed before."""

    @cached_property
    def log_q(self) -> Tensor:
        """Return [C, S] rows.q_log_p in the dtype of the view."""
        return self.rows.q_log_p.to(self.view.log_p.dtype)

    @cached_property
    def topk_index(self) -> Tensor:
        """Return the [C, S] index of each id in the current top-k."""
        index = self.known_index
        return self.rows.topk_index(self.view.top_ids) if index is None else index

    @cached_property
    def k(self) -> Tensor:
        """Return [C] int64, the k' of each row."""
        return self.rows.n_kept.clamp(1, self.max_k)

    @cached_property
    def overlap(self) -> Tensor:
        """Return [C, S] bool, the overlap I = S(p) & S(q) at k'."""
        return (self.topk_index < self.k[:, None]) & (self.rows.q_rank < self.k[:, None])

    @cached_property
    def top_cached(self) -> Tensor:
        """Return [C, K] bool: the id of the current top-k has a stored score."""
        k = self.max_k
        # One more slot, for ids outside the current top-k or without a score.
        slot = torch.where(self.rows.cached, self.topk_index, k).clamp(max=k)
        found = torch.zeros_like(self.view.top_ids[:, :1], dtype=torch.bool).repeat(1, k + 1)
        found.scatter_(1, slot, True)
        return found[:, :k]

    @property
    def n_shared(self) -> Tensor:
        """Return [C] int64, |I|."""
        return self.overlap.sum(-1)

    @cached_property
    def token_log_p(self) -> Tensor:
        """Return [C] log p(y) of the stored token."""
        return self.view.log_p.gather(1, self.rows.token_col[:, None])[:, 0]

    @cached_property
    def coarse(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (log p, log q, mask), each [C, S + 1]: the cached ids, and a bucket of all others.

        An id without mass on one side goes to the bucket, as in the losses. The bucket is left out
        where the teacher has no mass in it. Both sides are normalised, since stored log-probs are
        rounded; outside the mask they are about LOG_ZERO.
        """
        log_p, log_q, cached = self.view.log_p, self.log_q, self.rows.cached
        mask = cached & (log_p != -torch.inf) & (log_q != -torch.inf)
        inside = torch.where(mask, log_p.exp(), 0.0).sum(-1, keepdim=True)
        log_p_rest = (1 - inside).clamp(min=FLOOR[log_p.dtype]).log()
        tail = self.rows.q_log_tail.to(log_q.dtype)[:, None]
        left = torch.where(cached & ~mask, log_q, -torch.inf)
        log_q_rest = torch.cat([tail, left], -1).logsumexp(-1, keepdim=True)
        mask = torch.cat([mask, log_q_rest != -torch.inf], -1)
        sides = (torch.cat([log_p, log_p_rest], -1), torch.cat([log_q, log_q_rest], -1))
        return renormalised(sides[0], mask), renormalised(sides[1], mask), mask


def metric_input(
    view: ObjectiveInput, rows: Targets, k: int = METRIC_K, *, topk_index: Tensor | None = None
) -> MetricInput:
    """Return the input of the metrics; `rows` are the rows of `view`.

    A view with fewer than k top ids lowers k. topk_index: rows.topk_index(view.top_ids), if known.
    """
    return MetricInput(view, rows, min(k, view.top_ids.shape[1]), topk_index)


def overlap_ratio(x: MetricInput) -> Tensor:
    """Return |S(p) & S(q)| / k (Eq.6)."""
    return x.n_shared.to(x.log_q.dtype) / x.k


def overlap_mass_student(x: MetricInput) -> Tensor:
    """Return the student's mass on the overlap, not renormalised (Eq.9)."""
    return _mass(x.view.log_p, x.overlap)


def overlap_mass_teacher(x: MetricInput) -> Tensor:
    """Return the teacher's mass on the overlap, not renormalised (Eq.10)."""
    return _mass(x.log_q, x.overlap)


def overlap_advantage(x: MetricInput) -> Tensor:
    """Return (1 / |I|) sum_I p-(v) [log q-(v) - log p-(v)] (Eq.7), p- and q- renormalised on I.

    It is <= 0, and 0 in rows with |I| <= 1, which stay in the mean as in the paper's E_t: read it
    with overlap/empty_share and the masses. Ids that one side excludes (-inf) are not in I.
    """
    mask = x.overlap & (x.view.log_p != -torch.inf) & (x.log_q != -torch.inf)
    log_p, log_q = renormalised(x.view.log_p, mask), renormalised(x.log_q, mask)
    terms = torch.where(mask, log_p.exp() * (log_q - log_p), 0.0)
    return terms.sum(-1) / mask.sum(-1).clamp(min=1)


def overlap_empty(x: MetricInput) -> Tensor:
    """Return 1 where S(p) and S(q) are disjoint; the mean is the share of rows without an Eq.7."""
    return (x.n_shared == 0).to(x.log_q.dtype)


def entropy_student(x: MetricInput) -> Tensor:
    """Return H(p), full vocabulary, nats."""
    return x.view.entropy


def entropy_teacher(x: MetricInput) -> Tensor:
    """Return H(q), full vocabulary, nats, as stored; of an interval the lower end."""
    return x.rows.q_entropy.to(x.view.entropy.dtype)


def entropy_teacher_width(x: MetricInput) -> Tensor:
    """Return the width of the interval of H(q), nats, for a teacher with top-k log-probs only."""
    upper = x.rows.require("q_entropy_hi")
    return (upper - x.rows.q_entropy).to(x.view.entropy.dtype)


def entropy_gap(x: MetricInput) -> Tensor:
    """Return |H(q) - H(p)| (Eq.8). For an interval of H(q) the distance from it, a lower bound."""
    entropy, lower = x.view.entropy, entropy_teacher(x)
    if x.rows.q_entropy_hi is None:
        return (lower - entropy).abs()
    upper = x.rows.q_entropy_hi.to(entropy.dtype)
    return (lower - entropy).clamp(min=0) + (entropy - upper).clamp(min=0)


def mixture_width(x: MetricInput) -> Tensor:
    """Return the width of the bounds of a mixture's log-probs, nats, mean over its mass."""
    return x.rows.require("mixture_width").to(x.view.entropy.dtype)


def mixture_missing(x: MetricInput) -> Tensor:
    """Return the mass that the scored ids of a mixture lack, at most."""
    return x.rows.require("mixture_missing").to(x.view.entropy.dtype)


def kl_forward_bound(x: MetricInput) -> Tensor:
    """Return KL(q || p) of both coarsened to the cached ids and one bucket of all others, nats.

    It is a lower bound of the KL over the vocabulary (log-sum inequality: Cover and Thomas,
    Elements of Information Theory, Theorem 2.7.1), and equal to it where every id is cached. It may
    be above it by the rounding of the stored log-probs.
    """
    log_p, log_q, mask = x.coarse
    return torch.where(mask, log_q.exp() * (log_q - log_p), 0.0).sum(-1)


def kl_reverse_bound(x: MetricInput) -> Tensor:
    """Return KL(p || q) of both coarsened distributions, nats: see kl_forward_bound."""
    log_p, log_q, mask = x.coarse
    return torch.where(mask, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def top1_agreement(x: MetricInput) -> Tensor:
    """Return 1 where student and teacher have the same most likely id, else 0."""
    both = (x.rows.q_rank == 0) & (x.rows.ids == x.view.top_ids[:, :1])
    return both.any(-1).to(x.log_q.dtype)


def nll_student(x: MetricInput) -> Tensor:
    """Return -log p(y) of the stored token y, nats; infinite where the student excludes it."""
    return -x.token_log_p


def coverage(x: MetricInput) -> Tensor:
    """Sum the student's mass on ids with a stored score."""
    return _mass(x.view.log_p, x.rows.cached)


def uncached_mass(x: MetricInput) -> Tensor:
    """Sum the student's mass on ids of its top-k without a stored score."""
    top_log_p = x.view.top_log_p[:, : x.top_cached.shape[1]]
    return _mass(top_log_p, ~x.top_cached)


def approx_kl(x: MetricInput) -> Tensor:
    """Return r - 1 - log r >= 0 (k3), r = p(y) / b(y), b the behaviour policy at temperature 1.

    Its mean over draws y of b is KL(b || p), with less variance than -log r (J. Schulman,
    "Approximating KL divergence", k3). log r is clamped to +-LOG_RATIO_BOUND.
    """
    log_r = x.token_log_p - x.rows.student_logprobs.to(x.token_log_p.dtype)
    log_r = log_r.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.expm1(log_r) - log_r


@dataclass(frozen=True)
class Metric:
    """An entry of METRICS."""

    compute: Callable[[MetricInput], Tensor]
    """-> [C], finite wherever the numbers of student and teacher are."""
    from_sums: Callable[[OverlapSums], Tensor] | None = None
    """The same from the sums of fused kernels; None: use `compute`."""
    needs: str | None = None
    """An optional field of Targets; the metric is left out where the store lacks it."""
    without: str | None = None
    """An optional field of Targets; the metric is left out where the store has it."""


TEACHER_WIDTH = "entropy/teacher_width"

METRICS: dict[str, Metric] = {
    "overlap/ratio": Metric(overlap_ratio, lambda sums: sums.shared / sums.k),
    "overlap/mass_student": Metric(overlap_mass_student, lambda sums: sums.mass_student),
    "overlap/mass_teacher": Metric(overlap_mass_teacher, lambda sums: sums.mass_teacher),
    "overlap/advantage": Metric(overlap_advantage, lambda sums: sums.advantage),
    "overlap/empty_share": Metric(overlap_empty, lambda sums: (sums.shared == 0).to(sums.k.dtype)),
    "entropy/gap": Metric(entropy_gap),
    "entropy/student": Metric(entropy_student),
    "entropy/teacher": Metric(entropy_teacher),
    "kl/forward_bound": Metric(kl_forward_bound),
    "kl/reverse_bound": Metric(kl_reverse_bound),
    # Draws of a teacher do not say which id is its best.
    "top1/agreement": Metric(top1_agreement, without="q_draws"),
    "nll/student": Metric(nll_student),
    "cache/coverage": Metric(coverage, lambda sums: sums.coverage),
    "cache/uncached_mass": Metric(uncached_mass, lambda sums: sums.uncached_mass),
    "cache/approx_kl": Metric(approx_kl),
    TEACHER_WIDTH: Metric(entropy_teacher_width, needs="q_entropy_hi"),
    "mixture/width": Metric(mixture_width, needs="mixture_width"),
    "mixture/missing_mass": Metric(mixture_missing, needs="mixture_missing"),
}

COMMON_METRICS = tuple(name for name, metric in METRICS.items() if metric.needs is None)
"""Names of the metrics that every store of top lists gives."""


def compute_metrics(
    view: ObjectiveInput,
    rows: Targets,
    *,
    k: int = METRIC_K,
    topk_index: Tensor | None = None,
    sums: OverlapSums | None = None,
    table: Mapping[str, Metric] = METRICS,
) -> dict[str, Tensor]:
    """Return every metric of C rows, name -> [C]; arguments as of `metric_input`.

    sums: those of fused kernels, if they ran.
    """
    x = metric_input(view, rows, k, topk_index=topk_index)
    return {
        name: metric.compute(x)
        if sums is None or metric.from_sums is None
        else metric.from_sums(sums)
        for name, metric in table.items()
        if (metric.needs is None or getattr(rows, metric.needs) is not None)
        and (metric.without is None or getattr(rows, metric.without) is None)
    }


def _mass(log_x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, log_x.exp(), 0.0).sum(-1)
