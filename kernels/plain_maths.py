"""fused_maths in torch: loss and gradient of an objective on [C, S] log-probs of C rows."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from logitcask.kernels.fused_maths import TAIL_FLOOR

Terms = tuple[Tensor, Tensor]
"""Terms of the loss and their derivatives by log p."""

FLOOR = {torch.float32: float(TAIL_FLOOR.value), torch.float64: 1e-14}
"""Least mass of the student's tail in a bucket, see fused_maths.TAIL_FLOOR."""


def _mixture(log_x: Tensor, share: float, log_y: Tensor) -> Tensor:
    return torch.logaddexp(log_x + math.log(share), log_y + math.log1p(-share))


def _reverse_kl(lp: Tensor, lq: Tensor, _: float) -> Terms:
    term = lp.exp() * (lp - lq)
    return term, term + lp.exp()


def _forward_kl(lp: Tensor, lq: Tensor, _: float) -> Terms:
    q = lq.exp()
    return q * (lq - lp), -q


def _mixed_kl(lp: Tensor, lq: Tensor, b: float) -> Terms:
    of_p, of_q = (1 - b) * lp.exp(), b * lq.exp()
    return (of_q - of_p) * (lq - lp), of_p * (lp - lq + 1) - of_q


def _jsd(lp: Tensor, lq: Tensor, b: float) -> Terms:
    log_m = _mixture(lq, b, lp)
    g = (1 - b) * lp.exp() * (lp - log_m)
    return b * lq.exp() * (lq - log_m) + g, g


def _skew(lp: Tensor, lq: Tensor, b: float) -> Terms:
    log_m, q = _mixture(lq, b, lp), lq.exp()
    return q * (lq - log_m), -q * (lp + math.log1p(-b) - log_m).exp()


def _skew_reverse(lp: Tensor, lq: Tensor, b: float) -> Terms:
    log_n, p = _mixture(lp, b, lq), lp.exp()
    term = p * (lp - log_n)
    return term, term + p * (lq + math.log1p(-b) - log_n).exp()


def _alpha(lp: Tensor, lq: Tensor, b: float) -> Terms:
    p, power = lp.exp(), (b * lq + (1 - b) * lp).exp()
    return (b * lq.exp() + (1 - b) * p - power) / (b * (1 - b)), (p - power) / b


TERMS: dict[str, Callable[[Tensor, Tensor, float], Terms]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "jsd": _jsd,
    "skew": _skew,
    "skew_reverse": _skew_reverse,
    "alpha": _alpha,
    "mixed_kl": _mixed_kl,
}

OUTSIDE_COST: dict[str, Callable[[float], float]] = {
    "forward_kl": lambda _: 0.0,
    "skew": lambda _: 0.0,
    "skew_reverse": lambda b: -math.log(b),
    "jsd": lambda b: -(1 - b) * math.log1p(-b),
    "alpha": lambda b: 1 / b,
}
"""c of fused_maths: nats for a unit of the student's mass where the teacher has none."""


def masked_logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    """Return [C, 1] log sum exp(x) over `mask` [C, S]; -inf for an empty one."""
    return torch.where(mask, x, -torch.inf).logsumexp(-1, keepdim=True)


def row_terms(
    divergence: str,
    b: float,
    tail: str,
    log_p: Tensor,
    log_q: Tensor,
    log_q_tail: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss [C], at_ids [C, S], dense [C] and dense_at_ids [C, S] of an ObjectiveGrad.

    log_q_tail: [C, 1], log of the teacher's mass outside `mask` [C, S].
    """

    def terms(lp: Tensor, lq: Tensor, on: Tensor) -> Terms:
        term, g = TERMS[divergence](torch.where(on, lp, 0.0), torch.where(on, lq, 0.0), b)
        return torch.where(on, term, 0.0), torch.where(on, g, 0.0)

    if tail == "renormalize":
        lp = log_p - masked_logsumexp(log_p, mask)
        term, g = terms(lp, log_q - masked_logsumexp(log_q, mask), mask)
        chained = torch.where(mask, g - lp.exp() * g.sum(-1, keepdim=True), 0.0)
        zero = torch.zeros_like(chained)
        return term.sum(-1), chained, zero.sum(-1), zero
    p = torch.where(mask, log_p.exp(), 0.0)
    r = 1 - p.sum(-1, keepdim=True)
    if tail != "bucket":
        zeroed = tail == "zero"
        term, g = terms(log_p, log_q - masked_logsumexp(log_q, mask) if zeroed else log_q, mask)
        loss = term.sum(-1)
        if zeroed and (cost := OUTSIDE_COST[divergence](b)):
            loss = loss + torch.where(mask.any(-1), cost * r[:, 0], 0.0)
            g = g - cost * p
        dense = -g.sum(-1)
        return loss, g, dense, dense[:, None].expand_as(g)
    r = r.clamp(min=FLOOR[p.dtype])
    # The bucket is left out where the teacher has no mass outside the support at all.
    log_all = torch.logaddexp(masked_logsumexp(log_q, mask), log_q_tail)
    term, g = terms(log_p, log_q - log_all, mask)
    term_r, g_r = terms(r.log(), log_q_tail - log_all, log_q_tail != -torch.inf)
    inside = -(g.sum(-1, keepdim=True) + g_r)
    outside = g_r / r + inside
    return (
        term.sum(-1) + term_r[:, 0],
        g,
        outside[:, 0],
        torch.where(mask, inside, outside),
    )
