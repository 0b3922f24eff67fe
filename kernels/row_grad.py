"""The gradient by the logits: a scaled softmax with a few entries replaced.

A loss that is a function of {log p_v : v in S} has  dL/dz_v = g_v [v in S] - (sum_S g) p_v,  g_v =
dL/d log p_v. So the gradient by a whole row of logits is one number per row times softmax, and S
numbers. A loss that also uses the entropy of p has a second number per row, times p_v log p_v:
dH/dz_v = -p_v (log p_v + H).

z stands for the transformed logits: see logit_transform, whose slope is the last factor by the raw
ones. The entries at S are final values that overwrite, never terms that are added: with a tail
bucket g_v and its dense term are both near 1/r for a tail mass r near 0, and cancel. A sum in the
output's precision would lose the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitcask.kernels.launch import (
    TILE,
    check_device,
    check_float,
    check_ids,
    check_logits,
    check_row_vector,
    compile_options,
    compute_dtype,
    cpu_chunk_rows,
    next_power_of_2,
    num_warps,
    on_device,
    row_chunks,
    runs_triton,
)
from logitcask.kernels.logit_transform import (
    LN2,
    LOG2E,
    PLAIN,
    LogitTransform,
    softcapped,
    transformed,
)


def row_grad_reference(
    logits: Tensor,
    log_sum_exp: Tensor,
    dense: Tensor,
    ids: Tensor,
    at_ids: Tensor,
    *,
    dense_log: Tensor | None = None,
    n_vocab: int | None = None,
    logit_transform: LogitTransform = PLAIN,
) -> Tensor:
    """Return row_grad in whole-tensor torch, float32 or the logits' float64: its specification."""
    z = logits.to(compute_dtype(logits.dtype))
    log_p = logit_transform.apply(z) - log_sum_exp[:, None]
    log = torch.zeros_like(dense) if dense_log is None else dense_log
    dy = dense[:, None] * log_p.exp() + log[:, None] * p_log_p(log_p)
    is_zero = (dense == 0) & (log == 0)
    out = torch.where(is_zero[:, None], 0.0, dy * logit_transform.slope(z))
    if n_vocab is not None:
        out[:, n_vocab:] = 0
    rows, slots = (ids >= 0).nonzero().unbind(1)
    out[rows, ids[rows, slots]] = at_ids[rows, slots].to(out.dtype)
    return out


