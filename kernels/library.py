"""The losses as one opaque op of torch.library: torch.compile(fullgraph=True) of model and loss.

A compiler cannot trace sparse_kl and the others, which read values on the host, write into buffers
and call an objective. The functions here have their names and arguments; the objective is a
FusedObjective, of which the op gets tensors, names and numbers. Its own `plain` and `name_metrics`
are not called: the metrics are sums_and_entropy, the plain form is evaluate_plain.

    forward    logitcask::loss -> loss [], row_loss [P], metrics [M, P], made-ahead gradients
    backward   logitcask::scaled, gradient times the incoming one; logitcask::weight_grad

indexed_linear keeps the derivative by the logits at the ids, and makes the gradient of the head in
the backward pass. The ops of the backward pass have no derivative: a double backward raises.
Without a compiler the public functions are better: they hand gradients over in their own memory.
"""

from typing import Any

import torch
from torch import Tensor

from logitcask.kernels import indexed_linear as _indexed_linear
from logitcask.kernels import linear_sparse_kl as _linear_sparse_kl
from logitcask.kernels import sparse_kl as _sparse_kl
from logitcask.kernels.fused_objective import TENSORS, FusedObjective, OverlapSums
from logitcask.kernels.indexed_rows import sorted_terms, summed_by_id
from logitcask.kernels.launch import compute_dtype
from logitcask.kernels.logit_transform import PLAIN, LogitTransform
from logitcask.kernels.objective_input import SparseLoss

METRICS = (*OverlapSums._fields, "entropy")
"""Names of the rows of metrics."""


def sparse_kl(
    logits: Tensor,
    ids: Tensor,
    objective: FusedObjective,
    *,
    k: int = 16,
    row_weight: Tensor | None = None,
    n_vocab: int | None = None,
    logit_transform: LogitTransform = PLAIN,
) -> SparseLoss:
    """Compute sparse_kl.sparse_kl as one op."""
    return _call("sparse_kl", logits, None, ids, objective, k, row_weight, n_vocab, logit_transform)


def linear_sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    objective: FusedObjective,
    *,
    k: int = 16,
    row_weight: Tensor | None = None,
    n_vocab: int | None = None,
    logit_transform: LogitTransform = PLAIN,
) -> SparseLoss:
    """Compute linear_sparse_kl.linear_sparse_kl as one op."""
    name = "linear_sparse_kl"
    return _call(name, hidden, weight, ids, objective, k, row_weight, n_vocab, logit_transform)


def indexed_linear(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    objective: FusedObjective,
    *,
    k: int | None = None,
    row_weight: Tensor | None = None,
    n_vocab: int | None = None,
    logit_transform: LogitTransform = PLAIN,
) -> SparseLoss:
    """Compute indexed_linear.indexed_linear as one op; without k it has no metrics."""
    name = "indexed_linear"
    return _call(name, hidden, weight, ids, objective, k, row_weight, n_vocab, logit_transform)


def _call(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    objective: FusedObjective,
    k: int | None,
    row_weight: Tensor | None,
    n_vocab: int | None,
    logit_transform: LogitTransform,
) -> SparseLoss:
    on = torch.is_grad_enabled()
    loss, row_loss, metrics, *_ = loss_op(
        name,
        x,
        weight,
        ids,
        row_weight,
        [getattr(objective, each) for each in TENSORS],
        objective.divergence,
        objective.tail,
        objective.parameter,
        objective.live_k,
        objective.metric_k,
        k,
        n_vocab,
        logit_transform.scale,
        logit_transform.softcap,
        logit_transform.temperature,
        on and x.requires_grad,
        on and weight is not None and weight.requires_grad,
    )
    names = METRICS if k is not None else ()
    return SparseLoss(loss, row_loss, dict(zip(names, metrics.unbind(0), strict=True)))


