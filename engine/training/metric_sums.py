"""Means of metrics between two logged updates, over packs and processes."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from logitcask.engine.metrics.metrics import COMMON_METRICS
from logitcask.engine.objectives import Bounds, Objective
from logitcask.engine.objectives.bounds import SKIPPED, skips
from logitcask.engine.objectives.evaluate import part_names
from logitcask.engine.objectives.spans.metrics import span_metric_names
from logitcask.engine.packing.targets import Targets
from logitcask.engine.training.pack_loss import PackLoss

AGE, TEACHER_AGE = "cache/age", "cache/teacher_age"


class MetricSums:
    """Weighted sums of metrics: kept on the device, and read once per logged update."""

    def __init__(self, objective: Objective, bounds: Bounds, *, known_ages: bool) -> None:
        """Start at zero. known_ages: the versions of the rollouts count updates of this student."""
        skipped = [SKIPPED] if skips(objective, bounds) else []
        common = span_metric_names(objective) if objective.over_spans else COMMON_METRICS
        self._names = [*common, *skipped, *part_names(objective)]
        self._known_ages = known_ages
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(
        self,
        result: PackLoss,
        targets: Targets,
        version: int,
        teacher_version: int | None = None,
    ) -> None:
        """Add the metrics of a pack.

        version: the student's; teacher_version: of a teacher that follows it.
        """
        weight = targets.weight
        for name, values in result.metrics.items():
            self._add(name, values, weight[result.measured])
        # The age is known for every row, also where metrics are of a share of the rows.
        self._add(AGE, (version - targets.version).to(weight.dtype), weight)
        if teacher_version is not None:
            age = torch.full_like(weight, version - teacher_version)
            self._add(TEACHER_AGE, age, weight)

    def _add(self, name: str, values: Tensor, weight: Tensor) -> None:
        used = weight > 0
        powers = (torch.ones_like(values), values, values**2)
        sums = torch.stack([torch.where(used, weight * power, 0.0).sum() for power in powers])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def take(self) -> dict[str, list[float]]:
        """Return and reset the sums of this process."""
        sums, self._sums = self._sums, {}
        return {name: each.tolist() for name, each in sums.items()}

    def reduce(
        self, everyone: Sequence[Mapping[str, Sequence[float]]]
    ) -> tuple[dict[str, float | None], int]:
        """Return (name -> mean over rows, number of rows) of the sums of all processes.

        Every metric has a key, also where no row has a value of it.
        """
        # A process whose packs were all empty has no names.
        names = dict.fromkeys(name for sums in everyone for name in sums)
        totals = {
            name: [
                sum(part) for part in zip(*(s[name] for s in everyone if name in s), strict=True)
            ]
            for name in names
        }
        rows, ages, _ = totals.pop(AGE, [0.0, 0.0, 0.0])
        means: dict[str, float | None] = dict.fromkeys(self._names)
        means[AGE] = _finite(ages / rows) if self._known_ages and rows else None
        for name, (n, total, squares) in totals.items():
            mean = total / n if n else math.nan
            means[name] = _finite(mean)
            if n < rows:
                # The standard error of a sample without replacement.
                variance = max(squares / n - mean**2, 0.0) if n else math.nan
                error = math.sqrt(variance / n * (1 - n / rows)) if n else math.nan
                means[f"{name}_se"] = _finite(error)
        # The weights of several teachers sum to 1 up to rounding.
        return means, round(rows)


def _finite(value: float) -> float | None:
    """Return None for a value that JSON cannot hold."""
    return value if math.isfinite(value) else None
