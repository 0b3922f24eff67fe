"""An objective as data, which the kernels compute in the launch that selects the top-k.

As plain torch an objective is some 60 to 150 small operations for every chunk of rows, and a GPU
waits for their launches. FusedObjective holds the same objective as a divergence, a tail and the
teacher's numbers. It is also an ObjectiveFn: `plain` is its specification, and runs where the
fused form does not apply.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.kernels.launch import check_device, runs_triton
from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveGrad, ObjectiveInput
from logitcask.kernels.topk_select import MAX_TRITON_K

MAX_FUSED_IDS = 128
"""Largest S of the fused form: it compares S x K ids in registers."""

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


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedObjective:
    """An objective on P rows and S listed ids. Natural logs; p is the student, q the teacher."""

    plain: ObjectiveFn
    """The same objective in torch."""
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
    metric_k: int
    """k of the overlap's sums."""
    name_metrics: Callable[[ObjectiveInput, OverlapSums], dict[str, Tensor]]
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
        return self.plain(view)

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


_DTYPES: dict[str, torch.dtype | None] = {
    "log_q": None,
    "log_tail": None,
    "mask": torch.bool,
    "known": torch.bool,
    "q_rank": torch.int64,
    "n_kept": torch.int64,
}
"""The tensors; None: any floating."""
_PER_ROW = ("log_tail", "n_kept")
