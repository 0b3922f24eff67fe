"""An objective as the kernels compute it themselves on a GPU, where its form is one that they know.

The same numbers as row_objective's: `plain` is its answer, which runs everywhere else.
"""

import torch
from torch import Tensor

from logitcask.engine.metrics.metrics import summed_metrics
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.supports import SUPPORTS
from logitcask.engine.packing.targets import Targets
from logitcask.kernels import fused_objective
from logitcask.kernels.fused_objective import FusedObjective, OverlapSums
from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveInput


def is_fusable(objective: Objective) -> bool:
    """Whether its loss is a divergence that the kernels know, of columns that a mask, or a mask and
    the live top-k, pick; modifiers that weigh whole rows are none of its business.
    """
    return (
        objective.form == "divergence"
        and objective.divergence in fused_objective.DIVERGENCES
        and objective.outside in fused_objective.OUTSIDE
        and objective.support in ("teacher", "student", "overlap")
        and all(modifier.scope != "row" for modifier in objective.modifiers)
    )


def fused(
    objective: Objective, targets: Targets, plain: ObjectiveFn, metric_k: int
) -> FusedObjective:
    """`plain` with its fused form. The objective is_fusable."""

    def named(view: ObjectiveInput, sums: OverlapSums) -> dict[str, Tensor]:
        return summed_metrics(view, sums, targets.at(view.index))

    best = torch.zeros_like(targets.ids)  # as if every id led the live top-k
    return FusedObjective(
        plain=plain,
        divergence=objective.divergence,
        parameter=objective.parameter or 0.5,
        outside=objective.outside,
        log_q=targets.q_log_p,
        log_tail=targets.q_log_tail,
        on=SUPPORTS[objective.support](best, targets, objective.k),
        known=targets.cached,
        live_k=objective.live_k,
        q_rank=targets.q_rank,
        kept=targets.kept,
        metric_k=metric_k,
        name_metrics=named,
    )
