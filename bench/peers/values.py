"""Made-up rows for the comparison of a formula, and the comparison."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = os.environ["PEER_DEVICE"]


def rows(seed: int, k: int = 16, n_rows: int = 9, n_vocab: int = 500) -> tuple[Tensor, ...]:
    """Return a student's logits [P, V], a teacher's ids and log-probs [P, k], weights [P]."""
    generator = torch.Generator().manual_seed(seed)
    student, noise = (torch.randn(n_rows, n_vocab, generator=generator) * s for s in (3.0, 1.5))
    log_q, ids = (student + noise).log_softmax(-1).topk(k)
    weight = (torch.arange(n_rows) % 4 > 0).float()
    return tuple(t.to(DEVICE) for t in (student, ids, log_q, weight))


def gradient(loss_of: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return a loss [] and its gradient by the logits."""
    z = logits.clone().requires_grad_()
    loss = loss_of(z)
    (grad,) = torch.autograd.grad(loss, z)
    return loss.detach(), grad


def close(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], share: float = 1e-4) -> None:
    """Raise unless loss and gradient agree within a share of the largest entry."""
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=share, atol=share * float(b.abs().max()))
