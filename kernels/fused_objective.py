"""An objective as data, which the kernels compute in the launch that selects the top-k.

As plain torch an objective is some 60 to 150 small operations for every chunk of rows, and a GPU
waits for their launches. FusedObjective holds the same objective as a divergence, a tail and the
teacher's numbers. It is also an ObjectiveFn: `plain` is its specification in torch, and runs where
the fused form does not apply. A caller without metrics of its own needs none, see evaluate_plain.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.kernels.launch import check_device, runs_triton
from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveGrad, ObjectiveInput
from logitcask.kernels.plain_maths import masked_logsumexp, row_terms
from logitcask.kernels.topk_select import MAX_TRITON_K

MISSING = 1 << 30
"""Index of an id that is not in the student's live top-k."""

MAX_FUSED_IDS = 128
"""Largest S of the fused form: a program compares S x 32 ids at a time."""

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew", "skew_reverse", "alpha", "mixed_kl")
WITH_PARAMETER = ("jsd", "skew", "skew_reverse", "alpha", "mixed_kl")
TAILS = ("renormalize", "bucket", "zero", "ignore")
CUT = {
    "zero": ("forward_kl", "skew", "skew_reverse", "jsd", "alpha"),
    "ignore": ("forward_kl", "skew", "jsd", "alpha"),
}
"""The divergences of tails that cut the teacher to the support: others are infinite where it has no
mass, or their sum over the support alone is not least at the teacher."""


class OverlapSums(NamedTuple):
    """Overlap of C rows, [C] float32 each.

    S(p), S(q): the top-k' of the live student and of the teacher, k' = min(metric_k, K, n_kept); I
    is their intersection.
    """

    shared: Tensor
    """|I|"""
    k: Tensor
    """k'"""
    mass_student: Tensor
    """Mass of p on I."""
    mass_teacher: Tensor
    """Mass of q on I."""
    advantage: Tensor
    """(1 / |I|) sum_I p~ (log q~ - log p~), both renormalized on I; arXiv 2604.13016, Eq.7."""
    coverage: Tensor
    """Mass of p on the known ids."""
    uncached_mass: Tensor
    """Mass of p on those of its top min(metric_k, K) ids that are not known."""


def sums_and_entropy(view: ObjectiveInput, sums: OverlapSums) -> dict[str, Tensor]:
    """Return the sums and the student's entropy as metrics of their names."""
    return {**sums._asdict(), "entropy": view.entropy}


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedObjective:
    """An objective on P rows and S listed ids. Natural logs; p is the student, q the teacher."""

    plain: ObjectiveFn | None = None
    """The same objective in torch; None: evaluate_plain."""
    divergence: str
    """One of DIVERGENCES; fused_maths has their formulas."""
    parameter: float = 0.5
    """b of fused_maths, between 0 and 1; without effect for reverse_kl and forward_kl."""
    tail: str
    """renormalize: both sides on the support. bucket: one more entry for all other ids. zero: the
    teacher renormalized on the support, without mass elsewhere. ignore: the support alone."""
    log_q: Tensor
    """[P, S] float, -inf at padding."""
    log_tail: Tensor
    """[P] float, log of the teacher's mass outside all known ids."""
    mask: Tensor
    """[P, S] bool, the support; with live_k its part in the live top-k counts."""
    known: Tensor
    """[P, S] bool: ids with a log_q that counts; outside the support they are part of the tail."""
    live_k: int = 0
    """0: the support is `mask`. Else the ids of `mask` among the first live_k of the live top-k."""
    q_rank: Tensor
    """[P, S] int64, 0-based rank in the teacher's kept list; for other ids larger than any k."""
    n_kept: Tensor
    """[P] int64, length of that list."""
    metric_k: int = 16
    """k of the overlap's sums."""
    name_metrics: Callable[[ObjectiveInput, OverlapSums], dict[str, Tensor]] = sums_and_entropy
    """Returns the metrics of the objective, name -> [C]."""

    def __post_init__(self) -> None:
        """Validate names, numbers, shapes and dtypes. Raises ValueError or TypeError."""
        for name, value, allowed in (
            ("divergence", self.divergence, DIVERGENCES),
            ("tail", self.tail, TAILS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}")
        if self.divergence not in CUT.get(self.tail, DIVERGENCES):
            raise ValueError(
                f"divergence={self.divergence!r} has no tail={self.tail!r}, must be one of "
                f"{', '.join(CUT[self.tail])}; use tail 'renormalize' or 'bucket'"
            )
        if not (math.isfinite(self.parameter) and 0 < self.parameter < 1):
            raise ValueError(
                f"parameter={self.parameter} must lie between 0 and 1, without them; at the ends "
                "the mixture is one of its sides, use forward_kl or reverse_kl"
            )
        if self.live_k < 0 or self.metric_k < 1:
            raise ValueError(
                f"live_k={self.live_k} must be at least 0 and metric_k={self.metric_k} at least 1"
            )
        shape = self.log_q.shape
        if len(shape) != 2:
            raise ValueError(f"log_q has shape {tuple(shape)}, must be [rows, S]")
        for name, dtype in _DTYPES.items():
            tensor: Tensor = getattr(self, name)
            expected = shape[:1] if name in _PER_ROW else shape
            if tensor.shape != expected:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, must be {tuple(expected)} by log_q"
                )
            fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
            if not fits:
                raise TypeError(f"{name} is {tensor.dtype}, must be {dtype or 'floating'}")
            check_device(tensor, self.log_q, name)

    def __call__(self, view: ObjectiveInput) -> ObjectiveGrad:
        if self.plain is None:
            raise ValueError("the objective has no ids; pass it to a loss, or call bind(ids) first")
        return self.plain(view)

    def bind(self, ids: Tensor) -> "FusedObjective":
        """Return the objective on ids [P, S], with a plain form. Raises ValueError, see check."""
        self.check(ids)
        return self if self.plain else replace(self, plain=partial(evaluate_plain, self, ids))

    def check(self, ids: Tensor) -> None:
        """Raise ValueError unless ids [P, S] have the shape and device of log_q."""
        if ids.shape != self.log_q.shape:
            raise ValueError(
                f"the objective's log_q has shape {tuple(self.log_q.shape)}, must be that of ids, "
                f"{tuple(ids.shape)}"
            )
        check_device(self.log_q, ids, "the objective's log_q")

    def fits(self, logits: Tensor, k: int) -> bool:
        """Return whether the kernels compute it on these logits [C, V]; else `plain` does."""
        n_ids = self.log_q.shape[1]
        return runs_triton(logits) and 1 <= n_ids <= MAX_FUSED_IDS and k <= MAX_TRITON_K

    def rows(self, rows: slice) -> "FusedObjective":
        """Return the objective of these rows for the kernels; `plain` stays as it is."""
        if rows == slice(0, len(self.log_q)):
            return self
        return replace(self, **{name: getattr(self, name)[rows] for name in _DTYPES})


