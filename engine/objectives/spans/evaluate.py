"""Loss of a pack whose teacher has another tokenizer: terms of spans, which join several rows.

The log-probs at the columns are computed once without a gradient. The losses of spans are a small
function of them, which autograd differentiates; a second pass hands its derivatives to the head and
the hidden states. So no loss of spans has a kernel of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from logitcask.engine.metrics.metrics import LOG_RATIO_BOUND
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.spans.log_probs import SpanLogProbs
from logitcask.engine.objectives.spans.losses import SPAN_LOSSES
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss [] of P rows and metrics name -> [P]; arguments as those of pack_loss.

    The loss of a span has the weight of its first row, and none if one of its rows has none: a
    span that is partly trained on has no log-prob of the part.
    """
    rows = targets.spanned()
    run = partial(linear_sparse_kl, k=1, n_vocab=n_vocab, logit_transform=logit_transform)
    log_p = _log_p(run, states, head, rows)
    with torch.enable_grad():
        x = SpanLogProbs(log_p.requires_grad_(), rows)
        loss = SPAN_LOSSES[objective.divergence](x, objective.k, objective.parameter or 0.0)
        weight = _weights(x, row_weight).to(loss.dtype)
        (at_ids,) = torch.autograd.grad((weight * loss).sum(), log_p)
    of_row = loss.new_zeros(len(rows)).index_add(0, x.first, (weight * loss).detach())

    def precomputed(view: ObjectiveInput) -> ObjectiveGrad:
        return _grad(of_row[view.index], at_ids[view.index])

    result = run(states, head, rows.ids, precomputed)
    return result.loss, _metrics(x)


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
    rows = targets.spanned()
    run = partial(linear_sparse_kl, k=1, n_vocab=n_vocab, logit_transform=logit_transform)
    x = SpanLogProbs(_log_p(run, states, head, rows), rows)
    loss = SPAN_LOSSES[objective.divergence](x, objective.k, objective.parameter or 0.0)
    loss = torch.where(_weights(x, rows.weight) > 0, loss, 0.0)
    return {**_metrics(x), "loss": loss.new_zeros(len(rows)).index_add(0, x.first, loss)}


@torch.no_grad()
def _log_p(run: Callable[..., Any], states: Tensor, head: Tensor, rows: Targets) -> Tensor:
    """Return [P, C] log p of the current student at the columns."""
    log_p = states.new_empty(rows.ids.shape, dtype=torch.float32)
    if states.dtype == torch.float64:
        log_p = log_p.double()

    def keep(view: ObjectiveInput) -> ObjectiveGrad:
        log_p[view.index] = view.log_p
        return _grad(view.log_p.new_zeros(len(view.index)), torch.zeros_like(view.log_p))

    run(states, head, rows.ids, keep)
    return log_p


def _weights(x: SpanLogProbs, row_weight: Tensor) -> Tensor:
    """Return [G] the weights of spans: of the first row, 0 where a row is not trained on."""
    masked = x.sums((x.rows.weight == 0).to(x.log_p.dtype)) > 0
    return torch.where(masked, 0.0, row_weight[x.first])


def _grad(loss: Tensor, at_ids: Tensor) -> ObjectiveGrad:
    """Return loss [C] and its derivatives [C, S] by log p at the listed ids, which are all."""
    dense = -at_ids.sum(-1)
    return ObjectiveGrad(loss, at_ids, dense, dense[:, None].expand_as(at_ids), {})


@torch.no_grad()
def _metrics(x: SpanLogProbs) -> dict[str, Tensor]:
    """Return name -> [P]; a value of a span is shared by its rows."""
    one = (x.tokens == 1) & (x.rows.require("span_tokens")[x.first] == 1)
    per_token = (x.student - x.teacher) / x.tokens
    log_r = (x.token_log_p - x.rows.student_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return {
        "span/reverse_kl": _of_rows(x, per_token),
        "span/one_to_one": _of_rows(x, one.to(x.log_p.dtype)),
        "span/gap": (x.span == x.count).to(x.log_p.dtype),
        "nll/student": -x.token_log_p.detach(),
        "cache/approx_kl": log_r.exp() - 1 - log_r,
    }


def _of_rows(x: SpanLogProbs, values: Tensor) -> Tensor:
    """Return [P] of values [G]; 0 for rows in no span."""
    return torch.cat([values, values.new_zeros(1)])[x.span].detach()
