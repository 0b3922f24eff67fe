"""Evaluation of an objective: from the input of C rows to their loss, gradient and metrics.

NaN stays NaN, so a broken student shows in its loss.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.metrics.metrics import METRIC_K, compute_metrics
from logitcask.engine.objectives.bounds import (
    NO_BOUNDS,
    SKIPPED,
    Bounds,
    rows_to_skip,
    skips,
    zero_rows,
)
from logitcask.engine.objectives.divergences import DIVERGENCES, OUTSIDE_COST
from logitcask.engine.objectives.modifiers import Term
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.policy_gradient import policy_gradient
from logitcask.engine.objectives.supports import (
    CURRENT_SUPPORTS,
    SUPPORTS,
    LossTerms,
    SupportLogProbs,
    support_log_probs,
)
from logitcask.engine.objectives.tail import TAILS
from logitcask.engine.packing.targets import NOT_IN_TOPK, Targets
from logitcask.kernels import fused_objective
from logitcask.kernels.fused_objective import FusedObjective, OverlapSums
from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveGrad, ObjectiveInput

DISTILL_PART = "loss/distill"
"""The loss of an objective without the terms that are added to it."""


def current_topk(objective: Objective, n_vocab: int, *, metric_k: int = METRIC_K) -> int:
    """Return how many top ids of the current student the objective and the metrics need."""
    return min(max(objective.current_topk, metric_k), n_vocab)


def row_objective(
    objective: Objective,
    targets: Targets,
    *,
    metric_k: int = METRIC_K,
    bounds: Bounds = NO_BOUNDS,
) -> ObjectiveFn:
    """Return `objective` on the rows of `targets` for the kernels; `view.index` selects the rows.

    With bounds of action `skip`, a row beyond them has loss and gradient 0 and is counted in a
    metric. The kernels' k must be `current_topk(objective, n_vocab)`; the function raises
    ObjectiveError for a smaller one.
    """

    for modifier in objective.modifiers:
        targets = modifier.prepare(targets)

    def evaluate(view: ObjectiveInput) -> ObjectiveGrad:
        rows = targets.at(view.index)
        _check_topk(objective, view, rows)
        topk_index = rows.topk_index(view.top_ids)
        mask = SUPPORTS[objective.support](topk_index, rows, objective.k)
        inputs = support_log_probs(
            rows, view.log_p, topk_index, view.entropy, mask, objective.support
        )
        terms, parts = loss_terms(objective, inputs)
        metrics = compute_metrics(view, rows, k=metric_k, topk_index=topk_index)
        if (skip := rows_to_skip(objective, metrics, bounds)) is not None:
            metrics[SKIPPED] = skip.to(terms.loss.dtype)
            terms = zero_rows(skip, terms)
            parts = {name: torch.where(skip, 0.0, part) for name, part in parts.items()}
        return terms.with_metrics(metrics | parts)

    if is_fusable(objective) and not skips(objective, bounds):
        return _fused(objective, targets, evaluate, metric_k)
    return evaluate


def loss_terms(
    objective: Objective, inputs: SupportLogProbs
) -> tuple[LossTerms, dict[str, Tensor]]:
    """Return loss and gradient of C rows, modifiers of scope `row` included, and the parts of the
    loss by `part_names`, [C] each.
    """
    unmodified = inputs
    for modifier in objective.modifiers:
        inputs = modifier.adjust_target(inputs)
    if objective.estimator == "policy_gradient":
        terms = policy_gradient(objective.weights, objective.modifiers, inputs)
    else:
        terms = _divergence_terms(objective, inputs)
    for modifier in objective.modifiers:
        terms = modifier.adjust_terms(terms, unmodified)
    parts = {DISTILL_PART: terms.loss} if objective.terms else {}
    for each in objective.terms:
        added = each.term(unmodified)
        parts[part_name(each)] = added.loss
        terms = terms.plus(added, torch.full_like(added.loss, each.weight))
    return terms, parts


def _divergence_terms(objective: Objective, inputs: SupportLogProbs) -> LossTerms:
    """Return loss and gradient of C rows of a divergence, before the modifiers that adjust them."""
    divergence, parameter = DIVERGENCES[objective.divergence], objective.parameter or 0.0
    cost_of = OUTSIDE_COST.get(objective.divergence)
    outside_cost = math.inf if cost_of is None else cost_of(parameter)
    tau = objective.temperature
    if tau != 1:
        inputs = replace(inputs, log_p=inputs.log_p / tau, log_q=inputs.log_q / tau)
    terms = TAILS[objective.tail](
        lambda log_p, log_q, mask: divergence(log_p, log_q, mask, parameter), inputs, outside_cost
    )
    if tau == 1:
        return terms
    # The derivative is by log p / tau. Terms that are renormalised on S have no other part.
    return terms._replace(loss=tau**2 * terms.loss, at_ids=tau * terms.at_ids)


def part_name(term: Term) -> str:
    """Return the name of a term's loss, without its weight, in metrics.jsonl."""
    return f"loss/{term.name}"


