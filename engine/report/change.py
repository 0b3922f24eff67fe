"""The change of a metric over a run, and whether it is more than noise.

The first and the last updates are compared by the means of two windows. The error of a window is
the larger of two: the reported standard errors of its values (`NAME_se`, from the sample of
positions), and the noise between updates, half the mean square of successive differences (von
Neumann, Annals of Mathematical Statistics 12, 1941), which a slow trend does not enter.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from logitcask.engine.report.runs import step_of

MOST, FEW, PART = 20, 3, 5
"""A window is a fifth of the values, FEW at least where that is at most a third, MOST at most."""
NOISE_FROM = 4
"""Values from which on their noise is estimated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Means of the first and of the last values, in the unit of the metric."""

    before: float
    after: float
    window: int
    """Values in each of the two means."""
    error: float | None
    """Standard error of after - before; None = not known."""

    @property
    def direction(self) -> int:
        """Return 1 for a rise and -1 for a fall of more than two standard errors, else 0."""
        difference = self.after - self.before
        if self.error is None or abs(difference) <= 2 * self.error:
            return 0
        return 1 if difference > 0 else -1


Points = Sequence[tuple[int, float, float | None]]
"""(update, value, its standard error), by update."""


def points_of(lines: Iterable[Mapping[str, Any]], key: str) -> Points:
    """Return the values of a metric that are there."""
    return [
        (step_of(line), float(line[key]), line.get(f"{key}_se"))
        for line in lines
        if line.get(key) is not None
    ]


def change(lines: Iterable[Mapping[str, Any]], key: str) -> Change | None:
    """Return the change of a metric; None with fewer than two values."""
    points = points_of(lines, key)
    if len(points) < 2:
        return None
    window = min(MOST, max(1, len(points) // PART, min(FEW, len(points) // FEW)))
    first, last = points[:window], points[-window:]
    errors = [_reported([*first, *last]), _noise(points, window)]
    known = [error for error in errors if error is not None]
    return Change(
        before=_mean(first),
        after=_mean(last),
        window=window,
        error=max(known) if known else None,
    )


def _mean(points: Points) -> float:
    return sum(value for _, value, _ in points) / len(points)


def _reported(both: Points) -> float | None:
    """Return the standard error of the difference of two means by the reported ones."""
    errors = [error for _, _, error in both if error is not None]
    if len(errors) < len(both):
        return None
    return math.sqrt(sum(error**2 for error in errors)) / (len(both) / 2)


def _noise(points: Points, window: int) -> float | None:
    """Return the same by the noise between updates."""
    if len(points) < NOISE_FROM:
        return None
    values = [value for _, value, _ in points]
    steps = [b - a for a, b in pairwise(values)]
    variance = sum(step**2 for step in steps) / len(steps) / 2
    return math.sqrt(2 * variance / window)
