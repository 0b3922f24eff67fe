"""Table of the losses over spans: a function from both models' log-probs to nats for each span."""

from collections.abc import Callable

from torch import Tensor

from logitcask.engine.alignment.span_scores import ENDS, STARTS
from logitcask.engine.objectives.spans.advantage import advantage
from logitcask.engine.objectives.spans.likelihood import alm
from logitcask.engine.objectives.spans.log_probs import SpanLogProbs
from logitcask.engine.objectives.spans.shared_ids import simct, x_token
from logitcask.engine.objectives.spans.sorted_probs import gold, gold_bayesian, uld

SpanLoss = Callable[[SpanLogProbs, int, float], Tensor]
"""(log-probs, k of the objective, its parameter) -> [G] nats, differentiable by log_p."""

SPAN_LOSSES: dict[str, SpanLoss] = {
    "advantage": advantage,
    "alm": alm,
    "uld": uld,
    "gold": gold,
    "gold_bayesian": gold_bayesian,
    "simct": simct,
    "x_token": x_token,
}

SPAN_PARAMETERS = {
    "advantage": ("gamma", 0.0, "[0, 1]"),
    "alm": ("tau", 100.0, "(0, inf]"),
    "gold": ("beta", 0.5, "(0, 1)"),
    "gold_bayesian": ("beta", 0.5, "(0, 1)"),
    "x_token": ("temperature", 1.0, "(0, inf)"),
}
"""Losses with a parameter: its name, the value in its source, and its values."""

SPAN_ROWS = {
    "uld": STARTS,
    "gold": STARTS,
    "gold_bayesian": ENDS,
    "simct": STARTS,
    "x_token": STARTS,
}
"""Losses that read the teacher's ids, and the row of each span that they are of."""

RANKED = ("uld",)
"""Losses that read the best k ids of the current student."""
