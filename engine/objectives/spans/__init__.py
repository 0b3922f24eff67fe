"""Losses over spans, for a teacher with another tokenizer."""

from logitcask.engine.objectives.spans.log_probs import SpanLogProbs
from logitcask.engine.objectives.spans.losses import SPAN_LOSSES, SPAN_PARAMETERS

__all__ = ["SPAN_LOSSES", "SPAN_PARAMETERS", "SpanLogProbs"]
