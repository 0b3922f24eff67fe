"""Divergences of two rows of log-probs. p is the student, q the teacher.

Reverse KL averages over p and seeks a mode of q; forward KL averages over q and covers it.

Each is an f-divergence, sum q f(p / q) with f convex and f(1) = 0. On a part S of the ids alone,
of teacher's mass m < 1, the sum is bounded below, and f decides where it is least:

    forward_kl    f = -log c                         falls: at p = q / m, m log m
    skew          f = -log(a + (1 - a) c)            falls: at p = q / m, -m log(a + (1 - a) / m)
    jsd, alpha    f'(1) = 0                          at p = q on S, 0, and any p outside it
    reverse_kl    f = c log c                        at p = q / e, -m / e: mass leaves S
    skew_reverse  f = c log(c / (a c + 1 - a))       at p < q: mass leaves S
    mixed_kl      f = -w log c + (1 - w) c log c     at p < q for w < 1/2, at p > q for w > 1/2

So the first four have a meaning without the mass outside: TRUNCATED. A teacher that has no mass
outside S at all makes the student's mass there cost f'(inf) each: OUTSIDE_COST.
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


def mixed_kl(log_p: Tensor, log_q: Tensor, mask: Tensor, weight: float) -> Tensor:
    """Return weight KL(q || p) + (1 - weight) KL(p || q), NeMo-RL's mixed kl_type."""
    terms = (weight * log_q.exp() - (1 - weight) * log_p.exp()) * (log_q - log_p)
    return torch.where(mask, terms, 0.0).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p.

    GKD, arXiv 2306.13649. Divided by beta it tends to KL(q || p) for beta -> 0, divided by 1 - beta
    to KL(p || q) for beta -> 1.
    """
    log_m = _log_mixture(log_q, beta, log_p)
    terms = beta * log_q.exp() * (log_q - log_m) + (1 - beta) * log_p.exp() * (log_p - log_m)
    return torch.where(mask, terms, 0.0).sum(-1)


def skew(log_p: Tensor, log_q: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """Return KL(q || alpha q + (1 - alpha) p) <= -log alpha (skew KL, arXiv 2402.03898)."""
    log_m = _log_mixture(log_q, alpha, log_p)
    return torch.where(mask, log_q.exp() * (log_q - log_m), 0.0).sum(-1)


def skew_reverse(log_p: Tensor, log_q: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """Return KL(p || alpha p + (1 - alpha) q) <= -log alpha (skew reverse KL, arXiv 2402.03898)."""
    log_m = _log_mixture(log_p, alpha, log_q)
    return torch.where(mask, log_p.exp() * (log_p - log_m), 0.0).sum(-1)


def alpha(log_p: Tensor, log_q: Tensor, mask: Tensor, a: float) -> Tensor:
    """Return sum [a q + (1 - a) p - q^a p^(1 - a)] / (a (1 - a)), Amari's alpha-divergence.

    It tends to KL(q || p) for a -> 1 and to KL(p || q) for a -> 0; 1/2 gives 4 (1 - sum sqrt(q p)).
    With both sums 1 it is (1 - sum q^a p^(1 - a)) / (a (1 - a)); this form has no term below 0.
    """
    terms = a * log_q.exp() + (1 - a) * log_p.exp() - (a * log_q + (1 - a) * log_p).exp()
    return torch.where(mask, terms / (a * (1 - a)), 0.0).sum(-1)


def _log_mixture(log_x: Tensor, share: float, log_y: Tensor) -> Tensor:
    return torch.logaddexp(log_x + math.log(share), log_y + math.log1p(-share))


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "skew": skew,
    "skew_reverse": skew_reverse,
    "alpha": alpha,
    "mixed_kl": mixed_kl,
}

PARAMETERS = {
    "jsd": ("beta", 0.5),
    "skew": ("alpha", 0.1),
    "skew_reverse": ("alpha", 0.1),
    "alpha": ("alpha", 0.5),
    "mixed_kl": ("weight", 0.5),
}
"""Divergences with a parameter in (0, 1): its name, and the value in its source."""

TRUNCATED = ("forward_kl", "skew", "jsd", "alpha")
"""Divergences whose sum over a part of the ids has its minimum at the teacher there, see above."""

OUTSIDE_COST: dict[str, Callable[[float], float]] = {
    "forward_kl": lambda _: 0.0,
    "skew": lambda _: 0.0,
    "skew_reverse": lambda alpha: -math.log(alpha),
    "jsd": lambda beta: -(1 - beta) * math.log1p(-beta),
    "alpha": lambda a: 1 / a,
}
"""Nats for a unit of the student's mass at ids where the teacher has none; infinite in others."""
