"""Hidden states and what the store knows of them -> loss and metrics, by the op that does least.

    objective                                  products with the whole head    metrics of
    renormalised, support known beforehand     none                            a share of the rows
    renormalised, support of the live student  one, forward                    every row
    anything else                              three                           every row

Metrics need the log-sum-exp of a row. Where the loss does not, they are taken of a share of the
rows, which is picked by a hash of what the store holds of a row: the same rows in every run on the
same scores, however they are packed, split over processes, or shuffled.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.engine.objectives import Objective, current_topk, loss_weights, row_objective
from logitcask.engine.objectives.bounds import NO_BOUNDS, Bounds, skips
from logitcask.engine.objectives.evaluate import (
    has_known_support,
    is_renormalised,
    support_objective,
)
from logitcask.engine.packing.targets import Targets
from logitcask.kernels.indexed_linear import indexed_linear
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.logit_transform import PLAIN, LogitTransform

GAMMA = 0x9E3779B97F4A7C15 - 2**64
"""The odd number next to 2^64 over the golden ratio, signed."""


class PackLoss(NamedTuple):
    loss: Tensor
    """[] sum over rows of row_weight x loss, nats; differentiable by states and head."""
    metrics: dict[str, Tensor]
    """name -> [n], detached."""
    measured: Tensor
    """[n] int64, the rows that `metrics` are of."""


def pack_loss(
    objective: Objective,
    states: Tensor,
    head: Tensor,
    targets: Targets,
    *,
    n_vocab: int,
    row_weight: Tensor | None = None,
    logit_transform: LogitTransform = PLAIN,
    metrics_fraction: float = 1.0,
    bounds: Bounds = NO_BOUNDS,
) -> PackLoss:
    """Compute the loss of P rows from their hidden states [P, D] and the head's weight [V, D].

    row_weight: [P], of each row's loss; left out, the loss is the token mean of an update of these
    rows alone, modifiers that weigh rows included, and 0 where targets.weight is. logit_transform:
    of a head with a scale or a soft cap, see logit_transform_of. metrics_fraction: of the rows that
    metrics are taken of at least; where the loss sees whole rows anyway they are taken of all.
    bounds: where they skip rows by a metric that this objective watches, that is of all rows.
    """
    if row_weight is None:
        row_weight = token_mean(objective, targets)
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
        every = torch.arange(len(targets), device=states.device)
        return PackLoss(result.loss, result.metrics, every)
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
    measured = (row_hash(targets) < int(metrics_fraction * 2**32)).nonzero()[:, 0]
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
