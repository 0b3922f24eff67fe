"""What a loss does with the mass outside its support decides its gradient.

With g_v = dL / d log p_v, and a tail bucket r = 1 - sum_S p with g_r = dL / d log r:

    no tail    dL/dz_v = g_v [v in S] - (sum g) p_v
    tail       dL/dz_v = g_v - (sum g + g_r) p_v              v in S
                       = (g_r / r - sum g - g_r) p_v          elsewhere

The terms near 1/r are only where they belong: for forward KL dL/dz_v is exactly p_v - q_v on S.
Gradients come from autograd on [C, S] tensors: a divergence is its formula and nothing else.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from logitcask.engine.metrics.metrics import renormalised
from logitcask.engine.objectives.supports import LossTerms, SupportLogProbs
from logitcask.kernels import fused_maths

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A divergence with its parameter given: (log_p, log_q, on) -> [C]."""

TAIL_FLOOR = {torch.float32: float(fused_maths.TAIL_FLOOR.value), torch.float64: 1e-14}
"""Least r that a tail is given, about the error of 1 - sum p: log p = z - log-sum-exp is rounded at
the size of z, and 2^-18 is float32's spacing between 32 and 64.

Below it the loss sees log r no further down, on S the gradient stays as it is, and the pull on the
ids outside, p_v (g_r / r - ...), is weaker than the true one. A lower floor would let rounding make
it many times stronger: g_r is the teacher's tail, and r may be 10 times what is left of it.
"""


def renormalize(divergence: Measure, columns: SupportLogProbs) -> LossTerms:
    """D(p~, q~), both renormalised on S. It does not see the mass on S, so sum g = 0 exactly."""
    log_q = renormalised(columns.log_q, columns.on)
    loss, g = _derive(
        lambda log_p: divergence(renormalised(log_p, columns.on), log_q, columns.on), columns.log_p
    )
    return LossTerms(loss, g, torch.zeros_like(loss), torch.zeros_like(g))


def tail(divergence: Measure, columns: SupportLogProbs) -> LossTerms:
    """D of the two distributions coarsened to S and one bucket; a lower bound of the full D.

    The bucket is one more column. It is left out where the teacher has no mass outside S at all.
    """
    on = columns.on
    p = torch.where(on, columns.log_p.exp(), 0.0)
    r = (1 - p.sum(-1, keepdim=True)).clamp(min=TAIL_FLOOR[p.dtype])
    log_q_tail = columns.log_q_outside[:, None]
    on_all = torch.cat([on, log_q_tail != -torch.inf], -1)
    log_p_all = torch.where(on_all, torch.cat([columns.log_p, r.log()], -1), 0.0)
    log_q_all = torch.where(on_all, torch.cat([columns.log_q, log_q_tail], -1), -torch.inf)
    # Stored log-probs are rounded: their mass with the tail is 1 to some 1e-4, and a law's is 1.
    log_q_all = torch.where(on_all, log_q_all - log_q_all.logsumexp(-1, keepdim=True), 0.0)
    loss, g_all = _derive(lambda log_p: divergence(log_p, log_q_all, on_all), log_p_all)
    at_ids, g_r = g_all[:, :-1], g_all[:, -1:]
    inside = -g_all.sum(-1, keepdim=True)
    outside = g_r / r + inside
    return LossTerms(loss, at_ids, outside[:, 0], torch.where(on, inside, outside))


def ignore(_: Measure, columns: SupportLogProbs) -> LossTerms:
    """Mean of log q - log p over the teacher's draws: unbiased for KL(q || p) (RS-KD, arXiv
    2503.16870). Other supports are no law without what is outside, see CELLS.
    """
    on = columns.on
    count = columns.rows.held("q_draws").to(columns.log_p.dtype)
    w = torch.where(on, count / count.sum(-1, keepdim=True).clamp(min=1), 0.0)
    loss = torch.where(on, w * (columns.log_q - columns.log_p), 0.0).sum(-1)
    return LossTerms.of_log_p(loss, -w)


OUTSIDE: dict[str, Callable[[Measure, SupportLogProbs], LossTerms]] = {
    "renormalize": renormalize,
    "tail": tail,
    "ignore": ignore,
}


def _derive(loss_of: Callable[[Tensor], Tensor], log_p: Tensor) -> tuple[Tensor, Tensor]:
    """loss [C] and its derivative by log_p [C, S]; the kernels call with gradients off."""
    with torch.enable_grad():
        leaf = log_p.detach().requires_grad_()
        loss = loss_of(leaf)
        (g,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), g
