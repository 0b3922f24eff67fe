"""The updates and the positions that metrics are taken of, where the loss needs no whole rows.

There a metric costs a product with the whole head, and the loss some tens of its rows: a position
with metrics takes the time of some hundred positions without. So by default an update has metrics
of about ROWS positions, of which a metric's mean has a standard error of 0.18 of its deviation
(`NAME_se` in metrics.jsonl has it), and only one update in several has them. The first and the last
update have more, because summaries and cards show them.
"""

from dataclasses import dataclass

from logitcask.engine.config.training import Train

ROWS = 32
"""Positions of an update with metrics."""
STEPS, POINTS = 40, 20
"""Most updates from one with metrics to the next; fewer in runs that would have fewer POINTS."""
SHARE = 1 / 16
"""Share of the positions of the first and the last update, and of each where a bound ends runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSampling:
    """The choice for a run of so many updates."""

    fraction: float | None
    """Share of the positions; None = as above."""
    steps: int
    """Updates from one with metrics to the next."""
    updates: int

    def is_due(self, update: int) -> bool:
        """Return whether update 0, 1, ... has metrics: the first, each `steps` on, the last."""
        return update % self.steps == 0 or update == self.updates - 1

    def share(self, update: int, rows: float) -> float:
        """Return the share of the `rows` positions of an update that metrics are taken of."""
        if not self.is_due(update):
            return 0.0
        if self.fraction is not None:
            return self.fraction
        least = SHARE if update in (0, self.updates - 1) else 0.0
        return min(1.0, max(least, ROWS / max(rows, 1.0)))


def metric_sampling(settings: Train, updates: int) -> MetricSampling:
    """Return the sampling of a run; a bound that ends runs needs every update."""
    fraction, steps = settings.metrics_fraction, settings.metrics_steps
    stops = settings.staleness_action == "stop"
    if stops and fraction is None:
        fraction = SHARE
    if steps is None:
        every = stops or fraction is not None
        steps = 1 if every else min(STEPS, max(1, updates // POINTS))
    return MetricSampling(fraction=fraction, steps=steps, updates=updates)
