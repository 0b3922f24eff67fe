"""Staleness bounds: a warning or an action when the student moved far from the scored data.

Supports that depend on a student are judged by the coverage, the share of the current student's
mass that has a score; draws of a student, those of a term too, by the drift. Fixed supports have no
bound: they are exact at any age. The thresholds are starting values, not yet calibrated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from logitcask.engine.config.training import Train
from logitcask.engine.objectives.modifiers import Importance, Reward
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.supports import CURRENT_SUPPORTS, LossTerms

COVERAGE, DRIFT = "cache/coverage", "cache/approx_kl"
SKIPPED = "cache/skipped_share"
"""Share of the positions without a loss."""
RESAMPLED = "cache/resampled"
"""Units that were sampled again since the last line."""
COVERAGE_WARN = 0.95
DRIFT_WARN = 0.05
"""Nats of approx_kl."""
UNMAPPED, UNMAPPED_WARN = "span/unmapped", 0.5
"""Mass of a teacher with another tokenizer; no matter of staleness."""
_DEFAULTS = Train()


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Bounds of rows (`skip`), or of the mean of an update (`stop`) or a segment (`resample`)."""

    action: Literal["off", "skip", "stop", "resample"] = "off"
    """Beyond them: nothing, give a row no loss (it stays in the divisor), end the run, or (a loop)
    sample the unit again."""
    min_coverage: float = _DEFAULTS.min_coverage
    max_drift: float = _DEFAULTS.max_drift
    """Nats of approx_kl."""


NO_BOUNDS = Bounds()


def bounded_metric(objective: Objective) -> str | None:
    """Return the metric that shows the staleness of this objective, None if it has none."""
    if objective.support in CURRENT_SUPPORTS or objective.support == "student":
        return COVERAGE
    if _draws_drift(objective):
        return DRIFT
    return None if all(term.corrected for term in objective.terms) else DRIFT


def _draws_drift(objective: Objective) -> bool:
    """Return whether the objective, without its terms, takes old draws for those of the student."""
    corrected = any(isinstance(modifier, Importance) for modifier in objective.modifiers)
    drawn = objective.support in ("sampled", "mc") or objective.divergence == "advantage"
    return drawn and not corrected


def _correction(objective: Objective) -> str:
    """Return the text on what else helps against drift."""
    if _draws_drift(objective) and not (objective.over_spans and objective.parameter):
        return ", or add +importance to the objective"
    rewards = [term for term in objective.terms if isinstance(term, Reward)]
    return ", or use reward(importance=true)" if rewards else ""


def skips(objective: Objective, bounds: Bounds) -> bool:
    """Return whether the bounds may skip rows of this objective."""
    return bounds.action == "skip" and bounded_metric(objective) is not None


def rows_to_skip(
    objective: Objective, metrics: Mapping[str, Tensor], bounds: Bounds
) -> Tensor | None:
    """Return [C] bool, the rows beyond the bounds; None if the bounds skip no rows."""
    name = bounded_metric(objective)
    if name is None or not skips(objective, bounds):
        return None
    value = metrics[name]
    # NaN is on neither side: a broken student must show.
    return value < bounds.min_coverage if name == COVERAGE else value > bounds.max_drift


def zero_rows(skip: Tensor, terms: LossTerms) -> LossTerms:
    """Set loss and gradient to zero in the rows of `skip` [C]."""
    parts = (part for part in terms if part is not None)
    return LossTerms(
        *(torch.where(skip.view(-1, *[1] * (part.dim() - 1)), 0.0, part) for part in parts)
    )


def exceeded(
    objective: Objective, metrics: Mapping[str, float | None], bounds: Bounds
) -> str | None:
    """Return the reason that ends a run of action `stop`, None within the bounds."""
    return beyond(objective, metrics, bounds) if bounds.action == "stop" else None


def beyond(objective: Objective, metrics: Mapping[str, float | None], bounds: Bounds) -> str | None:
    """Return how means of rows are beyond the bounds of any action, None within them."""
    name = bounded_metric(objective)
    value = metrics.get(name) if name else None
    if value is None:
        return None
    if name == COVERAGE and value < bounds.min_coverage:
        return f"{COVERAGE} = {value:.3f} is under --min-coverage {bounds.min_coverage}"
    if name == DRIFT and value > bounds.max_drift:
        return f"{DRIFT} = {value:.3f} nats is over --max-drift {bounds.max_drift}"
    return None


def warnings(objective: Objective, metrics: Mapping[str, float | None]) -> list[str]:
    """Return warnings about the metrics of an update with this objective."""
    name = bounded_metric(objective)
    value = metrics.get(name) if name else None
    found = []
    if name == COVERAGE and value is not None and value < COVERAGE_WARN:
        found.append(
            f"{COVERAGE} = {value:.3f}: only that share of the student's mass has a score, and "
            f"under {COVERAGE_WARN} the loss lacks too much of it; "
            "score with a larger --teacher-topk-max, "
            "or sample and score again"
        )
    if name == DRIFT and value is not None and value > DRIFT_WARN:
        found.append(
            f"{DRIFT} = {value:.3f} nats: over {DRIFT_WARN} the drawn ids are no longer draws of "
            f"this student; sample and score again{_correction(objective)}"
        )
    unmapped = metrics.get(UNMAPPED)
    if unmapped is not None and unmapped > UNMAPPED_WARN and objective.divergence != "uld":
        found.append(
            f"{UNMAPPED} = {unmapped:.3f}: that share of the teacher's mass is on tokens that the "
            f"student has none of, and {objective.divergence} compares the rest, which is what the "
            "teacher writes elsewhere; train with span_advantage or alm"
        )
    if skipped := metrics.get(SKIPPED):
        found.append(
            f"{SKIPPED} = {skipped:.3f}: that share of the positions was beyond its bound and gave "
            "no gradient; sample and score again"
        )
    return found