@torch.library.custom_op("logitcask::loss", mutates_args=())
def loss_op(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    row_weight: Tensor | None,
    tensors: list[Tensor],
    divergence: str,
    tail: str,
    parameter: float,
    live_k: int,
    metric_k: int,
    k: int | None,
    n_vocab: int | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, row losses, metrics, the gradient of x, and that of weight.

    name: the loss; of indexed_linear the last is the derivative by the logits at the ids. A
    gradient that is not needed is empty, because an op returns no None.
    """
    of: dict[str, Any] = dict(zip(TENSORS, tensors, strict=True))
    of |= {"divergence": divergence, "tail": tail, "parameter": parameter}
    objective = FusedObjective(live_k=live_k, metric_k=metric_k, **of)
    options: dict[str, Any] = {
        "k": k,
        "row_weight": row_weight,
        "n_vocab": n_vocab,
        "logit_transform": LogitTransform(scale, softcap, temperature),
    }
    x = x.detach().requires_grad_(needs_x)
    weight = None if weight is None else weight.detach().requires_grad_(needs_weight)
    d_x = d_weight = None
    if name == "indexed_linear":
        assert weight is not None
        result, d_weight, d_x = _indexed_linear.grads_at_ids(
            x, weight, ids, objective, needs_hidden=needs_x, **options
        )
    else:
        with torch.enable_grad():
            if weight is None:
                result = _sparse_kl.sparse_kl(x, ids, objective, **options)
            else:
                result = _linear_sparse_kl.linear_sparse_kl(x, weight, ids, objective, **options)
        needed = [each for each in (x, weight) if each is not None and each.requires_grad]
        grads = list(torch.autograd.grad(result.loss, needed)) if needed else []
        d_x, d_weight = grads.pop(0) if needs_x else None, grads.pop() if needs_weight else None
    metrics = x.new_empty(0 if k is None else len(METRICS), len(ids), dtype=result.loss.dtype)
    for row, each in zip(metrics, result.metrics.values(), strict=False):  # none without rows
        row.copy_(each)
    return (
        result.loss.detach().clone(),
        result.row_loss.clone(),
        metrics,
        x.new_empty(0) if d_x is None else d_x,
        x.new_empty(0) if d_weight is None else d_weight,
    )


@loss_op.register_fake
def _(name, x, weight, ids, *rest):  # type: ignore[no-untyped-def]
    k, (needs_x, needs_weight) = rest[-7], rest[-2:]
    dtype, n_rows = compute_dtype(x.dtype), x.shape[0]
    last = x.new_empty(0)
    if name == "indexed_linear":
        last = x.new_empty(ids.shape, dtype=dtype)
    elif needs_weight:
        last = weight.new_empty(weight.shape)
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty(n_rows, dtype=dtype),
        x.new_empty(0 if k is None else len(METRICS), n_rows, dtype=dtype),
        x.new_empty(x.shape) if needs_x else x.new_empty(0),
        last,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    name, x, weight, ids, _, tensors, *_ = inputs
    indexed = name == "indexed_linear"
    ctx.save_for_backward(*output[3:], *((x, ids) if indexed else ()))
    ctx.indexed, ctx.needs, ctx.n_tensors = indexed, inputs[-2:], len(tensors)
    ctx.weight = None if weight is None else (weight.shape[0], weight.dtype)
    ctx.n_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    d_x, last, *saved = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs
    d_weight = None
    if grad is not None and needs_weight and ctx.indexed:
        d_weight = weight_grad_op(last, grad, saved[1], saved[0], *ctx.weight)
    elif grad is not None and needs_weight:
        d_weight = scaled_op(last, grad)
    scaled = scaled_op(d_x, grad) if grad is not None and needs_x else None
    none = [None] * (ctx.n_inputs - 6)
    return (None, scaled, d_weight, None, None, [None] * ctx.n_tensors, *none)


loss_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("logitcask::scaled", mutates_args=())
def scaled_op(gradient: Tensor, by: Tensor) -> Tensor:
    """Return a gradient times `by` []."""
    return gradient * by


@scaled_op.register_fake
def _(gradient: Tensor, by: Tensor) -> Tensor:
    return torch.empty_like(gradient)


@torch.library.custom_op("logitcask::weight_grad", mutates_args=())
def weight_grad_op(
    g: Tensor, by: Tensor, ids: Tensor, hidden: Tensor, n_rows: int, dtype: torch.dtype
) -> Tensor:
    """Return the gradient [n_rows, D] of the head: of g [P, S], times `by` [], at ids [P, S]."""
    return summed_by_id(sorted_terms(g * by, ids), hidden.contiguous(), n_rows, dtype)


@weight_grad_op.register_fake
def _(g, by, ids, hidden, n_rows, dtype):  # type: ignore[no-untyped-def]
    return hidden.new_empty(n_rows, hidden.shape[1], dtype=dtype)
