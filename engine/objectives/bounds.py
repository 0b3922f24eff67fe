"""How far the student may move from what was scored: said as a warning, or enforced.

Supports in which a student has a say watch how much of the live student's mass has a score; draws
of a student watch its drift. Fixed supports watch nothing: they are exact at any age. The numbers
are starting values, not yet calibrated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from logitcask.engine.objectives.modifiers import Importance
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.support_log_probs import LossTerms
from logitcask.engine.objectives.supports import LIVE

COVERAGE, DRIFT = "cache/coverage", "cache/drift_k3"
SKIPPED = "cache/skipped_share"
"""Share of the positions whose loss was left out."""
COVERAGE_WARN = 0.95
DRIFT_WARN = 0.05
"""Nats of k3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Hard bounds, of single rows or of an update's mean."""

    action: Literal["off", "skip", "stop"] = "off"
    """Beyond them: nothing, leave a row's loss out (it stays in the divisor), or end the run."""
    min_coverage: float = 0.80
    max_drift: float = 0.2


NO_BOUNDS = Bounds()


def watched(objective: Objective) -> str | None:
    """The metric that says whether this objective still sees what it should."""
    if objective.support in LIVE or objective.support == "student":
        return COVERAGE
    corrected = any(isinstance(modifier, Importance) for modifier in objective.modifiers)
    if objective.support in ("sampled", "mc") and not corrected:
        return DRIFT
    return None


def skips(objective: Objective, bounds: Bounds) -> bool:
    """Whether rows of this objective may be left out."""
    return bounds.action == "skip" and watched(objective) is not None


def beyond(objective: Objective, metrics: Mapping[str, Tensor], bounds: Bounds) -> Tensor | None:
    """[C] bool, the rows to be left out; None where no row is ever."""
    name = watched(objective)
    if name is None or not skips(objective, bounds):
        return None
    value = metrics[name]
    # NaN is on neither side: a broken student must show.
    return value < bounds.min_coverage if name == COVERAGE else value > bounds.max_drift


def left_out(skip: Tensor, step: LossTerms) -> LossTerms:
    """Zero in the rows of `skip` [C]."""
    parts = (part for part in step if part is not None)
    return LossTerms(
        *(torch.where(skip.view(-1, *[1] * (part.dim() - 1)), 0.0, part) for part in parts)
    )


def exceeded(
    objective: Objective, metrics: Mapping[str, float | None], bounds: Bounds
) -> str | None:
    """What ends a run that stops at a bound; for a person."""
    name = watched(objective)
    value = metrics.get(name) if name else None
    if bounds.action != "stop" or value is None:
        return None
    if name == COVERAGE and value < bounds.min_coverage:
        return f"{COVERAGE} = {value:.3f} is under --min-coverage {bounds.min_coverage}"
    if name == DRIFT and value > bounds.max_drift:
        return f"{DRIFT} = {value:.3f} nats is over --max-drift {bounds.max_drift}"
    return None


def warnings(objective: Objective, metrics: Mapping[str, float | None]) -> list[str]:
    """What the metrics of an update say against this objective on this cache; for a person."""
    name = watched(objective)
    value = metrics.get(name) if name else None
    found = []
    if name == COVERAGE and value is not None and value < COVERAGE_WARN:
        found.append(
            f"{COVERAGE} = {value:.3f}: only that share of the student's mass has a score, and "
            f"under {COVERAGE_WARN} the loss sees too little of it; score with a "
            f"larger --teacher-topk-max, "
            "or sample and score again"
        )
    if name == DRIFT and value is not None and value > DRIFT_WARN:
        found.append(
            f"{DRIFT} = {value:.3f} nats: over {DRIFT_WARN} the drawn ids are no longer draws of "
            "this student; sample and score again, or add +importance to the objective"
        )
    if skipped := metrics.get(SKIPPED):
        found.append(
            f"{SKIPPED} = {skipped:.3f}: that share of the positions was beyond its bound and gave "
            "no gradient; rescore: sample and score again"
        )
    return found
