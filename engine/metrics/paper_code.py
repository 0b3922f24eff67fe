"""The metrics that the released code logs under names close to the paper's, to compare.

Source: github.com/thunlp/OPD, the code of arXiv 2604.13016, verl/trainer/ppo/ray_trainer.py. There
the advantage is the training's, A(v) = -p~(v) (log p - log q): p~ is p renormalised over S(p), and
the log-ratio is raw. A mean is taken over everything that is counted in all rows at once, so each
function gives a row's (sum, count), and a mean is sum of sums / sum of counts.

S(p) is live, and both top-k are taken at k' as in metrics.py. What is asked of S(p) is asked of
those of its ids whose teacher log-prob is stored; ids that one side excludes (-inf) are left out.
The code's adv_only_tch, of ids of S(q) alone, is not here: p~ says nothing of their weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcask.engine.metrics.metrics import (
    METRIC_K,
    Seen,
    overlap_mass_student,
    overlap_mass_teacher,
    see,
)
from logitcask.engine.packing.targets import Targets
from logitcask.kernels.objective_input import ObjectiveInput

Pair = tuple[Tensor, Tensor]
"""([C] sum, [C] count) of each row."""


@dataclass(frozen=True, slots=True)
class Judged:
    """C rows with the training's advantage on what is known of S(p)."""

    seen: Seen
    on: Tensor
    """[C, S] bool: in S(p), with a stored log q, excluded by neither side."""
    advantage: Tensor
    """[C, S] A(v) nats; 0 where `on` is not."""


def judge(view: ObjectiveInput, rows: Targets, k: int = METRIC_K) -> Judged:
    """Arguments as of metrics.see."""
    places = rows.places(view.top_ids)
    seen = see(view, rows, k, places=places)
    log_p, log_q = view.log_p, seen.log_q
    on = (places < seen.k[:, None]) & rows.cached & (log_p != -torch.inf) & (log_q != -torch.inf)
    rank = torch.arange(view.top_log_p.shape[1], device=log_p.device)
    top = torch.where(rank < seen.k[:, None], view.top_log_p, -torch.inf)
    weight = (log_p - top.logsumexp(-1, keepdim=True)).exp()
    return Judged(seen, on, torch.where(on, -weight * (log_p - log_q), 0.0))


def overlap_advantage(rows: Judged) -> Pair:
    """adv_intersection: A over all pairs (row, id of S(p) & S(q)). Not Eq.7, and of either sign."""
    return _pooled(rows, rows.on & rows.seen.both)


def student_only_advantage(rows: Judged) -> Pair:
    """adv_only_stu: A over all pairs (row, id of S(p) that is not in S(q)), where it is known."""
    return _pooled(rows, rows.on & ~rows.seen.both)


def mass_student(rows: Judged) -> Pair:
    """student_p_sum_intersection: Eq.9 over the rows that have an overlap."""
    return overlap_mass_student(rows.seen), _counted(rows, rows.seen.both)


def mass_teacher(rows: Judged) -> Pair:
    """teacher_p_sum_intersection: Eq.10 over the rows that have an overlap."""
    return overlap_mass_teacher(rows.seen), _counted(rows, rows.seen.both)


def extreme_p_minus_q(rows: Judged) -> Pair:
    """App. B.2: p(v*) - q(v*) at the id v* of S(p) whose |A| is largest (thunlp/OPD issue 3)."""
    at = torch.where(rows.on, rows.advantage.abs(), -1.0).argmax(-1, keepdim=True)
    gap = rows.seen.view.log_p.exp() - rows.seen.log_q.exp()
    return torch.where(rows.on, gap, 0.0).gather(1, at)[:, 0], _counted(rows, rows.on)


METRICS_RELEASED: dict[str, Callable[[Judged], Pair]] = {
    "overlap/advantage_released": overlap_advantage,
    "overlap/mass_student_released": mass_student,
    "overlap/mass_teacher_released": mass_teacher,
    "advantage/student_only_released": student_only_advantage,
    "extrema/p_minus_q": extreme_p_minus_q,
}
"""name -> (rows) -> ([C] sum, [C] count); a sum is 0 where its count is."""


def released_metrics(view: ObjectiveInput, rows: Targets, *, k: int = METRIC_K) -> dict[str, Pair]:
    """Every one of them, of C rows; arguments as of metrics.see."""
    judged = judge(view, rows, k)
    return {name: metric(judged) for name, metric in METRICS_RELEASED.items()}


def _pooled(rows: Judged, on: Tensor) -> Pair:
    return torch.where(on, rows.advantage, 0.0).sum(-1), on.sum(-1).to(rows.advantage.dtype)


def _counted(rows: Judged, on: Tensor) -> Tensor:
    return on.any(-1).to(rows.advantage.dtype)
