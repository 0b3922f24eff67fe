"""SimCT and X-Token's P-KL: ids of equal bytes at the start of each span.

SimCT, arXiv 2605.07711; KDFlow, algorithms/span_ctkd.py: KL(p~ || q~) on the shared ids and the
span itself as one more, renormalised on these. The source's entries are raw logits, of the span
their mean over its tokens. A row's logits have a free constant, so that value changes with a shift
of one row's logits. Here they are log-probs: at the shared ids those of the span's first row, of
the span the *sum* over its tokens, the log-prob that the model writes it. A mean would be of no
event. Shared ids are those of the columns, not of the vocabularies. A first token that is shared
stays an entry next to its span, as in the source.

X-Token, arXiv 2605.21699; NeMo-RL, loss_functions.py, _compute_p_kl: T^2 KL(q~ || p~) at
temperature T, the student projected to the teacher's ids. Here the ids are the columns of the
span's own row, not the best of a batch; the projection is the map of equal bytes, without its
weights for ids that the teacher splits; and the values are those of the first row, not means over
the rows of a span. So it is another loss under that name.
"""

import torch
from torch import Tensor

from logitcask.engine.metrics.metrics import renormalised
from logitcask.engine.objectives.divergences import forward_kl, reverse_kl
from logitcask.engine.objectives.spans.log_probs import SpanLogProbs


def simct(x: SpanLogProbs, _: int, __: float) -> Tensor:
    """Return [G] KL(p~ || q~) on the shared ids and the span."""
    at = x.at(x.first)
    column = torch.arange(at.log_p.shape[1], device=at.log_p.device)
    is_span = (column == x.rows.token_col[x.first][:, None]) & (x.tokens == 1)[:, None]
    shared = at.shared & ~is_span
    mask = torch.cat([shared, torch.ones_like(shared[:, :1])], 1)
    log_p, log_q = (
        renormalised(torch.cat([torch.where(shared, y, 0.0), span[:, None]], 1), mask)
        for y, span in ((at.log_p, x.student), (at.log_q, x.teacher))
    )
    return reverse_kl(log_p, log_q, mask)


def x_token(x: SpanLogProbs, _: int, temperature: float) -> Tensor:
    """Return [G] T^2 KL(q~ || p~) on the shared ids, both at p^(1 / T)."""
    at = x.at(x.first)
    log_p, log_q = (
        renormalised(torch.where(at.shared, y, 0.0) / temperature, at.shared)
        for y in (at.log_p, at.log_q)
    )
    return temperature**2 * forward_kl(log_p, log_q, at.shared)
