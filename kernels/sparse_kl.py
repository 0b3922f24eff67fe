"""From logits: a loss of the log-probs at listed ids and of the live top-k, with its gradient.

The vocabulary-sized work is the same for every such loss, so the loss is a parameter: an objective,
plain torch on [C, S] and [C, K] tensors of C rows at a time. row_stats and topk_select run before
it, row_grad after it. A FusedObjective is computed inside the kernels. p is the student.

    dL_r/dy_v = dense_r p_v                      v not listed
              = at_ids_v + dense_at_ids_v p_v    v listed

each plus dense_log_r p_v log p_v for an objective that uses the entropy of p. dy/dz is
logit_transform's, 1 for most models.

The forward pass computes the gradients and the backward pass hands them over (see
precomputed_grad), so only the gradient itself has the size of the vocabulary. There is no second
and no double backward.
"""

import torch
from torch import Tensor

from logitcask.kernels.launch import check_inputs, check_logits, compute_dtype, row_chunks
from logitcask.kernels.logit_transform import PLAIN, LogitTransform
from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveInput, SparseLoss
from logitcask.kernels.precomputed_grad import attach_grads
from logitcask.kernels.row_grad import p_log_p, row_grad_reference
from logitcask.kernels.row_losses import RowLosses
from logitcask.kernels.row_stats import row_stats_reference
from logitcask.kernels.topk_select import topk_select_reference


def sparse_kl_reference(
    logits: Tensor,
    ids: Tensor,
    objective: ObjectiveFn,
    *,
    k: int = 16,
    row_weight: Tensor | None = None,
    n_vocab: int | None = None,
    logit_transform: LogitTransform = PLAIN,
) -> tuple[SparseLoss, Tensor]:
    """Return sparse_kl and d loss / d logits [P, V] in plain torch: its specification."""
    stats = row_stats_reference(logits, n_vocab=n_vocab, logit_transform=logit_transform)
    values, top_ids = topk_select_reference(logits, k, n_vocab=n_vocab)
    lse = stats.log_sum_exp[:, None]
    at = logits.gather(1, ids.clamp(min=0)).to(values.dtype)
    log_p = torch.where(ids < 0, -torch.inf, logit_transform.apply(at) - lse)
    index = torch.arange(len(ids), device=ids.device)
    grad = objective(
        ObjectiveInput(index, log_p, top_ids, logit_transform.apply(values) - lse, stats.entropy)
    )
    w = torch.ones_like(grad.loss) if row_weight is None else row_weight.to(grad.loss.dtype)
    used = w != 0  # a row of weight 0 adds exactly 0, whatever it holds
    loss = torch.where(used, w * grad.loss, 0.0).sum()
    log = torch.zeros_like(grad.dense) if grad.dense_log is None else grad.dense_log
    final = grad.at_ids + grad.dense_at_ids * log_p.exp() + log[:, None] * p_log_p(log_p)
    final = torch.where(used[:, None], w[:, None] * final * logit_transform.slope(at), 0.0)
    dense, log = (torch.where(used, w * each, 0.0) for each in (grad.dense, log))
    d_logits = row_grad_reference(
        logits,
        stats.log_sum_exp,
        dense,
        ids,
        final,
        dense_log=log,
        n_vocab=n_vocab,
        logit_transform=logit_transform,
    )
    return SparseLoss(loss, grad.loss, grad.metrics), d_logits


def sparse_kl(
    logits: Tensor,
    ids: Tensor,
    objective: ObjectiveFn,
    *,
    k: int = 16,
    row_weight: Tensor | None = None,
    n_vocab: int | None = None,
    logit_transform: LogitTransform = PLAIN,
    chunk_rows: int | None = None,
    in_place: bool = False,
) -> SparseLoss:
    """Compute loss, metrics and gradient of an objective from logits [P, V].

    logits: as in row_stats; differentiable. If they need no gradient, or gradients are off,
    row_grad is skipped.
    ids: [P, S] int64, distinct in a row, -1 is padding.
    objective: called under no_grad with chunks of rows, possibly all at once.
    k: size of the live top-k in the objective's input; 1 <= k <= n_vocab.
    row_weight: [P] float, default ones. A row of weight 0 has metrics, and adds exactly 0 even if
    it holds NaN.
    n_vocab: rows are normalized over columns [0, n_vocab); the gradient of the others is 0.
    logit_transform: scale, soft cap and temperature between the logits and p.
    chunk_rows: rows per call of the objective; default all on a GPU, about 16 Mi logits on a CPU.
    in_place: write the gradient over the logits, which must be contiguous, without a second tensor
    of their size; their values are lost. Otherwise they are not modified.

    Raises ValueError or TypeError for a shape, layout, dtype, device, id, k, n_vocab or
    logit_transform that does not fit.
    """
    n_vocab = check_logits(logits, n_vocab)
    check_inputs(logits, ids, n_vocab, k, row_weight, chunk_rows, logit_transform)
    if in_place and not logits.is_contiguous():
        raise ValueError(
            f"in_place needs contiguous logits, got strides {logits.stride()} of shape "
            f"{tuple(logits.shape)}; call .contiguous(), or leave in_place out"
        )
    n_rows = logits.shape[0]
    if chunk_rows is None:
        chunk_rows = max(1, n_rows if logits.is_cuda else (1 << 24) // logits.shape[1])
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        dtype = compute_dtype(logits.dtype)
        losses = RowLosses(ids, objective, k, row_weight, dtype, logit_transform)
        d_logits = None
        if needs_grad and in_place:
            d_logits = logits.detach()
        elif needs_grad:
            d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for rows in row_chunks(n_rows, chunk_rows):
            losses.run(rows, logits[rows], None if d_logits is None else d_logits[rows], n_vocab)
        result = losses.result()
    if d_logits is None:
        return result
    return result._replace(loss=attach_grads(result.loss, [logits], [d_logits]))
