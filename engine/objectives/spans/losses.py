"""Table of the losses over spans: a function from both models' log-probs to nats for each span."""

from collections.abc import Callable

from torch import Tensor

from logitcask.engine.objectives.spans.advantage import advantage
from logitcask.engine.objectives.spans.log_probs import SpanLogProbs

SpanLoss = Callable[[SpanLogProbs, int, float], Tensor]
"""(log-probs, k of the objective, its parameter) -> [G] nats, differentiable by log_p."""

SPAN_LOSSES: dict[str, SpanLoss] = {"advantage": advantage}

SPAN_PARAMETERS = {"advantage": ("gamma", 0.0, "[0, 1]")}
"""Losses with a parameter: its name, the value in its source, and its values."""
