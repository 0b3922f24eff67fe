"""How two rows of log-probs are compared. p is the student, q the teacher; the order is the point:
reverse KL averages over p and seeks a mode of q, forward KL averages over q and covers it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(log_p, log_q [C, S], finite everywhere; on [C, S] bool, the columns that count) -> [C] nats."""


def reverse_kl(log_p: Tensor, log_q: Tensor, on: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q)."""
    return torch.where(on, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor, on: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p)."""
    return torch.where(on, log_q.exp() * (log_q - log_p), 0.0).sum(-1)


DIVERGENCES: dict[str, Divergence] = {"reverse_kl": reverse_kl, "forward_kl": forward_kl}
