"""Metrics that the paper's released code logs under names close to the paper's, for comparison.

Source: github.com/thunlp/OPD, the code of arXiv 2604.13016, verl/trainer/ppo/ray_trainer.py. Its
advantage is that of the training, A(v) = -p~(v) (log p - log q): p~ is p renormalised over S(p),
and the log-ratio is not renormalised. A mean pools all counted items of all rows, so each function
returns a row's (sum, count), and a mean is sum of sums / sum of counts.

S(p) is that of the current student, and both top-k are taken at k' as in metrics.py. Metrics of
S(p) use those of its ids that have a stored score; ids that one side excludes (-inf) are left out.
The code's adv_only_tch, of ids of S(q) alone, is missing: p~ gives these ids no weight.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcask.engine.metrics.metrics import (
    METRIC_K,
    MetricInput,
    metric_input,
    overlap_mass_student,
    overlap_mass_teacher,
)
from logitcask.engine.packing.targets import Targets
from logitcask.kernels.objective_input import ObjectiveInput

Pair = tuple[Tensor, Tensor]
"""([C] sum, [C] count) of each row."""


@dataclass(frozen=True, slots=True)
class ReleasedInput:
    """C rows with the training's advantage on the scored ids of S(p)."""

    x: MetricInput
    mask: Tensor
    """[C, S] bool: in S(p), with a stored log q, excluded by neither side."""
    advantage: Tensor
    """[C, S] A(v) nats; 0 outside the mask."""


def released_input(view: ObjectiveInput, rows: Targets, k: int = METRIC_K) -> ReleasedInput:
    """Return the input of the released metrics; arguments as of metrics.metric_input."""
    x = metric_input(view, rows, k)
    log_p, log_q = view.log_p, x.log_q
    finite = (log_p != -torch.inf) & (log_q != -torch.inf)
    mask = (x.topk_index < x.k[:, None]) & rows.cached & finite
    rank = torch.arange(view.top_log_p.shape[1], device=log_p.device)
    top = torch.where(rank < x.k[:, None], view.top_log_p, -torch.inf)
    weight = (log_p - top.logsumexp(-1, keepdim=True)).exp()
    return ReleasedInput(x, mask, torch.where(mask, -weight * (log_p - log_q), 0.0))


def overlap_advantage(rows: ReleasedInput) -> Pair:
    """Pool A over the pairs (row, id of S(p) & S(q)): adv_intersection. It is not Eq.7."""
    return _pooled(rows, rows.mask & rows.x.overlap)


def student_only_advantage(rows: ReleasedInput) -> Pair:
    """Pool A over the pairs (row, scored id of S(p) that is not in S(q)): adv_only_stu."""
    return _pooled(rows, rows.mask & ~rows.x.overlap)


def mass_student(rows: ReleasedInput) -> Pair:
    """Average Eq.9 over the rows that have an overlap: student_p_sum_intersection."""
    return overlap_mass_student(rows.x), _any(rows, rows.x.overlap)


def mass_teacher(rows: ReleasedInput) -> Pair:
    """Average Eq.10 over the rows that have an overlap: teacher_p_sum_intersection."""
    return overlap_mass_teacher(rows.x), _any(rows, rows.x.overlap)


def extreme_p_minus_q(rows: ReleasedInput) -> Pair:
    """Return p(v*) - q(v*) at the id v* of S(p) with the largest |A| (App. B.2, thunlp/OPD #3)."""
    at = torch.where(rows.mask, rows.advantage.abs(), -1.0).argmax(-1, keepdim=True)
    gap = rows.x.view.log_p.exp() - rows.x.log_q.exp()
    return torch.where(rows.mask, gap, 0.0).gather(1, at)[:, 0], _any(rows, rows.mask)


METRICS_RELEASED: dict[str, Callable[[ReleasedInput], Pair]] = {
    "overlap/advantage_released": overlap_advantage,
    "overlap/mass_student_released": mass_student,
    "overlap/mass_teacher_released": mass_teacher,
    "advantage/student_only_released": student_only_advantage,
    "extrema/p_minus_q": extreme_p_minus_q,
}
"""name -> (rows) -> ([C] sum, [C] count); a sum is 0 where its count is."""


def released_metrics(view: ObjectiveInput, rows: Targets, *, k: int = METRIC_K) -> dict[str, Pair]:
    """Return all released metrics of C rows; arguments as of metrics.metric_input."""
    inputs = released_input(view, rows, k)
    return {name: metric(inputs) for name, metric in METRICS_RELEASED.items()}


def _pooled(rows: ReleasedInput, mask: Tensor) -> Pair:
    return torch.where(mask, rows.advantage, 0.0).sum(-1), mask.sum(-1).to(rows.advantage.dtype)


def _any(rows: ReleasedInput, mask: Tensor) -> Tensor:
    return mask.any(-1).to(rows.advantage.dtype)
