"""Divergences of two rows of log-probs. p is the student, q the teacher.

Reverse KL averages over p and seeks a mode of q; forward KL averages over q and covers it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(log_p, log_q [C, S], finite everywhere; mask [C, S] bool, the columns that count; the parameter
of the divergence, for those in PARAMETERS) -> [C] nats."""


def reverse_kl(log_p: Tensor, log_q: Tensor, mask: Tensor, _: float = 0.0) -> Tensor:
    """Return KL(p || q) = sum p (log p - log q)."""
    return torch.where(mask, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor, mask: Tensor, _: float = 0.0) -> Tensor:
    """Return KL(q || p) = sum q (log q - log p)."""
    return torch.where(mask, log_q.exp() * (log_q - log_p), 0.0).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p.

    GKD, arXiv 2306.13649. Divided by beta it tends to KL(q || p) for beta -> 0, divided by 1 - beta
    to KL(p || q) for beta -> 1.
    """
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    terms = beta * log_q.exp() * (log_q - log_m) + (1 - beta) * log_p.exp() * (log_p - log_m)
    return torch.where(mask, terms, 0.0).sum(-1)


def skew(log_p: Tensor, log_q: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """Return KL(q || alpha q + (1 - alpha) p) <= -log alpha (skew KL, arXiv 2402.03898)."""
    log_m = torch.logaddexp(log_q + math.log(alpha), log_p + math.log1p(-alpha))
    return torch.where(mask, log_q.exp() * (log_q - log_m), 0.0).sum(-1)


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "skew": skew,
}

PARAMETERS = {"jsd": ("beta", 0.5), "skew": ("alpha", 0.1)}
"""Divergences with a parameter in (0, 1): its name, and the value in its source."""
