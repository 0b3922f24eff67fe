"""The head at the support's ids alone, for losses that are renormalized on a support.

Such a loss depends on the logits of its support up to a constant of the row: neither the
log-sum-exp nor any other id matters, and its gradient's coefficients sum to zero over the support,

    dL/dy_v = g_v [v in S],   sum_S g = 0,

so no softmax remains (see sparse_kl; y is logit_transform of the product z), only products with the
listed rows of the head, some 16 per position instead of V: see indexed_rows. A support that depends
on the live student's top-k needs one product with the whole head, forward only.

An objective without sum g = 0 needs linear_sparse_kl. The caller must choose by the objective's
form; its output is checked on a CPU, and on a GPU under LOGITCASK_DEBUG=1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitcask.kernels.indexed_rows import (
    compact_by_id,
    logits_at,
    sorted_terms,
    summed_by_id,
    weighted_rows,
)
from logitcask.kernels.launch import check_inputs, compute_dtype, reads_values
from logitcask.kernels.linear_sparse_kl import check_head, head_product, needed_grads
from logitcask.kernels.logit_transform import PLAIN, LogitTransform
from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveGrad, ObjectiveInput, SparseLoss
from logitcask.kernels.row_losses import RowLosses

ZERO_SUM = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-9, 1e-12)}
"""Largest sum that counts as 0, relative to max |g| of the row and absolute: a row with p = q has
nothing but rounding."""


def indexed_linear(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    objective: ObjectiveFn,
    *,
    k: int | None = None,
    row_weight: Tensor | None = None,
    n_vocab: int | None = None,
    logit_transform: LogitTransform = PLAIN,
    chunk_rows: int | None = None,
    sparse_weight_grad: bool = False,
) -> SparseLoss:
    """Compute linear_sparse_kl of a loss renormalized on its support, without dense products.

    hidden: [P, D] bfloat16, float16, float32, or float64 on a CPU; differentiable.
    weight: [V, D], the layout of nn.Linear; differentiable. Read as it is, never cast as a whole
    unless k is given.
    ids: [P, S] int64, distinct in a row, -1 is padding.
    objective: as in sparse_kl; in each row dense, dense_at_ids and the sum of at_ids must be 0 up
    to rounding, and dense_log None.
    k: None for a support that does not depend on the live top-k. The objective is then called once
    for all rows; its input holds log_p up to a constant of the row (0 for the largest listed id),
    no top ids ([P, 0]), and NaN for the entropy. A number: one forward product in chunks, and the
    complete input, as in linear_sparse_kl.
    row_weight, n_vocab, logit_transform, chunk_rows: as in linear_sparse_kl; chunk_rows has no
    effect without k.
    sparse_weight_grad: return the gradient of weight as a sparse tensor of the listed rows, like
    nn.Embedding(sparse=True), for optimizers that support it. Otherwise dense, which a weight tied
    to the embedding needs; then filling it with zeros is most of the work.

    The loss is float32, or float64 for float64 hidden states. Products at the ids are summed in
    that dtype from uncast operands. Gradients have the inputs' dtypes, and two runs give the same
    bits.

    Raises ValueError or TypeError for a shape, dtype, device, id, k, n_vocab or logit_transform
    that does not fit, and ValueError for an output that is not of a renormalized loss.
    """
    needs_hidden, needs_weight = needed_grads(hidden, weight)
    result, g, d_hidden = grads_at_ids(
        hidden,
        weight,
        ids,
        objective,
        k=k,
        row_weight=row_weight,
        n_vocab=n_vocab,
        logit_transform=logit_transform,
        chunk_rows=chunk_rows,
        needs_hidden=needs_hidden,
    )
    if not (needs_hidden or needs_weight):
        return result
    loss: Tensor = _AtIds.apply(  # type: ignore[no-untyped-call]
        result.loss,
        hidden,
        weight,
        hidden.detach().contiguous(),
        d_hidden,
        g,
        ids,
        sparse_weight_grad,
    )
    return result._replace(loss=loss)


def grads_at_ids(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    objective: ObjectiveFn,
    *,
    k: int | None,
    row_weight: Tensor | None,
    n_vocab: int | None,
    logit_transform: LogitTransform,
    chunk_rows: int | None = None,
    needs_hidden: bool,
) -> tuple[SparseLoss, Tensor, Tensor | None]:
    """Return the loss, its derivative g [P, S] by the logits at the ids, and that by hidden."""
    n_vocab = check_head(hidden, weight, n_vocab)
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(
            f"weight must be contiguous along D, got strides {weight.stride()} of shape "
            f"{tuple(weight.shape)}; pass nn.Linear's weight as it is, or call .contiguous()"
        )
    check_inputs(hidden, ids, n_vocab, k, row_weight, chunk_rows, logit_transform)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        dtype = compute_dtype(hidden.dtype)
        losses = RowLosses(ids, objective, k or 0, row_weight, dtype, logit_transform)
        hidden_rows = hidden.contiguous()
        if k is None:
            z = logits_at(hidden_rows, weight, ids)
            g = _checked(losses.evaluate(slice(None), _view(logit_transform.apply(z), ids)), ids)
        else:
            z, g = losses.weight.new_empty(2, *ids.shape)
            head = weight[:n_vocab].to(hidden.dtype)
            for rows, logits in head_product(hidden_rows, head, chunk_rows):
                g[rows] = _checked(losses.run(rows, logits, None, n_vocab), ids[rows])
                z[rows] = logits.gather(1, ids[rows].clamp(min=0)).to(dtype)
        if not logit_transform.is_plain:
            g = g * logit_transform.slope(z)
        used = (losses.weight != 0)[:, None]  # a row of weight 0 adds 0, whatever it holds
        g = torch.where(used, losses.weight[:, None] * g, 0.0)
        d_hidden = weighted_rows(g, weight, ids, hidden.dtype) if needs_hidden else None
        return losses.result(), g, d_hidden


def _view(y: Tensor, ids: Tensor) -> ObjectiveInput:
    """Build the objective's input from transformed logits y [P, S] at the ids alone."""
    n_rows = len(y)
    y = torch.where(ids < 0, -torch.inf, y)
    # A row without ids, or of -inf alone, has no largest.
    top = y.amax(-1, keepdim=True) if y.shape[1] else y.new_zeros(n_rows, 1)
    top = torch.where(top == -torch.inf, 0.0, top)
    return ObjectiveInput(
        index=torch.arange(n_rows, device=y.device),
        log_p=y - top,
        top_ids=y.new_empty(n_rows, 0, dtype=torch.int64),
        top_log_p=y.new_empty(n_rows, 0),
        entropy=y.new_full((n_rows,), torch.nan),
    )