def p_log_p(log_p: Tensor) -> Tensor:
    """Return p log p, any shape: 0 where p is, and NaN where log p is."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * log_p)


@triton.jit  # type: ignore[untyped-decorator]
def scaled_softmax(y, scale, log_scale, DENSE_LOG: tl.constexpr):  # type: ignore[no-untyped-def]
    # scale p, with DENSE_LOG also log_scale p log2 p; y = log2 p.
    p = tl.exp2(y)
    if DENSE_LOG:
        # Far below the bound p is 0 already; -inf would make NaN of it.
        return (scale + log_scale * tl.maximum(y, -1000.0)) * p
    return scale * p


@triton.jit  # type: ignore[untyped-decorator]
def grad_tile(  # type: ignore[no-untyped-def]
    x, inner, outer, shift, scale, log_scale, SOFTCAP: tl.constexpr, DENSE_LOG: tl.constexpr
):
    # dL/dz at logits x.
    y = transformed(x, inner, outer, shift, SOFTCAP)
    dz = scaled_softmax(y, scale, log_scale, DENSE_LOG)
    if SOFTCAP:
        t = softcapped(x, inner)
        dz *= 1.0 - t * t
    return dz


@triton.jit  # type: ignore[untyped-decorator]
def grad_kernel(  # type: ignore[no-untyped-def]
    logits,  # [P, V], row stride `stride`
    out,  # [P, V], row stride `out_stride`; may be logits itself
    log_sum_exp,  # [P] float32
    dense,  # [P] float32
    dense_log,  # [P] float32, read with DENSE_LOG alone
    ids,  # [P, n_ids] int64
    at_ids,  # [P, n_ids] float32
    stride,
    out_stride,
    n_vocab,
    n_columns,
    n_ids,
    inner,
    outer,
    slope,
    TILE: tl.constexpr,
    IDS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DENSE_LOG: tl.constexpr,
):
    # One program per row.
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    out += row * out_stride
    scale = tl.load(dense + row) * slope
    shift = tl.load(log_sum_exp + row) * LOG2E
    offsets = tl.arange(0, TILE)
    is_zero = scale == 0.0
    log_scale = 0.0
    if DENSE_LOG:
        log_scale = tl.load(dense_log + row) * slope * LN2
        is_zero = is_zero & (log_scale == 0.0)
    if is_zero:
        # Nothing but the listed ids: the row is not even read, so a NaN in it cannot get out.
        for start in range(0, n_columns, TILE):
            o = start + offsets
            tl.store(
                out + o, tl.zeros((TILE,), tl.float32).to(out.dtype.element_ty), mask=o < n_columns
            )
    else:
        n_whole = (n_vocab // TILE) * TILE
        for start in range(0, n_whole, TILE):
            x = tl.load(logits + start + offsets).to(tl.float32)
            dz = grad_tile(x, inner, outer, shift, scale, log_scale, SOFTCAP, DENSE_LOG)
            tl.store(out + start + offsets, dz.to(out.dtype.element_ty))
        for start in range(n_whole, n_columns, TILE):
            o = start + offsets
            x = tl.load(logits + o, mask=o < n_vocab, other=-float("inf")).to(tl.float32)
            dz = grad_tile(x, inner, outer, shift, scale, log_scale, SOFTCAP, DENSE_LOG)
            dz = tl.where(o < n_vocab, dz, 0.0)
            tl.store(out + o, dz.to(out.dtype.element_ty), mask=o < n_columns)
    tl.debug_barrier()  # the listed entries overwrite what other threads have just stored
    ids += row * n_ids
    at_ids += row * n_ids
    for start in range(0, n_ids, IDS):
        slot = start + tl.arange(0, IDS)
        v = tl.load(ids + slot, mask=slot < n_ids, other=-1)
        dz = tl.load(at_ids + slot, mask=slot < n_ids, other=0.0)
        tl.store(out + v, dz.to(out.dtype.element_ty), mask=(v >= 0) & (v < n_vocab))


def grad_rows(
    logits: Tensor,
    log_sum_exp: Tensor,
    dense: Tensor,
    ids: Tensor,
    at_ids: Tensor,
    out: Tensor,
    n_vocab: int,
    logit_transform: LogitTransform = PLAIN,
    dense_log: Tensor | None = None,
    shift: Tensor | None = None,
) -> None:
    """Write row_grad to `out` [P, V] without checks.

    shift: [P], where `out` holds exp(y - shift) already; on a CPU, without a soft cap.
    """
    n_rows, n_columns = logits.shape
    n_ids = ids.shape[1]
    if n_rows == 0:
        return
    if not runs_triton(logits):
        if shift is not None:
            _scale_exp(out, (shift - log_sum_exp).exp(), dense, n_vocab, logit_transform)
        else:
            _grad_torch(logits, log_sum_exp, dense, out, n_vocab, logit_transform, dense_log)
        listed, slots = (ids >= 0).nonzero().unbind(1)
        out[listed, ids[listed, slots]] = at_ids[listed, slots].to(out.dtype)
        return
    tile = min(TILE, next_power_of_2(n_columns))
    with on_device(logits):
        grad_kernel[(n_rows,)](
            logits,
            out,
            log_sum_exp.float().contiguous(),
            dense.float().contiguous(),
            (dense if dense_log is None else dense_log).float().contiguous(),
            ids.contiguous(),
            at_ids.float().contiguous(),
            logits.stride(0),
            out.stride(0),
            n_vocab,
            n_columns,
            n_ids,
            *logit_transform.factors(),
            logit_transform.slope_at_0,
            TILE=tile,
            IDS=min(1024, next_power_of_2(n_ids)),
            SOFTCAP=logit_transform.softcap is not None,
            DENSE_LOG=dense_log is not None,
            num_warps=num_warps(tile),
            **compile_options("grad_kernel", logits),
        )


def _scale_exp(
    out: Tensor, factor: Tensor, dense: Tensor, n_vocab: int, logit_transform: LogitTransform
) -> None:
    """Multiply out [P, V] by factor [P], dense [P] and dy/dz; exactly 0 where dense is."""
    scale = torch.where(dense == 0, 0.0, dense * factor * logit_transform.slope_at_0)
    for rows in row_chunks(len(out), cpu_chunk_rows(n_vocab)):
        out_c = out[rows, :n_vocab].mul_(scale[rows, None])
        out_c.index_fill_(0, (dense[rows] == 0).nonzero()[:, 0], 0.0)  # 0 * NaN is NaN
    out[:, n_vocab:] = 0


def _grad_torch(
    logits: Tensor,
    log_sum_exp: Tensor,
    dense: Tensor,
    out: Tensor,
    n_vocab: int,
    logit_transform: LogitTransform,
    dense_log: Tensor | None,
) -> None:
    """Write row_grad to `out` [P, V], the listed ids excepted."""
    dtype = compute_dtype(logits.dtype)
    chunk_rows = cpu_chunk_rows(n_vocab)
    # Half precision is computed in a float32 buffer; float32 and float64 straight in `out`.
    scratch = (
        None
        if out.dtype == dtype
        else logits.new_empty(min(chunk_rows, len(out)), n_vocab, dtype=dtype)
    )
    for rows in row_chunks(len(out), chunk_rows):
        out_c = out[rows, :n_vocab]
        by = 1.0 if logit_transform.softcap is not None else logit_transform.slope_at_0
        scale = dense[rows].to(dtype) * by
        log_scale = None if dense_log is None else dense_log[rows].to(dtype) * by
        is_zero = scale == 0 if log_scale is None else (scale == 0) & (log_scale == 0)
        if bool(is_zero.all()):
            out_c.zero_()
            continue
        dz = out_c if scratch is None else scratch[: out_c.shape[0]]
        z = logits[rows, :n_vocab]
        # Before dz is written, which may be the logits themselves.
        slope = None if logit_transform.softcap is None else logit_transform.slope(z.to(dtype))
        if not logit_transform.is_plain:
            z = logit_transform.apply(z.to(dtype))
        torch.sub(z, log_sum_exp[rows, None].to(dtype), out=dz)
        factor = scale[:, None]
        if log_scale is not None:
            # Far below the bound p is 0 already; -inf would make NaN of it.
            factor = factor + log_scale[:, None] * dz.clamp(min=-1000.0)
        dz.exp_().mul_(factor if slope is None else factor * slope)
        dz.index_fill_(0, is_zero.nonzero()[:, 0], 0.0)  # 0 * NaN is NaN
        if scratch is not None:
            out_c.copy_(dz)
    out[:, n_vocab:] = 0


def row_grad(
    logits: Tensor,
    log_sum_exp: Tensor,
    dense: Tensor,
    ids: Tensor,
    at_ids: Tensor,
    *,
    dense_log: Tensor | None = None,
    out: Tensor | None = None,
    n_vocab: int | None = None,
    logit_transform: LogitTransform = PLAIN,
) -> Tensor:
    """Return at_ids[r, j] at v = ids[r, j], elsewhere (dense[r] + dense_log[r] log p) p dy/dz.

    p = softmax(y[r])[v], y is logit_transform of the logits z; 0 where p is 0 and for v >= n_vocab.
    logits [P, V] as in row_stats; log_sum_exp [P] from it; dense [P]; dense_log [P] or None for
    zeros; ids [P, S] int64, distinct in a row, -1 is padding; at_ids [P, S], final values. A row
    with dense and dense_log 0 is exactly 0 outside ids, even if its logits are NaN.
    out: [P, V] floating to write into, with any row stride; may be logits. Default: a new tensor in
    the logits' dtype. Not differentiable.

    Raises ValueError or TypeError for a shape, layout, dtype, device, id or logit_transform that
    does not fit.
    """
    n_vocab = check_logits(logits, n_vocab)
    logit_transform.check()
    check_row_vector(log_sum_exp, logits, "log_sum_exp")
    check_row_vector(dense, logits, "dense")
    if dense_log is not None:
        check_row_vector(dense_log, logits, "dense_log")
    check_ids(ids, logits, n_vocab)
    if at_ids.shape != ids.shape:
        raise ValueError(
            f"at_ids has shape {tuple(at_ids.shape)}, must be that of ids, {tuple(ids.shape)}"
        )
    check_float(at_ids, "at_ids")
    check_device(at_ids, logits, "at_ids")
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    elif out.shape != logits.shape:
        raise ValueError(
            f"out has shape {tuple(out.shape)}, must be that of logits, {tuple(logits.shape)}"
        )
    else:
        check_logits(out, None, name="out")
        check_device(out, logits, "out")
    with torch.no_grad():
        grad_rows(logits, log_sum_exp, dense, ids, at_ids, out, n_vocab, logit_transform, dense_log)
    return out
