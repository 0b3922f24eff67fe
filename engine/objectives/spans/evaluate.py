"""Loss of a pack whose teacher has another tokenizer: terms of spans, which join several rows.

The log-probs at the columns are computed once without a gradient. The losses of spans are a small
function of them, which autograd differentiates; a second pass hands its derivatives to the head and
the hidden states. So no loss of spans has a kernel of its own.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from logitcask.engine.objectives.bounds import NO_BOUNDS, SKIPPED, Bounds, rows_to_skip, skips
from logitcask.engine.objectives.evaluate import DISTILL_PART, part_name
from logitcask.engine.objectives.modifiers import Importance
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.spans.advantage import importance
from logitcask.engine.objectives.spans.log_probs import SpanLogProbs
from logitcask.engine.objectives.spans.losses import SPAN_LOSSES
from logitcask.engine.objectives.spans.metrics import of_rows, span_metrics
from logitcask.engine.objectives.supports import support_log_probs
from logitcask.engine.packing.targets import Targets
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.logit_transform import LogitTransform
from logitcask.kernels.objective_input import ObjectiveGrad, ObjectiveInput


def span_loss(
    objective: Objective,
    states: Tensor,
    head: Tensor,
    targets: Targets,
    *,
    row_weight: Tensor,
    n_vocab: int,
    logit_transform: LogitTransform,
    bounds: Bounds = NO_BOUNDS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss [] of P rows and metrics name -> [P]; arguments as those of pack_loss.

    The loss of a span has the weight of its first row, and none if one of its rows has none: a
    span that is partly trained on has no log-prob of the part. Terms of the sampled token have the
    weights of the rows. Bounds that skip rows skip the spans that they are in.
    """
    run = partial(linear_sparse_kl, n_vocab=n_vocab, logit_transform=logit_transform)
    k = max(1, min(objective.current_topk, n_vocab))
    x, entropy = _log_probs(run, k, states, head, targets.spanned())
    metrics, dtype = span_metrics(x, entropy, objective), x.log_p.dtype
    weight = torch.where(x.trained, row_weight[x.first].to(dtype), 0.0)
    if skips(objective, bounds):
        skip = rows_to_skip(objective, metrics, bounds)
        assert skip is not None, "skips() is true"
        skipped = x.sums(skip.to(dtype)) > 0
        weight = torch.where(skipped, 0.0, weight)
        row_weight = torch.where(skip, 0.0, row_weight)
        metrics[SKIPPED] = torch.maximum(of_rows(x, skipped.to(dtype)), skip.to(dtype))
    log_p = x.log_p.clone().requires_grad_()
    with torch.enable_grad():
        moving = replace(x, log_p=log_p)
        loss = SPAN_LOSSES[objective.divergence](moving, objective.k, objective.parameter or 0.0)
        for each in objective.modifiers:
            if isinstance(each, Importance):
                loss = loss * importance(x, each.cap)
        (at_ids,) = torch.autograd.grad((weight * loss).sum(), log_p)
    of_row = _at_first(x, weight * loss.detach())
    parts = {DISTILL_PART: _at_first(x, torch.where(weight != 0, loss.detach(), 0.0))}
    inputs = support_log_probs(
        x.rows, x.log_p, x.topk_index, x.rows.q_entropy, x.rows.cached, objective.support
    )
    for each in objective.terms:
        added = each.term(inputs)
        factor = each.weight * row_weight.to(dtype)
        of_row = of_row + torch.where(factor != 0, factor * added.loss, 0.0)
        at_ids = at_ids + torch.where(factor[:, None] != 0, factor[:, None] * added.at_ids, 0.0)
        parts[part_name(each)] = added.loss

    def precomputed(view: ObjectiveInput) -> ObjectiveGrad:
        return _grad(of_row[view.index], at_ids[view.index])

    result = run(states, head, x.rows.ids, precomputed, k=1)
    return result.loss, metrics | (parts if objective.terms else {})


@torch.no_grad()
def span_values(
    objective: Objective,
    states: Tensor,
    head: Tensor,
    targets: Targets,
    *,
    n_vocab: int,
    logit_transform: LogitTransform,
) -> dict[str, Tensor]:
    """Return name -> [P] of the metrics, and `loss`: of each span, nats, at its first row.

    Arguments as those of span_loss. A span that is partly trained on has a loss of 0 here.
    """
    run = partial(linear_sparse_kl, n_vocab=n_vocab, logit_transform=logit_transform)
    k = max(1, min(objective.current_topk, n_vocab))
    x, entropy = _log_probs(run, k, states, head, targets.spanned())
    loss = SPAN_LOSSES[objective.divergence](x, objective.k, objective.parameter or 0.0)
    loss = torch.where(x.trained, loss, 0.0)
    return {**span_metrics(x, entropy, objective), "loss": _at_first(x, loss)}


@torch.no_grad()
def _log_probs(
    run: Callable[..., Any], k: int, states: Tensor, head: Tensor, rows: Targets
) -> tuple[SpanLogProbs, Tensor]:
    """Return both models on the spans, without a gradient, and [P] entropies of the student."""
    log_p = states.new_empty(rows.ids.shape, dtype=torch.float32)
    if states.dtype == torch.float64:
        log_p = log_p.double()
    entropy = log_p.new_empty(len(rows))
    top_ids = torch.empty(len(rows), k, dtype=torch.int64, device=states.device)

    def keep(view: ObjectiveInput) -> ObjectiveGrad:
        log_p[view.index] = view.log_p
        top_ids[view.index] = view.top_ids
        entropy[view.index] = view.entropy
        return _grad(view.log_p.new_zeros(len(view.index)), torch.zeros_like(view.log_p))

    run(states, head, rows.ids, keep, k=k)
    return SpanLogProbs(log_p, rows, rows.topk_index(top_ids)), entropy


def _at_first(x: SpanLogProbs, values: Tensor) -> Tensor:
    """Return [P] of values [G]: each at the first row of its span, 0 elsewhere."""
    return values.new_zeros(len(x.rows)).index_add(0, x.first, values)


def _grad(loss: Tensor, at_ids: Tensor) -> ObjectiveGrad:
    """Return loss [C] and its derivatives [C, S] by log p at the listed ids, which are all."""
    dense = -at_ids.sum(-1)
    return ObjectiveGrad(loss, at_ids, dense, dense[:, None].expand_as(at_ids), {})
