"""Presets over spans, for a teacher with another tokenizer. With the student's they are as well
defined: every span is one token.
"""

from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.presets.base import Preset
from logitcask.engine.objectives.presets.on_draws import MINUS_A, ON_POLICY


def _over_spans(loss: str, k: int = 1, parameter: float | None = None) -> Objective:
    return Objective(
        support="spans",
        divergence=loss,
        tail="ignore",
        estimator="spans",
        k=k,
        parameter=parameter,
    )


ON_SPANS = (
    Preset(
        name="span_advantage",
        objective=_over_spans("advantage", parameter=0.0),
        source="arXiv 2604.13016, Eq.3, on spans",
        formula="-sg[A(s)] log p(s), s a span, A(s) = log q(s) - log p(s)",
        needs="teacher's log-probs of its own tokens (score with any teacher)",
        staleness=ON_POLICY,
        note="span_advantage(parameter=1) has the whole return and the mean gradient of KL(p || q) "
        "over responses. " + MINUS_A,
    ),
)
