"""The best plain torch that a reader of this file would write for each task of the benchmark.

Closed forms in place of autograd through [T, V], a few rows at a time in buffers that stay in
cache, no softmax that a renormalized loss does without, and a gradient of the head as rows where
the optimizer takes it. Our kernels are compared with these first.
"""

import torch
from kernel_calls import Call, Make, Results, leaves
from kernel_losses import LOSSES, SMALLEST_TAIL, Teacher, metrics, plain_reverse_kl
from kernel_shapes import Case
from torch import Tensor
from torch.nn import functional as F

CACHED_LOGITS = 1 << 18
"""Logits of a chunk of rows on a CPU; on a GPU all rows are one chunk."""
HEAD_LOGITS = 1 << 26
"""Logits of a chunk of rows before the products with the head."""


def gathered(*, frozen: bool = False, sparse: bool = False) -> Make:
    """Return calls by the head's rows at K ids as [T, K, H], a batched product and autograd.

    sparse: with the head's gradient as rows, which are not yet summed by id.
    """

    def make(case: Case) -> Call:
        def call() -> Results:
            inputs = leaves(case.hidden, None if frozen else case.weight)
            head = case.weight if frozen else inputs[1]
            at = _products_at(inputs[0], head, case.teacher.ids, sparse=sparse)
            mean = plain_reverse_kl(at, case.teacher, case.teacher.ids[:, :0]).mean()
            return mean, *torch.autograd.grad(mean, inputs)

        return call

    return make


def _products_at(hidden: Tensor, head: Tensor | None, ids: Tensor, *, sparse: bool) -> Tensor:
    assert head is not None
    near = F.embedding(ids, head, sparse=sparse)  # [T, K, H]
    return torch.bmm(near, hidden[:, :, None])[:, :, 0].float()


def closed_logits(case: Case) -> Call:
    """Return a call of forward_kl_tail from logits in closed form, with all metrics."""

    def call() -> Results:
        (z,) = leaves(case.logits)
        z = z.detach()
        grad = torch.empty_like(z)
        return _forward_kl(z, grad, case.teacher, case.shape.k, case.shape.T).sum(), grad

    return call


def closed_hidden(case: Case) -> Call:
    """Return a call of the same from hidden states: three products, the gradient over logits."""
    hidden, head = case.hidden, case.weight
    assert hidden is not None
    assert head is not None
    size = max(1, HEAD_LOGITS // case.shape.V)

    def call() -> Results:
        total = torch.zeros((), device=case.device)
        d_hidden, d_head = torch.empty_like(hidden), torch.empty_like(head)
        buffer = hidden.new_empty(min(size, case.shape.T), case.shape.V)
        for start in range(0, case.shape.T, size):
            rows = slice(start, start + size)
            part = hidden[rows]
            z = torch.mm(part, head.T, out=buffer[: len(part)])
            teacher = case.teacher.rows(rows)
            total += _forward_kl(z, z, teacher, case.shape.k, case.shape.T).sum()
            torch.mm(z, head, out=d_hidden[rows])
            torch.addmm(d_head, z.T, part, beta=float(start > 0), out=d_head)
        return total, d_hidden, d_head

    return call


def _forward_kl(z: Tensor, grad: Tensor, teacher: Teacher, k: int, n_rows: int) -> Tensor:
    """Return forward_kl_tail [C] over n_rows, and write its gradient [C, V], maybe over z."""
    loss, size = z.new_empty(len(z), dtype=torch.float32), _rows_at_once(z)
    y = torch.empty(min(size, len(z)), z.shape[1], dtype=torch.float32, device=z.device)
    e = y if grad.dtype == torch.float32 else torch.empty_like(y)
    for start in range(0, len(z), size):
        rows = slice(start, start + size)
        few = teacher.rows(rows)
        z_c, y_c = z[rows], y[: len(few.ids)]
        e_c = grad[rows] if grad.dtype == torch.float32 else e[: len(few.ids)]
        top_ids, at = z_c.topk(k).indices, z_c.gather(1, few.ids).float()
        top, log_d, entropy = _exponentials(z_c, y_c, e_c)
        log_p = at - top - log_d
        metrics(log_p, entropy, top_ids, few)
        p, q, q_t = log_p.exp(), few.log_q.exp(), few.log_tail.exp()
        r = (1 - p.sum(-1)).clamp(min=SMALLEST_TAIL)
        loss[rows] = (q * (few.log_q - log_p)).sum(-1) + q_t * (few.log_tail - r.log())
        e_c.mul_(((1 - q_t / r) / n_rows)[:, None] * (-log_d).exp())
        e_c.scatter_(1, few.ids, (p - q) / n_rows)
        if grad.dtype != torch.float32:
            grad[rows] = e_c
    return loss / n_rows


def _exponentials(z: Tensor, y: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write exp(z - top) to e; return top, the log of its sum [C, 1], entropy [C]; y: scratch."""
    top = z.amax(-1, keepdim=True).float()
    torch.sub(z, top, out=y)
    torch.exp(y, out=e)
    d = e.sum(-1, keepdim=True)
    return top, d.log(), d.log()[:, 0] - y.mul_(e).sum(-1) / d[:, 0]


def _rows_at_once(z: Tensor) -> int:
    return len(z) if z.is_cuda else max(1, CACHED_LOGITS // z.shape[1])


def closed_live(*, frozen: bool = False) -> Make:
    """Return calls of overlap: one product without autograd for all metrics, the loss gathered."""

    def make(case: Case) -> Call:
        size = max(1, HEAD_LOGITS // case.shape.V)
        teacher = case.teacher

        def call() -> Results:
            inputs = leaves(case.hidden, None if frozen else case.weight)
            head = case.weight if frozen else inputs[1]
            top_ids, lse, entropy = _live(inputs[0].detach(), head, case.shape.k, size)
            at = _products_at(inputs[0], head, teacher.ids, sparse=False)
            metrics(at.detach() - lse, entropy, top_ids, teacher)
            mean = LOSSES["overlap"].plain(at, teacher, top_ids).mean()
            return mean, *torch.autograd.grad(mean, inputs)

        return call

    return make


@torch.no_grad()
def _live(hidden: Tensor, head: Tensor | None, k: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the live top-k ids [T, k], log-sum-exps [T, 1] and entropies [T]."""
    assert head is not None
    buffer = hidden.new_empty(min(size, len(hidden)), len(head))
    found = []
    for start in range(0, len(hidden), size):
        part = hidden[start : start + size]
        z = torch.mm(part, head.T, out=buffer[: len(part)])
        few = _rows_at_once(z)
        y = torch.empty(2, min(few, len(z)), z.shape[1], dtype=torch.float32, device=z.device)
        for at in range(0, len(z), few):
            z_c = z[at : at + few]
            top, log_d, entropy = _exponentials(z_c, y[0, : len(z_c)], y[1, : len(z_c)])
            found.append((z_c.topk(k).indices, top + log_d, entropy))
    ids, lse, entropy = zip(*found, strict=True)
    return torch.cat(ids), torch.cat(lse), torch.cat(entropy)
