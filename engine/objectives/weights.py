"""What a row weighs in an update: the aggregation, and modifiers of scope sequence and batch.

These look at what the store holds of the student that sampled and of the teacher, never at the live
student: so they are known before the first forward pass, and neither packing, accumulation nor the
number of processes can change them. Only the aggregation decides the divisor.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitcask.engine.objectives.modifiers import KeepEntropy, Prune, Stepwise
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.packing.targets import Targets

AGGREGATIONS = ("token-mean", "sequence-mean", "sequence-sum")
STEP_EPSILON = 1e-6
"""SOD's e."""


class Weighed(NamedTuple):
    weights: list[Tensor]
    """[P] of each packed row: what its positions' losses are multiplied by."""
    divisor: Tensor
    """[] float64: what the sum of a process is divided by, summed over all processes."""


def loss_weights(
    objective: Objective,
    packed: Sequence[Targets],
    aggregation: str,
    gathered: Callable[[Any], list[Any]] = lambda value: [value],
) -> Weighed:
    """Weights of the rows that one update has on this process. A sequence never spans packed rows.

    token-mean: over all positions of the update. sequence-mean: the mean over sequences of the mean
    over their positions. sequence-sum: the mean over sequences of the sum over their positions.
    gathered: a value of every process, in their order; called as often by all of them.
    """
    weights, divisor = [], torch.zeros((), dtype=torch.float64)
    for rows in packed:
        each = _sums(rows, rows.weight)
        if aggregation == "sequence-mean":
            weights.append(rows.weight / each[rows.sequence].clamp(min=1e-9))
        else:
            weights.append(rows.weight)
        total = each if aggregation == "token-mean" else each > 0
        divisor += total.sum(dtype=torch.float64)
    for modifier in objective.modifiers:
        if isinstance(modifier, Prune):
            factors = [pruned(rows, modifier) for rows in packed]
        elif isinstance(modifier, Stepwise):
            factors = [stepwise(rows, modifier) for rows in packed]
        elif isinstance(modifier, KeepEntropy):
            least = _entropy_kept(packed, modifier.share, gathered)
            factors = [(rows.s_entropy >= least).to(rows.weight.dtype) for rows in packed]
        else:
            continue
        weights = [w * factor for w, factor in zip(weights, factors, strict=True)]
    return Weighed(weights, divisor)


def pruned(rows: Targets, how: Prune) -> Tensor:
    """[P] Prune's weights. The overlap is at k' = min(k, kept), as the metric's is."""
    k = rows.kept.clamp(1, how.k)[:, None]
    column = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    both = rows.in_student & (column < k) & (rows.q_rank < k)
    ratio = both.sum(-1) / k[:, 0]
    bad = (ratio < how.overlap) & (rows.weight > 0)
    so_far = bad.cumsum(0)
    first = rows.position == 0
    before = torch.where(first, so_far - bad.long(), 0).cummax(0).values  # of earlier sequences
    kept = (1 - how.drop * (so_far - before)).clamp(0, 1)
    return (kept + how.floor).to(rows.weight.dtype)


def stepwise(rows: Targets, how: Stepwise) -> Tensor:
    """[P] Stepwise's weights."""
    step = rows.position // how.tokens
    new = torch.ones_like(step, dtype=torch.bool)
    new[1:] = (step[1:] != step[:-1]) | (rows.sequence[1:] != rows.sequence[:-1])
    group = new.long().cumsum(0) - 1  # a number for every step of every sequence
    gap = (rows.s_lp - rows.q_token_lp).abs().double() * rows.weight
    groups = int(group[-1]) + 1 if len(group) else 0
    total = gap.new_zeros(groups).index_add_(0, group, gap)
    count = gap.new_zeros(groups).index_add_(0, group, rows.weight.double())
    d = total / count.clamp(min=1)
    opening = group[(rows.position == 0).nonzero()[:, 0]]  # [N] the first step of each sequence
    first = d[opening][rows.sequence] if len(group) else d
    weight = (first + STEP_EPSILON) / (d[group] + STEP_EPSILON)
    return weight.clamp(max=1 + how.delta).to(rows.weight.dtype)


def _sums(rows: Targets, of: Tensor) -> Tensor:
    """[N] sums over each sequence."""
    count = int(rows.sequence[-1]) + 1 if len(rows) else 0
    return of.new_zeros(count).index_add_(0, rows.sequence, of)


def _entropy_kept(
    packed: Sequence[Targets], share: float, gathered: Callable[[Any], list[Any]]
) -> float:
    """The entropy that the `share` of the update's rows with the largest has at least."""
    own = [rows.s_entropy[rows.weight > 0] for rows in packed]
    everyone = [value for part in gathered([e.tolist() for e in own]) for e in part for value in e]
    ordered = sorted(everyone, reverse=True)
    count = max(1, round(share * len(ordered)))
    return ordered[count - 1] if ordered else 0.0
