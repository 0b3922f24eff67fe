"""Weights of rows in an update: the aggregation, and modifiers of scope `sequence` and `batch`.

They depend on stored values of the behaviour policy and the teacher, never on the current student.
So they are known before the first forward pass, and neither packing, accumulation nor the number of
processes changes them. Only the aggregation decides the divisor.
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
"""e of SOD."""


class LossWeights(NamedTuple):
    weights: list[Tensor]
    """[P] of each pack: the factors of its rows' losses."""
    divisor: Tensor
    """[] float64, of this process; the loss is divided by its sum over all processes."""


def loss_weights(
    objective: Objective,
    packs: Sequence[Targets],
    aggregation: str,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> LossWeights:
    """Return the weights of the rows that one update has on this process.

    packs: the targets of each pack; a sequence never spans packs. aggregation: token-mean, over all
    rows of the update; sequence-mean, the mean over sequences of the mean over their rows;
    sequence-sum, the mean over sequences of the sum over their rows. gather: returns the value of
    every process, in their order; all of them call it equally often.
    """
    weights, divisor = [], torch.zeros((), dtype=torch.float64)
    for rows in packs:
        each, counted = _sums(rows, rows.weight), _sums(rows, mask_of(rows)).clamp(min=1e-9)
        if aggregation == "sequence-mean":
            weights.append(rows.weight / counted[rows.sequence])
        else:
            weights.append(rows.weight)
        # A sequence comes once for each teacher, and counts once in all: by its mean share.
        total = each if aggregation == "token-mean" else each / counted
        divisor += total.sum(dtype=torch.float64)
    for modifier in objective.modifiers:
        if isinstance(modifier, Prune):
            factors = [prune_weights(rows, modifier) for rows in packs]
        elif isinstance(modifier, Stepwise):
            factors = [stepwise_weights(rows, modifier) for rows in packs]
        elif isinstance(modifier, KeepEntropy):
            least = _entropy_kept(packs, modifier.share, gather)
            factors = [(rows.student_entropy >= least).to(rows.weight.dtype) for rows in packs]
        else:
            continue
        weights = [w * factor for w, factor in zip(weights, factors, strict=True)]
    return LossWeights(weights, divisor)


def prune_weights(rows: Targets, modifier: Prune) -> Tensor:
    """Return [P] weights of Prune. The overlap is at k' = min(k, n_kept), as in the metric."""
    k = rows.n_kept.clamp(1, modifier.k)[:, None]
    column = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    both = rows.in_student & (column < k) & (rows.q_rank < k)
    ratio = both.sum(-1) / k[:, 0]
    bad = (ratio < modifier.overlap) & (rows.weight > 0)
    so_far = bad.cumsum(0)
    first = rows.position == 0
    before = torch.where(first, so_far - bad.long(), 0).cummax(0).values  # of earlier sequences
    kept_share = (1 - modifier.drop * (so_far - before)).clamp(0, 1)
    return (kept_share + modifier.floor).to(rows.weight.dtype)


def stepwise_weights(rows: Targets, modifier: Stepwise) -> Tensor:
    """Return [P] weights of Stepwise."""
    step = rows.position // modifier.tokens
    new = torch.ones_like(step, dtype=torch.bool)
    new[1:] = (step[1:] != step[:-1]) | (rows.sequence[1:] != rows.sequence[:-1])
    group = new.long().cumsum(0) - 1  # counts steps over all sequences
    mask = mask_of(rows)
    gap = (rows.student_logprobs - rows.teacher_logprobs).abs().double() * mask
    groups = int(group[-1]) + 1 if len(group) else 0
    total = gap.new_zeros(groups).index_add_(0, group, gap)
    count = gap.new_zeros(groups).index_add_(0, group, mask.double())
    d = total / count.clamp(min=1)
    first_steps = group[(rows.position == 0).nonzero()[:, 0]]  # [N] the first step of each sequence
    first = d[first_steps][rows.sequence] if len(group) else d
    weight = (first + STEP_EPSILON) / (d[group] + STEP_EPSILON)
    return weight.clamp(max=1 + modifier.delta).to(rows.weight.dtype)


def _sums(rows: Targets, values: Tensor) -> Tensor:
    """Return [N] sums over each sequence."""
    count = int(rows.sequence[-1]) + 1 if len(rows) else 0
    return values.new_zeros(count).index_add_(0, rows.sequence, values)


def _entropy_kept(
    packs: Sequence[Targets], share: float, gather: Callable[[Any], list[Any]]
) -> float:
    """Return the least entropy in the `share` of the update's rows with the largest ones."""
    own: list[tuple[float, float]] = []
    for rows in packs:
        counted, part = rows.weight > 0, share_of(rows)
        own += zip(rows.student_entropy[counted].tolist(), part[counted].tolist(), strict=True)
    ordered = sorted((pair for pairs in gather(own) for pair in pairs), reverse=True)
    # A row of several teachers counts once: their shares sum to 1, up to rounding.
    left = max(1, round(share * sum(part for _, part in ordered))) - 1e-3
    for entropy, part in ordered:
        left -= part
        if left <= 0:
            return float(entropy)
    return 0.0


def share_of(rows: Targets) -> Tensor:
    """Return [P] the share of each row's teacher, 1 for one teacher."""
    return torch.ones_like(rows.weight) if rows.share is None else rows.share


def mask_of(rows: Targets) -> Tensor:
    """Return [P] the loss mask, without the share of a row's teacher."""
    return rows.weight if rows.share is None else rows.weight / rows.share
