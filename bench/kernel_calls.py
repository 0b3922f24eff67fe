"""Calls that the kernel benchmark times: our kernels, and plain torch.

A function here returns, for a case, a call without arguments that returns a loss and its gradients
by leaf tensors: the time contains forward and backward pass.
"""

from collections.abc import Callable

import torch
from kernel_fused import make_objective
from kernel_losses import plain, plain_reverse_kl
from kernel_shapes import Case
from torch import Tensor

Results = tuple[Tensor, ...]
"""(loss [], gradient, ...); for a top-k (values, ids)."""
Call = Callable[[], Results]
Make = Callable[[Case], Call]

DENSE_ROWS = 1024
"""Rows of a chunk of plain torch on a CPU: autograd holds five or six float32 [rows, V]."""


def _mean_weight(case: Case) -> Tensor:
    return torch.full((case.shape.T,), 1 / case.shape.T, device=case.device)


def leaves(*tensors: Tensor | None) -> list[Tensor]:
    """Return the tensors that are not None as leaves that need gradients."""
    found = [t.detach() for t in tensors if t is not None]
    return [t.requires_grad_() for t in found]


# Ours.


def our_logits(loss: str, form: str = "fused") -> Make:
    """Return calls of sparse_kl; `form` of the objective as in kernel_fused."""

    def make(case: Case) -> Call:
        from logitcask.kernels.sparse_kl import sparse_kl

        objective, weight = (
            make_objective(loss, case.teacher, case.shape.k, form),
            _mean_weight(case),
        )

        def call() -> Results:
            (z,) = leaves(case.logits)
            done = sparse_kl(z, case.teacher.ids, objective, k=case.shape.k, row_weight=weight)
            return done.loss, *torch.autograd.grad(done.loss, [z])

        return call

    return make


def our_hidden(loss: str, chunk_rows: int | None = None, form: str = "fused") -> Make:
    """Return calls of linear_sparse_kl; `form` as in our_logits."""

    def make(case: Case) -> Call:
        from logitcask.kernels.linear_sparse_kl import linear_sparse_kl

        objective, weight = (
            make_objective(loss, case.teacher, case.shape.k, form),
            _mean_weight(case),
        )
        options = {"k": case.shape.k, "row_weight": weight, "chunk_rows": chunk_rows}

        def call() -> Results:
            inputs = leaves(case.hidden, case.weight)
            done = linear_sparse_kl(*inputs, case.teacher.ids, objective, **options)
            return done.loss, *torch.autograd.grad(done.loss, inputs)

        return call

    return make


def our_indexed(
    loss: str,
    *,
    student_ids: bool = False,
    live: bool = False,
    frozen: bool = False,
    rows: bool = False,
    chunk_rows: int | None = None,
) -> Make:
    """Return calls of indexed_linear.

    live: with the student's top-k. rows: with the head's gradient as rows.
    """

    def make(case: Case) -> Call:
        from logitcask.kernels.indexed_linear import indexed_linear

        teacher = case.at_student if student_ids else case.teacher
        objective = make_objective(loss, teacher, case.shape.k, "fused" if live else "plain")
        options = {"k": case.shape.k if live else None, "row_weight": _mean_weight(case)}
        options |= {"sparse_weight_grad": rows, "chunk_rows": chunk_rows if live else None}

        def call() -> Results:
            hidden, head = leaves(case.hidden, case.weight)
            inputs = [hidden] if frozen else [hidden, head]
            done = indexed_linear(
                hidden, head.detach() if frozen else head, teacher.ids, objective, **options
            )
            return done.loss, *torch.autograd.grad(done.loss, inputs)

        return call

    return make


def our_topk(case: Case) -> Call:
    """Return a call of topk_select."""
    from logitcask.kernels.topk_select import topk_select

    assert case.logits is not None
    logits, k = case.logits, case.shape.k
    return lambda: topk_select(logits, k)


def plain_topk(case: Case) -> Call:
    """Return a call of torch.topk."""
    assert case.logits is not None
    logits, k = case.logits, case.shape.k
    return lambda: torch.topk(logits, k)


# Plain torch.


def has_oracle(loss: str, case: Case) -> bool:
    """Return whether float64 has the same live top-k.

    From hidden states in half precision it is that of rounded logits, another set.
    """
    return loss != "overlap" or case.hidden is None or case.dtype.itemsize >= 4


def plain_gradients(loss: str, case: Case, *, exact: bool = False) -> Results:
    """Return loss and gradients by autograd through all rows at once; in float64 if exact."""
    inputs = leaves(*((t.double() if exact and t is not None else t) for t in case.inputs))
    z = inputs[0] if len(inputs) == 1 else torch.nn.functional.linear(*inputs)
    mean = plain(loss, z, case.teacher.double() if exact else case.teacher, case.shape.k)[0].mean()
    return mean.detach(), *torch.autograd.grad(mean, inputs)


def eager_logits(loss: str, *, compiled: bool = False) -> Make:
    """Return calls from logits: log_softmax of whole rows, top-k, gather, autograd."""

    def make(case: Case) -> Call:
        if compiled:
            torch.compiler.reset()  # after a few shapes of one function it would go on uncompiled
        run = torch.compile(plain, dynamic=False) if compiled else plain

        def call() -> Results:
            (z,) = leaves(case.logits)
            mean = run(loss, z, case.teacher, case.shape.k)[0].mean()
            return mean, *torch.autograd.grad(mean, [z])

        return call

    return make


def dense_head(
    loss: str, *, with_metrics: bool = True, frozen: bool = False, softmax: bool = True
) -> Make:
    """Return eager_logits after a product with the whole head, DENSE_ROWS rows a chunk on a CPU.

    Without softmax no log_softmax: a renormalized loss needs none.
    """

    def make(case: Case) -> Call:
        T = case.shape.T
        chunk = min(T, DENSE_ROWS) if case.device.type == "cpu" else T

        def call() -> Results:
            inputs = leaves(case.hidden, None if frozen else case.weight)
            head = case.weight if frozen else inputs[1]
            total = torch.zeros((), device=case.device)
            for start in range(0, T, chunk):
                rows = slice(start, start + chunk)
                teacher = case.teacher.rows(rows)
                z = torch.nn.functional.linear(inputs[0][rows], head)
                if softmax:
                    row_loss, _ = plain(loss, z, teacher, case.shape.k if with_metrics else 0)
                else:
                    at = z.gather(1, teacher.ids).float()
                    row_loss = plain_reverse_kl(at, teacher, teacher.ids[:, :0])
                part = row_loss.sum() / T
                part.backward()
                total += part.detach()
            return total, *(t.grad for t in inputs if t.grad is not None)

        return call

    return make


def head_products(case: Case) -> Call:
    """Return a call of the three products of a dense head alone, of whole matrices."""
    hidden, weight = case.hidden, case.weight
    assert hidden is not None
    assert weight is not None

    def call() -> Results:
        z = hidden @ weight.T
        return z[0, 0], z @ weight, z.T @ hidden

    return call
