"""Metrics of rows whose teacher has another tokenizer."""

import torch
from torch import Tensor

from logitcask.engine.alignment.span_scores import ENDS
from logitcask.engine.metrics.metrics import LOG_RATIO_BOUND
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.spans.log_probs import SpanLogProbs
from logitcask.engine.objectives.spans.losses import SPAN_ROWS
from logitcask.engine.objectives.spans.sorted_probs import uld_bounds


def span_metric_names(objective: Objective) -> tuple[str, ...]:
    """Return the names of span_metrics."""
    reads = objective.divergence in SPAN_ROWS
    return (
        *("span/reverse_kl", "span/one_to_one", "span/gap"),
        *("nll/student", "entropy/student", "cache/approx_kl"),
        *(("span/unmapped", "span/tail") if reads else ()),
        *(("span/uld_width",) if objective.divergence == "uld" else ()),
    )


def span_metrics(x: SpanLogProbs, entropy: Tensor, objective: Objective) -> dict[str, Tensor]:
    """Return name -> [P] of log-probs without a gradient; a value of a span is shared by its rows.

    entropy: [P] of the student, nats.

    span/reverse_kl   (log p - log q) of the span for each token of the student, nats
    span/one_to_one   1 in a span of one token on both sides
    span/gap          1 in no span
    span/unmapped     teacher's mass at stored ids that the student has no token of
    span/tail         its mass outside all stored ids; both for losses that read its ids
    span/uld_width    upper bound minus lower bound of the sorted L1 distance, for uld
    """
    dtype = x.log_p.dtype
    one = (x.tokens == 1) & (x.rows.require("span_tokens")[x.first] == 1)
    log_r = (x.token_log_p - x.rows.student_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    found = {
        "span/reverse_kl": of_rows(x, (x.student - x.teacher) / x.tokens),
        "span/one_to_one": of_rows(x, one.to(dtype)),
        "span/gap": (x.span == x.count).to(dtype),
        "nll/student": -x.token_log_p,
        "entropy/student": entropy,
        "cache/approx_kl": log_r.exp() - 1 - log_r,
    }
    if objective.divergence in SPAN_ROWS:
        row = x.last if SPAN_ROWS[objective.divergence] == ENDS else x.first
        at = x.at(row)
        found["span/unmapped"] = of_rows(x, torch.where(at.theirs, at.log_q.exp(), 0.0).sum(1))
        found["span/tail"] = of_rows(x, x.rows.q_log_tail[row].to(dtype).exp())
    if objective.divergence == "uld":
        found["span/uld_width"] = of_rows(x, uld_bounds(x, objective.k)[1])
    return found


def of_rows(x: SpanLogProbs, values: Tensor) -> Tensor:
    """Return [P] of values [G]; 0 for rows in no span."""
    return torch.cat([values, values.new_zeros(1)])[x.span]