def evaluate_plain(objective: FusedObjective, ids: Tensor, view: ObjectiveInput) -> ObjectiveGrad:
    """Evaluate the objective on ids [P, S] in torch; without top ids it has no metrics."""
    log_p, top_ids = view.log_p, view.top_ids
    log_q, log_tail = (
        each[view.index].to(log_p.dtype) for each in (objective.log_q, objective.log_tail)
    )
    known, top_index = objective.known[view.index], index_in(ids[view.index], top_ids)
    # An id that either side excludes leaves the support; NaN stays.
    both_have = (log_p != -torch.inf) & (log_q != -torch.inf)
    mask = objective.mask[view.index] & both_have
    if objective.live_k:
        mask = mask & (top_index < objective.live_k)
    left = masked_logsumexp(log_q, known & ~mask)
    terms = row_terms(
        objective.divergence,
        objective.parameter,
        objective.tail,
        log_p,
        log_q,
        torch.logaddexp(log_tail[:, None], left),
        mask,
    )
    if not top_ids.shape[1]:
        return ObjectiveGrad(*terms, {})
    k = min(objective.metric_k, top_ids.shape[1])
    k_row = objective.n_kept[view.index].clamp(1, k)
    shared = (top_index < k_row[:, None]) & (objective.q_rank[view.index] < k_row[:, None])
    slot = torch.where(known, top_index, k).clamp(max=k)  # one more for all others
    cached = torch.zeros_like(top_ids[:, :1], dtype=torch.bool).repeat(1, k + 1)
    cached.scatter_(1, slot, True)
    sums = OverlapSums(
        shared=shared.sum(-1).to(log_p.dtype),
        k=k_row.to(log_p.dtype),
        mass_student=torch.where(shared, log_p.exp(), 0.0).sum(-1),
        mass_teacher=torch.where(shared, log_q.exp(), 0.0).sum(-1),
        advantage=-_mean_kl(log_p, log_q, shared & both_have),
        coverage=torch.where(known, log_p.exp(), 0.0).sum(-1),
        uncached_mass=torch.where(cached[:, :k], 0.0, view.top_log_p[:, :k].exp()).sum(-1),
    )
    return ObjectiveGrad(*terms, objective.name_metrics(view, sums))


def _mean_kl(log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
    """Return [C] (1 / |I|) KL(p~ || q~), both renormalized on I = `mask`; 0 if it is empty."""
    kl, *_ = row_terms("reverse_kl", 0.5, "renormalize", log_p, log_q, log_q[:, :1], mask)
    return kl / mask.sum(-1).clamp(min=1)


def index_in(ids: Tensor, top_ids: Tensor) -> Tensor:
    """Return [C, S] int64: the index of each id in top_ids [C, K], MISSING for one not there."""
    if not top_ids.shape[1]:
        return torch.full_like(ids, MISSING)
    ascending, order = top_ids.sort(1)  # comparing all with all would need [C, S, K]
    at = torch.searchsorted(ascending, ids).clamp_(max=top_ids.shape[1] - 1)
    return torch.where(ascending.gather(1, at) == ids, order.gather(1, at), MISSING)


_DTYPES: dict[str, torch.dtype | None] = {
    "log_q": None,
    "log_tail": None,
    "mask": torch.bool,
    "known": torch.bool,
    "q_rank": torch.int64,
    "n_kept": torch.int64,
}
"""The tensors; None: any floating."""
TENSORS = tuple(_DTYPES)
_PER_ROW = ("log_tail", "n_kept")
