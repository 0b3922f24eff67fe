"""An objective that the kernels can compute themselves, in the launch that selects the top-k.

As plain torch an objective is some 60 to 150 small operations for every chunk of rows, whose
launches a GPU waits for. The form here is the same objective as data: the divergence, the
tail, and the teacher's numbers. It stays an ObjectiveFn: `plain` is its
specification, and runs wherever the fused form does not.
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

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew")
WITH_PARAMETER = ("jsd", "skew")
OUTSIDE = ("renormalize", "tail")


class OverlapSums(NamedTuple):
    """Of C rows, [C] float32 each. S(p), S(q): the top-k' of the live student and of the teacher,
    k' = min(metric_k, K, kept); I is their intersection."""

    shared: Tensor
    """|I|"""
    k: Tensor
    """k'"""
    mass_student: Tensor
    """of p on I"""
    mass_teacher: Tensor
    """of q on I"""
    advantage: Tensor
    """(1 / |I|) sum_I p~ (log q~ - log p~), both renormalised on I; arXiv 2604.13016, Eq.7"""
    coverage: Tensor
    """of p on the known ids"""
    miss_mass: Tensor
    """of p on those of its top min(metric_k, K) ids that are not known"""


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedObjective:
    """P rows, S listed ids. Natural logs; p is the student, q the teacher."""

    plain: ObjectiveFn
    """The same objective in torch."""
    divergence: str
    """One of DIVERGENCES; see fused_maths for their formulas."""
    parameter: float = 0.5
    """The teacher's share of the mixture of jsd and skew, between 0 and 1; the others have none."""
    outside: str
    """renormalize: both sides on the support. tail: one bucket more for what is outside."""
    log_q: Tensor
    """[P, S] float, -inf at padding."""
    log_tail: Tensor
    """[P] float, log of the teacher's mass outside all known ids."""
    on: Tensor
    """[P, S] bool, the support as far as it is fixed."""
    known: Tensor
    """[P, S] bool: ids whose log_q counts; where they are not on, they are part of the tail."""
    live_k: int = 0
    """0: the support is `on`. Else it is those of them among the first live_k of the live top-k."""
    q_rank: Tensor
    """[P, S] int64, 0-based place in the teacher's kept list; larger than any k: not in it."""
    kept: Tensor
    """[P] int64, length of that list."""
    metric_k: int
    """k of the overlap's sums."""
    name_metrics: Callable[[ObjectiveInput, OverlapSums], dict[str, Tensor]]
    """What comes out as the objective's metrics, name -> [C]."""
    one_program: bool = False
    """Scan, selection and gradient of a row in one launch, the second read of the row from L2,
    instead of three. The result is the same; which is faster only a GPU says."""

    def __post_init__(self) -> None:
        """Validate names, numbers, shapes and dtypes. Raises ValueError or TypeError."""
        for name, value, known in (
            ("divergence", self.divergence, DIVERGENCES),
            ("outside", self.outside, OUTSIDE),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
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
            want = shape[:1] if name in _PER_ROW else shape
            if tensor.shape != want:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, must be {tuple(want)}, as log_q says"
                )
            fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
            if not fits:
                raise TypeError(f"{name} is {tensor.dtype}, must be {dtype or 'floating'}")
            check_device(tensor, self.log_q, name)

    def __call__(self, view: ObjectiveInput) -> ObjectiveGrad:
        return self.plain(view)

    def check(self, ids: Tensor) -> None:
        """Raise ValueError unless it is of these ids [P, S]."""
        if ids.shape != self.log_q.shape:
            raise ValueError(
                f"the objective's log_q has shape {tuple(self.log_q.shape)}, must be that of ids, "
                f"{tuple(ids.shape)}"
            )
        check_device(self.log_q, ids, "the objective's log_q")

    def fits(self, logits: Tensor, k: int) -> bool:
        """Return True if the kernels compute it on these logits [C, V]; else `plain` does."""
        n_ids = self.log_q.shape[1]
        return runs_triton(logits) and 1 <= n_ids <= MAX_FUSED_IDS and k <= MAX_TRITON_K

    def of(self, rows: slice) -> "FusedObjective":
        """Return the objective of these rows as the kernels take it; `plain` stays as it is."""
        if rows == slice(0, len(self.log_q)):
            return self
        return replace(self, **{name: getattr(self, name)[rows] for name in _DTYPES})


_DTYPES: dict[str, torch.dtype | None] = {
    "log_q": None,
    "log_tail": None,
    "on": torch.bool,
    "known": torch.bool,
    "q_rank": torch.int64,
    "kept": torch.int64,
}
"""The tensors; None: any floating."""
_PER_ROW = ("log_tail", "kept")
