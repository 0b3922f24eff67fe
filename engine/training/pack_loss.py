"""Loss and metrics of a pack from its hidden states and targets, by the cheapest op.

    objective                                     products with the whole head   metrics of
    renormalised, support known in advance        none                           a share of the rows
    renormalised, support of the current policy   one, forward                   every row
    any other                                     three                          every row
    over spans, which join rows                   four                           every row

Metrics need the log-sum-exp of a row. Where the loss does not, they are computed on a share of the
rows, chosen by a hash of the stored data of a row: the same rows in every run on the same scores,
for every packing, number of processes and order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.engine.objectives import Objective, current_topk, loss_weights, row_objective
from logitcask.engine.objectives.bounds import NO_BOUNDS, SKIPPED, Bounds, skips
from logitcask.engine.objectives.evaluate import (
    has_known_support,
    is_renormalised,
    part_names,
    support_objective,
)
from logitcask.engine.objectives.spans.evaluate import span_loss
from logitcask.engine.packing.targets import Targets
from logitcask.kernels.indexed_linear import indexed_linear
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.logit_transform import PLAIN, LogitTransform

OF_STUDENT = ("nll/student", "entropy/student", "cache/approx_kl", SKIPPED)
"""Metrics that read no teacher."""
GAMMA = 0x9E3779B97F4A7C15 - 2**64
"""The odd number nearest to 2^64 over the golden ratio, signed."""


class PackLoss(NamedTuple):
    loss: Tensor
    """[] sum over rows of row_weight x loss, nats; differentiable by states and head."""
    metrics: dict[str, Tensor]
    """name -> [n], detached."""
    measured: Tensor
    """[n] int64, the rows of `metrics`."""


def pack_loss(
    objective: Objective,
    states: Tensor,
    head: Tensor,
    targets: Targets,
    *,
    n_vocab: int,
    row_weight: Tensor | None = None,
    logit_transform: LogitTransform = PLAIN,
    metrics_fraction: float = 0.0,
    bounds: Bounds = NO_BOUNDS,
) -> PackLoss:
    """Compute the loss of P rows from their hidden states [P, D] and the head's weight [V, D].

    row_weight: [P] weights of the rows' losses; None: those of the token mean of an update of these
    rows alone, with the modifiers that weigh rows. logit_transform: scale and soft cap of the head,
    see logit_transform_of. metrics_fraction: minimum share of the rows that metrics are computed
    on, by default none; all rows where the loss reads whole rows, or where `bounds` skip rows by a
    metric.
    """
    if row_weight is None:
        row_weight = token_mean(objective, targets)
    every = torch.arange(len(targets), device=states.device)
    if objective.over_spans:
        loss, metrics = span_loss(
            objective,
            states,
            head,
            targets,
            row_weight=row_weight,
            n_vocab=n_vocab,
            logit_transform=logit_transform,
            bounds=bounds,
        )
        return PackLoss(loss, metrics, every)
    k = current_topk(objective, n_vocab)
    alone = is_renormalised(objective) and has_known_support(objective)
    if not alone or skips(objective, bounds):
        op = indexed_linear if is_renormalised(objective) else linear_sparse_kl
        result = op(
            states,
            head,
            targets.ids,
            row_objective(objective, targets, bounds=bounds),
            k=k,
            row_weight=row_weight,
            n_vocab=n_vocab,
            logit_transform=logit_transform,
        )
        found = result.metrics
        if targets.span is not None:  # an objective without a teacher
            own = {*OF_STUDENT, *part_names(objective)}
            found = {name: values for name, values in found.items() if name in own}
        return PackLoss(result.loss, found, every)
    ids, tokenizer_vocab = support_objective(objective, targets)
    loss = indexed_linear(
        states,
        head,
        ids,
        tokenizer_vocab,
        row_weight=row_weight,
        n_vocab=n_vocab,
        logit_transform=logit_transform,
    ).loss
    measured = torch.empty(0, dtype=torch.int64, device=states.device)
    if metrics_fraction:
        measured = (row_hash(targets) < int(metrics_fraction * 2**32)).nonzero()[:, 0]
    if not len(measured):
        return PackLoss(loss, {}, measured)
    seen = targets.at(measured)
    with torch.no_grad():
        metrics = linear_sparse_kl(
            states[measured],
            head,
            seen.ids,
            row_objective(objective, seen),
            k=k,
            n_vocab=n_vocab,
            logit_transform=logit_transform,
        ).metrics
    return PackLoss(loss, metrics, measured)


def token_mean(objective: Objective, targets: Targets) -> Tensor:
    """Return [P] weights of the rows in an update of these rows alone."""
    weight, total = targets.weight, targets.weight.sum().clamp(min=1e-9)
    if any(modifier.scope != "row" for modifier in objective.modifiers):
        ((weight,), _) = loss_weights(objective, [targets], "token-mean")
    return weight / total


def row_hash(targets: Targets) -> Tensor:
    """Return [P] int64, uniform in [0, 2^32): a hash of the stored data of each row.

    The finalizer is that of SplitMix64 (Steele, Lea, Flood 2014), on integers that wrap around.
    """
    fields = (
        targets.student_logprobs,
        targets.teacher_logprobs,
        targets.student_entropy,
        targets.q_entropy,
    )
    x = targets.token
    for field in fields:
        x = _mixed(x + GAMMA) ^ field.float().view(torch.int32).long()
    return _mixed(x) >> 32 & 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    # int64 multiplies wrap around; 0xBF58... and 0x94D0... as signed numbers.
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)