def _checked(output: ObjectiveGrad, ids: Tensor) -> Tensor:
    """Return at_ids [C, S], 0 at padding. Raises ValueError unless each row sums to 0."""
    if output.dense_log is not None:
        raise ValueError(
            "the objective's dense_log must be None, because it has a gradient outside the "
            "support; use linear_sparse_kl"
        )
    g = torch.where(ids < 0, 0.0, output.at_ids)  # values at padding count nowhere
    if g.numel() == 0 or not reads_values(g):
        return g
    relative, absolute = ZERO_SUM[compute_dtype(g.dtype)]
    allowed = relative * g.abs().amax(-1) + absolute
    must_be_0 = {
        "sum of at_ids": g.sum(-1),
        "dense": output.dense,
        "dense_at_ids": torch.where(ids < 0, 0.0, output.dense_at_ids).abs().amax(-1),
    }
    for name, value in must_be_0.items():
        wrong = value.abs() > allowed  # not so for NaN, which the loss shows
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"the objective's {name} is {float(value[row]):.3g} in row {row}, must be 0 for a "
                "loss renormalized on its support; use linear_sparse_kl"
            )
    return g


class _AtIds(torch.autograd.Function):
    """A loss with its derivative g [P, S] by the logits at the ids.

    The backward pass computes the gradient of weight, so that nothing of its size is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        hidden: Tensor,
        weight: Tensor,
        hidden_rows: Tensor,
        d_hidden: Tensor | None,
        g: Tensor,
        ids: Tensor,
        sparse: bool,
    ) -> Tensor:
        ctx.save_for_backward(hidden_rows, d_hidden, g, ids)
        ctx.weight = (weight.shape, weight.dtype)
        ctx.sparse = sparse
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        hidden_rows, d_hidden, g, ids = ctx.saved_tensors
        d_weight = None
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.weight
            terms = sorted_terms(g * grad_out, ids)
            if ctx.sparse:
                listed, sums = compact_by_id(terms, hidden_rows, dtype)
                d_weight = torch.sparse_coo_tensor(
                    listed[None], sums, shape, is_coalesced=True, check_invariants=False
                )
            else:
                d_weight = summed_by_id(terms, hidden_rows, shape[0], dtype)
        scaled = None if d_hidden is None else d_hidden * grad_out
        return (None, scaled, d_weight, None, None, None, None, None)