def part_names(objective: Objective) -> tuple[str, ...]:
    """Return the names of the parts of the loss; none for an objective without terms."""
    terms = tuple(part_name(term) for term in objective.terms)
    return (DISTILL_PART, *terms) if terms else ()


def is_renormalised(objective: Objective) -> bool:
    """Return whether the gradient of every row provably sums to zero over the support.

    It does where log p enters up to a constant of the row: a renormalised divergence. No policy
    gradient does, that of `opd_released` included.
    """
    return (
        objective.estimator == "divergence"
        and objective.tail == "renormalize"
        and all(modifier.keeps_sum for modifier in objective.modifiers)
    )


def has_known_support(objective: Objective) -> bool:
    """Return whether the store alone decides the support, without the current student."""
    return objective.support not in CURRENT_SUPPORTS


def support_objective(objective: Objective, targets: Targets) -> tuple[Tensor, ObjectiveFn]:
    """Return a renormalised objective on a known support as indexed_linear takes it.

    First the support's ids [P, S], -1 where a row has fewer; then the objective on them, without
    metrics.
    """
    no_index = torch.full_like(targets.ids, NOT_IN_TOPK)
    mask = SUPPORTS[objective.support](no_index, targets, objective.k) & (targets.ids >= 0)
    first = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : objective.k]
    narrow = targets.columns(first, mask)

    def evaluate(view: ObjectiveInput) -> ObjectiveGrad:
        rows = narrow.at(view.index)
        no_index = torch.full_like(rows.ids, NOT_IN_TOPK)
        inputs = support_log_probs(rows, view.log_p, no_index, view.entropy, rows.ids >= 0)
        return loss_terms(objective, inputs)[0].with_metrics({})

    return narrow.ids, evaluate


def is_fusable(objective: Objective) -> bool:
    """Return whether a kernel of its own can compute the loss.

    It can for a divergence at temperature 1 on a support that it knows, fixed or cut by the
    current top-k. Modifiers that weight whole rows do not matter here.
    """
    return (
        objective.estimator == "divergence"
        and objective.divergence in fused_objective.DIVERGENCES
        and objective.tail in fused_objective.TAILS
        and objective.temperature == 1
        and objective.support in ("teacher", "student", "overlap")
        and all(modifier.scope != "row" for modifier in objective.modifiers)
    )


def _fused(
    objective: Objective, targets: Targets, plain: ObjectiveFn, metric_k: int
) -> FusedObjective:
    """Return `plain` with its fused form, which gives the same numbers."""

    def name_metrics(view: ObjectiveInput, sums: OverlapSums) -> dict[str, Tensor]:
        return compute_metrics(view, targets.at(view.index), k=metric_k, sums=sums)

    first = torch.zeros_like(targets.ids)  # as if every id led the current top-k
    return FusedObjective(
        plain=plain,
        divergence=objective.divergence,
        parameter=objective.parameter or 0.5,
        tail=objective.tail,
        log_q=targets.q_log_p,
        log_tail=targets.q_log_tail,
        mask=SUPPORTS[objective.support](first, targets, objective.k),
        known=targets.cached,
        live_k=objective.current_topk,
        q_rank=targets.q_rank,
        n_kept=targets.n_kept,
        metric_k=metric_k,
        name_metrics=name_metrics,
    )


def _check_topk(objective: Objective, view: ObjectiveInput, rows: Targets) -> None:
    found = view.top_ids.shape[1]
    # In a vocabulary smaller than k no teacher keeps more than `found` ids, so that is no mistake.
    if found < objective.current_topk and bool((rows.n_kept > found).any()):
        raise ObjectiveError(
            f"the kernel selects the top {found} ids of the student, and the objective needs "
            f"{objective.current_topk}",
            hint="pass k = current_topk(objective, n_vocab) to the kernel",
        )
