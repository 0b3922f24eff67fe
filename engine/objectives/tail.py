"""The teacher's and the student's mass outside the support: it decides a loss's gradient.

With g_v = dL / d log p_v, and a tail bucket r = 1 - sum_S p with g_r = dL / d log r:

    no bucket  dL/dz_v = g_v [v in S] - (sum g) p_v
    bucket     dL/dz_v = g_v - (sum g + g_r) p_v              v in S
                       = (g_r / r - sum g - g_r) p_v          elsewhere

The terms near 1/r are only where they belong: for forward KL dL/dz_v is exactly p_v - q_v on S.
Gradients come from autograd on [C, S] tensors: a divergence is its formula and nothing else.

`zero` and `ignore` cut the teacher to S. `zero` renormalises it there, and the student's mass
outside costs what the divergence says; `ignore` leaves the teacher's mass m < 1 as it is and drops
all terms outside. For forward KL, with q~ = q / m,

    zero      KL(q~ || p)                     dL/dz_v = p_v - q~_v [v in S]
    ignore    m KL(q~ || p) + m log m         dL/dz_v = m p_v - q_v [v in S]

so both pull the student to q~, not to q.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from logitcask.engine.metrics.metrics import renormalised
from logitcask.engine.objectives.supports import LossTerms, SupportLogProbs
from logitcask.kernels import fused_maths

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A divergence whose parameter is bound: (log_p, log_q, mask) -> [C]."""

TAIL_FLOOR = {torch.float32: float(fused_maths.TAIL_FLOOR.value), torch.float64: 1e-14}
"""Least r of a bucket, about the error of 1 - sum p: log p = z - log-sum-exp is rounded at the size
of z, and 2^-18 is float32's spacing between 32 and 64.

Below it log r is clamped, the gradient on S does not change, and the pull on the ids outside,
p_v (g_r / r - ...), is weaker than the true one. With a lower floor, rounding could make it many
times stronger: g_r is the teacher's tail, and r may be 10 times smaller than its rounding error.
"""


def renormalize(divergence: Measure, inputs: SupportLogProbs, _: float = 0.0) -> LossTerms:
    """Return D(p~, q~), both renormalised on S, so sum g = 0 exactly."""
    log_q = renormalised(inputs.log_q, inputs.mask)
    loss, g = _derive(
        lambda log_p: divergence(renormalised(log_p, inputs.mask), log_q, inputs.mask), inputs.log_p
    )
    return LossTerms(loss, g, torch.zeros_like(loss), torch.zeros_like(g))


def bucket(divergence: Measure, inputs: SupportLogProbs, _: float = 0.0) -> LossTerms:
    """Return D of both distributions coarsened to S and one bucket: a lower bound of the full D.

    The bucket is one more column. It is left out where the teacher has no mass outside S at all.
    """
    mask = inputs.mask
    p = torch.where(mask, inputs.log_p.exp(), 0.0)
    r = (1 - p.sum(-1, keepdim=True)).clamp(min=TAIL_FLOOR[p.dtype])
    log_q_tail = inputs.log_q_tail[:, None]
    mask_all = torch.cat([mask, log_q_tail != -torch.inf], -1)
    log_p_all = torch.where(mask_all, torch.cat([inputs.log_p, r.log()], -1), 0.0)
    log_q_all = torch.where(mask_all, torch.cat([inputs.log_q, log_q_tail], -1), -torch.inf)
    # Stored log-probs are rounded, so their mass with the tail is 1 within 1e-4: normalise it.
    log_q_all = torch.where(mask_all, log_q_all - log_q_all.logsumexp(-1, keepdim=True), 0.0)
    loss, g_all = _derive(lambda log_p: divergence(log_p, log_q_all, mask_all), log_p_all)
    at_ids, g_r = g_all[:, :-1], g_all[:, -1:]
    inside = -g_all.sum(-1, keepdim=True)
    outside = g_r / r + inside
    return LossTerms(loss, at_ids, outside[:, 0], torch.where(mask, inside, outside))


def zero(divergence: Measure, inputs: SupportLogProbs, outside_cost: float) -> LossTerms:
    """Return D(p, q~), the teacher renormalised on S, the student over the whole vocabulary.

    outside_cost: nats for each unit of the student's mass outside S, see divergences.OUTSIDE_COST.
    """
    mask = inputs.mask
    log_q = torch.where(mask, renormalised(inputs.log_q, mask), 0.0)

    def loss_of(log_p: Tensor) -> Tensor:
        inside = torch.where(mask, log_p, -torch.inf).exp().sum(-1)
        outside = torch.where(mask.any(-1), outside_cost * (1 - inside), 0.0)
        return divergence(torch.where(mask, log_p, 0.0), log_q, mask) + outside

    return LossTerms.of_log_p(*_derive(loss_of, inputs.log_p))


def ignore(divergence: Measure, inputs: SupportLogProbs, _: float = 0.0) -> LossTerms:
    """Return the sum over S alone, of the log-probs as they are: see divergences.TRUNCATED.

    On the teacher's draws it is the mean of log q - log p, which is unbiased for KL(q || p) (RS-KD,
    arXiv 2503.16870).
    """
    mask = inputs.mask
    if inputs.support != "teacher_mc":
        log_q = torch.where(mask, inputs.log_q, 0.0)
        return LossTerms.of_log_p(
            *_derive(
                lambda log_p: divergence(torch.where(mask, log_p, 0.0), log_q, mask), inputs.log_p
            )
        )
    counts = inputs.rows.require("q_draws").to(inputs.log_p.dtype)
    w = torch.where(mask, counts / counts.sum(-1, keepdim=True).clamp(min=1), 0.0)
    loss = torch.where(mask, w * (inputs.log_q - inputs.log_p), 0.0).sum(-1)
    return LossTerms.of_log_p(loss, -w)


TAILS: dict[str, Callable[[Measure, SupportLogProbs, float], LossTerms]] = {
    "renormalize": renormalize,
    "bucket": bucket,
    "zero": zero,
    "ignore": ignore,
}


def _derive(loss_of: Callable[[Tensor], Tensor], log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss [C] and its derivative by log_p [C, S]; kernels call it with gradients off."""
    with torch.enable_grad():
        leaf = log_p.detach().requires_grad_()
        loss = loss_of(leaf)
        (g,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), g
