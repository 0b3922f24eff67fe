"""An objective at work: from what is seen of C rows to their loss and its gradient.

NaN stays NaN, so a broken student shows in its loss.
"""

import torch
from torch import Tensor

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.metrics.metrics import METRIC_K, row_metrics
from logitcask.engine.objectives.bounds import (
    NO_BOUNDS,
    SKIPPED,
    Bounds,
    beyond,
    left_out,
    skips,
)
from logitcask.engine.objectives.divergences import DIVERGENCES
from logitcask.engine.objectives.fused import fused, is_fusable
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.policy_gradient import advantage
from logitcask.engine.objectives.support_log_probs import LossTerms, SupportLogProbs, columns_on
from logitcask.engine.objectives.supports import LIVE, SUPPORTS
from logitcask.engine.objectives.tail import OUTSIDE
from logitcask.engine.packing.targets import BEYOND, Targets
from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveGrad, ObjectiveInput


def live_k(objective: Objective, n_vocab: int, *, metric_k: int = METRIC_K) -> int:
    """How many live top ids a RowView must hold for this objective and the metrics."""
    return min(max(objective.live_k, metric_k), n_vocab)


def row_objective(
    objective: Objective,
    targets: Targets,
    *,
    metric_k: int = METRIC_K,
    bounds: Bounds = NO_BOUNDS,
) -> ObjectiveFn:
    """`objective` on the rows of `targets`, as the kernels call it; `view.index` picks the rows.

    With bounds that skip, a row beyond them has loss and gradient 0, and a metric counts it. The
    kernels' k must be `live_k(objective, n_vocab)`; a smaller one raises ObjectiveError.
    """

    def answer(view: ObjectiveInput) -> ObjectiveGrad:
        rows = targets.at(view.index)
        _check_live(objective, view, rows)
        places = rows.places(view.top_ids)
        on = SUPPORTS[objective.support](places, rows, objective.k)
        columns = columns_on(rows, view.log_p, places, view.entropy, on, objective.support)
        made = step_of(objective, columns)
        metrics = row_metrics(view, rows, k=metric_k, places=places)
        if (skip := beyond(objective, metrics, bounds)) is not None:
            metrics[SKIPPED] = skip.to(made.loss.dtype)
            made = left_out(skip, made)
        return made.answer(metrics)

    if is_fusable(objective) and not skips(objective, bounds):
        return fused(objective, targets, answer, metric_k)
    return answer


def step_of(objective: Objective, columns: SupportLogProbs) -> LossTerms:
    """The loss of C rows and its coefficients, modifiers of scope `row` included."""
    seen = columns
    for modifier in objective.modifiers:
        columns = modifier.target(columns)
    if objective.form == "advantage":
        step = advantage(objective.weights, objective.modifiers, columns)
    else:
        divergence, parameter = DIVERGENCES[objective.divergence], objective.parameter or 0.0
        step = OUTSIDE[objective.outside](
            lambda log_p, log_q, on: divergence(log_p, log_q, on, parameter), columns
        )
    for modifier in objective.modifiers:
        step = modifier.step(step, seen)
    return step


def is_renormalised(objective: Objective) -> bool:
    """Whether it sees log p up to a constant of the row, so that its gradient sums to zero over the
    support. Its form proves it: no advantage does so, that of `opd_released` included.
    """
    return (
        objective.form == "divergence"
        and objective.outside == "renormalize"
        and all(modifier.keeps_sum for modifier in objective.modifiers)
    )


def has_known_support(objective: Objective) -> bool:
    """Whether the store alone says which ids it looks at; else the live student has a say."""
    return objective.support not in LIVE


def support_objective(objective: Objective, targets: Targets) -> tuple[Tensor, ObjectiveFn]:
    """A renormalised objective on a known support: the support's ids [P, S], -1 where a row has
    fewer, and the objective on them, without metrics, as indexed_linear calls it.
    """
    nowhere = torch.full_like(targets.ids, BEYOND)
    on = SUPPORTS[objective.support](nowhere, targets, objective.k) & (targets.ids >= 0)
    first = on.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : objective.k]
    narrow = targets.columns(first, on)

    def answer(view: ObjectiveInput) -> ObjectiveGrad:
        rows = narrow.at(view.index)
        places = torch.full_like(rows.ids, BEYOND)
        columns = columns_on(rows, view.log_p, places, view.entropy, rows.ids >= 0)
        return step_of(objective, columns).answer({})

    return narrow.ids, answer


def _check_live(objective: Objective, view: ObjectiveInput, rows: Targets) -> None:
    have = view.top_ids.shape[1]
    # A vocabulary smaller than k is no mistake; there no teacher keeps more than `have` ids.
    if have < objective.live_k and bool((rows.kept > have).any()):
        raise ObjectiveError(
            f"the kernel selects {have} live ids, and the objective needs {objective.live_k}",
            hint="pass k = live_k(objective, n_vocab) to the kernel",
        )
