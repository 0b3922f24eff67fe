"""Error of a loss of bfloat16 logits against float64: ours, and log-probs in the logits' dtype.

Run: .venv/bin/python bench/bf16_loss.py

Forward KL renormalized on the teacher's K ids. Printed is the largest error of a row, in nats.
"""

import torch
from torch import Tensor

from logitcask.kernels.fused_objective import FusedObjective
from logitcask.kernels.sparse_kl import sparse_kl

ROWS = 64
SIZES = ((4_096, 16), (32_000, 64))


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return [P] the KL of log-probs [P, K], each renormalized on the K."""
    p, q = log_p.log_softmax(1), log_q.log_softmax(1)
    return (q.exp() * (q - p)).sum(1).double()


def errors(n_vocab: int, k: int) -> tuple[float, float]:
    """Return the largest error of a row: of ours, and of log-probs in bfloat16."""
    torch.manual_seed(0)
    z = (3 * torch.randn(ROWS, n_vocab)).bfloat16()
    teacher = (z.float() + torch.randn(ROWS, n_vocab)).log_softmax(1)
    log_q, ids = teacher.topk(k)
    every = torch.ones_like(ids, dtype=torch.bool)
    objective = FusedObjective(
        divergence="forward_kl",
        tail="renormalize",
        log_q=log_q,
        log_tail=torch.zeros(ROWS),  # a renormalized loss does not read it
        mask=every,
        known=every,
        q_rank=torch.arange(k).expand_as(ids).contiguous(),
        n_kept=torch.full((ROWS,), k),
    )
    ours = sparse_kl(z.clone().requires_grad_(), ids, objective, k=k).row_loss.double()
    exact = forward_kl(z.double().log_softmax(1).gather(1, ids), log_q.double())
    half = forward_kl(z.log_softmax(1).gather(1, ids), log_q.bfloat16())
    return float((ours - exact).abs().max()), float((half - exact).abs().max())


def main() -> None:
    """Print both errors at each size."""
    for n_vocab, k in SIZES:
        ours, half = errors(n_vocab, k)
        print(f"V={n_vocab} K={k}: ours {ours:.1e}, log-probs in bfloat16 {half:.1e}")


if __name__ == "__main__":
    main()
