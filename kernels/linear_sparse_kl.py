"""sparse_kl from hidden states and the head's weight: logits exist for one chunk of rows at a time.

Per chunk of C rows: logits = hidden_c weight^T into one reused buffer, the kernels of sparse_kl,
which write d_logits to the same buffer, then d_hidden_c = d_logits weight and d_weight +=
d_logits^T hidden_c. That is three matrix products, the least that a dense loss can have without
keeping [P, V]; recomputing the logits in the backward pass would be a fourth. d_weight is summed
over chunks in float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from logitcask.kernels.launch import (
    check_device,
    check_float,
    check_inputs,
    check_n_vocab,
    compute_dtype,
    row_chunks,
)
from logitcask.kernels.logit_transform import PLAIN, LogitTransform
from logitcask.kernels.objective_input import ObjectiveFn, SparseLoss
from logitcask.kernels.precomputed_grad import attach_grads
from logitcask.kernels.row_losses import RowLosses
from logitcask.kernels.sparse_kl import sparse_kl_reference


def linear_sparse_kl_reference(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    objective: ObjectiveFn,
    *,
    k: int = 16,
    row_weight: Tensor | None = None,
    n_vocab: int | None = None,
    logit_transform: LogitTransform = PLAIN,
) -> tuple[SparseLoss, Tensor, Tensor]:
    """Return linear_sparse_kl and its gradients in plain torch: its specification."""
    cast = weight.to(hidden.dtype)
    logits = hidden @ cast.T  # [P, V]
    result, d_logits = sparse_kl_reference(
        logits,
        ids,
        objective,
        k=k,
        row_weight=row_weight,
        n_vocab=n_vocab,
        logit_transform=logit_transform,
    )
    return result, d_logits @ cast.to(d_logits.dtype), d_logits.T @ hidden.to(d_logits.dtype)


def default_chunk_rows(n_vocab: int, hidden: Tensor) -> int:
    """Return the rows per chunk for hidden [P, D]; all chunks have about one size.

    d_weight is read and written once per chunk, so few are better. On a GPU products are
    compute-bound from about 700 rows, and 4096 bf16 rows of 152k logits take 1.2 GB. A CPU gets at
    most 256 MiB of logits, but at least 64 rows.
    """
    most = 4096
    if not hidden.is_cuda:
        most = max(64, (256 << 20) // (n_vocab * hidden.element_size()))
    n_chunks = max(1, -(-len(hidden) // most))
    return max(1, -(-len(hidden) // n_chunks))


def _add_weight_grad(d_weight: Tensor, d_logits: Tensor, hidden: Tensor, is_first: bool) -> None:
    """Add d_logits^T hidden to d_weight [V, D], float32 or float64; d_logits [C, V].

    is_first: d_weight counts as 0, whatever it holds.
    """
    if is_first and d_weight.dtype == hidden.dtype:
        torch.mm(d_logits.T, hidden, out=d_weight)
        return
    if is_first:
        d_weight.zero_()
    if d_weight.dtype == hidden.dtype:
        torch.addmm(d_weight, d_logits.T, hidden, out=d_weight)
    elif hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) >= (8, 0):
        # Half-precision tensor cores that add into float32: nothing is rounded between chunks.
        torch.addmm(d_weight, d_logits.T, hidden, out_dtype=torch.float32, out=d_weight)
    else:
        d_weight.addmm_(d_logits.T.float(), hidden.float())


def head_product(
    hidden: Tensor, head: Tensor, chunk_rows: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, logits hidden[rows] head^T) chunk by chunk from one buffer.

    hidden [P, D], head [V, D] in its dtype. The next chunk overwrites the logits [C, V].
    """
    n_rows, n_vocab = len(hidden), len(head)
    chunk_rows = max(1, min(n_rows, chunk_rows or default_chunk_rows(n_vocab, hidden)))
    # Rows start on 16-element borders: otherwise an odd vocabulary is loaded 2 bytes at a time.
    # Zeros: torch's bfloat16 product on a CPU multiplies the memory between the rows, too.
    buffer = hidden.new_zeros(min(n_rows, chunk_rows), -(-n_vocab // 16) * 16)[:, :n_vocab]
    for rows in row_chunks(n_rows, chunk_rows):
        hidden_c = hidden[rows]  # [C, D]
        yield rows, torch.mm(hidden_c, head.T, out=buffer[: len(hidden_c)])


def run_chunks(
    losses: RowLosses,
    hidden: Tensor,
    weight: Tensor,
    n_vocab: int,
    chunk_rows: int | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Pass the logits hidden [P, D] weight[:n_vocab]^T to `losses`, chunk_rows rows at a time.

    Returns the gradients by hidden and by weight [V, D], in their dtypes; None for one that
    `needs` excludes.
    """
    needs_hidden, needs_weight = needs
    head = weight[:n_vocab].to(hidden.dtype)  # [n_vocab, D]
    d_hidden = torch.empty_like(hidden) if needs_hidden else None
    d_weight = weight.new_empty(weight.shape, dtype=losses.weight.dtype) if needs_weight else None
    if d_weight is not None:
        d_weight[n_vocab if len(hidden) else 0 :] = 0
    for rows, logits in head_product(hidden, head, chunk_rows):
        losses.run(rows, logits, logits if needs_hidden or needs_weight else None, n_vocab)
        if d_hidden is not None:
            torch.mm(logits, head, out=d_hidden[rows])
        if d_weight is not None:
            hidden_c = hidden[rows]  # [C, D]
            if losses.weighted:  # d_logits of an unused row is 0, but 0 * NaN is NaN
                hidden_c = hidden_c.masked_fill((losses.weight[rows] == 0)[:, None], 0.0)
            _add_weight_grad(d_weight[:n_vocab], logits, hidden_c, rows.start == 0)
    return d_hidden, None if d_weight is None else d_weight.to(weight.dtype)


def linear_sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    objective: ObjectiveFn,
    *,
    k: int = 16,
    row_weight: Tensor | None = None,
    n_vocab: int | None = None,
    logit_transform: LogitTransform = PLAIN,
    chunk_rows: int | None = None,
) -> SparseLoss:
    """Compute sparse_kl of the logits hidden @ weight.T, without a tensor [P, V].

    hidden: [P, D] bfloat16, float16, float32, or float64 on a CPU; differentiable. Its dtype is
    that of the logits, also under autocast.
    weight: [V, D], the layout of nn.Linear; differentiable; cast once per call to hidden's dtype.
    ids, objective, k, row_weight: as in sparse_kl.
    n_vocab: only the first n_vocab rows of weight are used; the gradient of the others is 0.
    logit_transform: as in sparse_kl.
    chunk_rows: rows of logits that exist at a time; see default_chunk_rows.

    An input that needs no gradient, for example a frozen head, costs no product. P = 0 gives loss 0
    with zero gradients. The loss is float32, or float64 for float64 hidden states. Gradients have
    the inputs' dtypes.

    Raises ValueError or TypeError for a shape, dtype, device, id, k, n_vocab or logit_transform
    that does not fit.
    """
    n_vocab = check_head(hidden, weight, n_vocab)
    check_inputs(hidden, ids, n_vocab, k, row_weight, chunk_rows, logit_transform)
    needs = needed_grads(hidden, weight)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        dtype = compute_dtype(hidden.dtype)
        losses = RowLosses(ids, objective, k, row_weight, dtype, logit_transform)
        grads = run_chunks(losses, hidden, weight, n_vocab, chunk_rows, needs)
        result = losses.result()
    if not any(needs):
        return result
    return result._replace(loss=attach_grads(result.loss, [hidden, weight], grads))


def check_head(hidden: Tensor, weight: Tensor, n_vocab: int | None) -> int:
    """Raise unless hidden is [P, D] and weight [V, D]; return n_vocab, default V."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}, must be "
            "[rows, D] and [V, D]; flatten leading dimensions, and pass nn.Linear's weight as it is"
        )
    check_float(hidden, "hidden")
    check_float(weight, "weight")
    check_device(weight, hidden, "weight")
    return check_n_vocab(n_vocab, weight.shape[0], "the rows of weight")


def needed_grads(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Return whether hidden and weight need gradients."""
    on = torch.is_grad_enabled()
    return on and hidden.requires_grad, on and weight.requires_grad
