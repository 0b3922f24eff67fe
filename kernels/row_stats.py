"""Log-sum-exp and entropy of each row of logits, in one read.

With l = z - logsumexp(z) and p = exp(l):  H = -sum_v p_v l_v, where z stands for the transformed
logits (see logit_transform). Written with a shift c near the row's maximum, so that nothing
overflows and one exponential per logit is enough:

    y_v = z_v - c,   d = sum exp(y_v),   s = sum y_v exp(y_v)
    logsumexp = c + log d,   H = log d - s / d

The same read stores the maximum of every group of `group` neighboring raw logits, from which
topk_select finds the top-k without reading the row again.

A NaN or +inf logit makes its row's statistics NaN, and so does a row of -inf alone. Single -inf
logits are legal.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitcask.kernels.launch import (
    TILE,
    check_logits,
    compile_options,
    compute_dtype,
    cpu_chunk_rows,
    next_power_of_2,
    num_warps,
    on_device,
    row_chunks,
    runs_triton,
)
from logitcask.kernels.logit_transform import LN2, PLAIN, LogitTransform, transformed


class RowStats(NamedTuple):
    """Log-sum-exp and entropy of P rows."""

    log_sum_exp: Tensor
    """[P] nats; float32, or float64 for float64 logits."""
    entropy: Tensor
    """[P] nats, same dtype."""


class RowScan(NamedTuple):
    """Result of one scan of P rows."""

    stats: RowStats
    """Those of row_stats, but of a row of -inf alone the log-sum-exp is -inf."""
    group_max: Tensor | None
    """[P, n_groups (or more)]: maximum of columns [g * group, (g + 1) * group); columns past the
    last group are unset."""


def row_stats_reference(
    logits: Tensor, *, n_vocab: int | None = None, logit_transform: LogitTransform = PLAIN
) -> RowStats:
    """Return row_stats in whole-tensor torch: its specification."""
    z = logit_transform.apply(logits[:, :n_vocab].to(compute_dtype(logits.dtype)))  # [P, n_vocab]
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)  # 0 log 0 = 0
    top, at = z.max(-1)
    return RowStats(top - log_p.gather(1, at[:, None])[:, 0], entropy)


@triton.jit  # type: ignore[untyped-decorator]
def add_lanes(d, s, y, e, ROWS: tl.constexpr, N: tl.constexpr, INTO: tl.constexpr):  # type: ignore[no-untyped-def]
    # Add e and y e, [ROWS, N], to sums d and s, [ROWS, INTO]: halves of neighbors, down to a sum
    # that a thread holds for the N / INTO neighbors of its load.
    if N == INTO:
        d += e
        s = tl.fma(y, e, s)
    else:
        e_0, e_1 = tl.split(tl.reshape(e, (ROWS, N // 2, 2)))
        y_0, y_1 = tl.split(tl.reshape(y, (ROWS, N // 2, 2)))
        d, s = add_lanes(d, s, y_0, e_0, ROWS, N // 2, INTO)
        d, s = add_lanes(d, s, y_1, e_1, ROWS, N // 2, INTO)
    return d, s


@triton.jit  # type: ignore[untyped-decorator]
def scan_kernel(  # type: ignore[no-untyped-def]
    logits,  # [P, V], row stride `stride`
    log_sum_exp,  # [P] float32
    entropy,  # [P] float32
    group_max,  # [P, n_slots] float32; unused without GROUPS
    stride,
    n_vocab,
    n_slots,
    inner,
    outer,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,  # logits of a 128-bit load
    GROUPS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    # One program per row. A tile is ROWS groups of GROUP logits. Units are log2 inside: exp2 is the
    # hardware's exponential.
    row = tl.program_id(0).to(tl.int64)  # P * V passes 2^31 at a few thousand rows
    logits += row * stride
    group_max += row * n_slots
    groups = tl.arange(0, ROWS)
    offsets = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tile: tl.constexpr = ROWS * GROUP
    n_whole = (n_vocab // tile) * tile

    first = tl.load(logits + offsets, mask=offsets < n_vocab, other=-float("inf")).to(tl.float32)
    shift = transformed(tl.max(tl.max(first, 1), 0), inner, outer, 0.0, SOFTCAP)
    shift = tl.where(shift > -float("inf"), shift, 0.0)
    d_row = 0.0
    s_row = 0.0
    repeat = 1
    while repeat == 1:
        # Sums stay in their threads until the end: a reduction over threads per tile would stall
        # every step. One for each vector, because registers decide how many rows a core works on.
        d = tl.zeros((ROWS, GROUP // VECTOR), tl.float32)
        s = tl.zeros((ROWS, GROUP // VECTOR), tl.float32)
        lane_max = tl.full((ROWS,), -float("inf"), tl.float32)
        # Main loop without masks: a mask costs a select per logit once loads are pipelined.
        # Half precision loads the next tile while it computes this one (after the last one, the
        # last one again). Tiles of float32 are twice as long: those of other rows are enough.
        ahead: tl.constexpr = VECTOR > 4
        if ahead:
            following = tl.load(logits + offsets, mask=offsets < n_whole, other=0.0)
        for start in range(0, n_whole, tile):
            if ahead:
                x = following.to(tl.float32)
                to_load = tl.multiple_of(tl.minimum(start + tile, n_whole - tile), tile)
                following = tl.load(logits + to_load + offsets)
            else:
                x = tl.load(logits + start + offsets).to(tl.float32)
            # Clamped, so that -inf adds exp2(-150) = 0 and 0 * -150 = 0 without selects; NaN goes
            # through.
            y = transformed(x, inner, outer, shift, SOFTCAP)
            y = tl.maximum(y, -150.0, propagate_nan=tl.PropagateNan.ALL)
            d, s = add_lanes(d, s, y, tl.exp2(y), ROWS, GROUP, GROUP // VECTOR)
            tile_max = tl.max(x, 1)
            lane_max = tl.maximum(lane_max, tile_max)
            if GROUPS:
                tl.store(group_max + start // GROUP + groups, tile_max)
        if n_whole < n_vocab:
            o = n_whole + offsets
            x = tl.load(logits + o, mask=o < n_vocab, other=-float("inf")).to(tl.float32)
            y = transformed(x, inner, outer, shift, SOFTCAP)
            y = tl.maximum(y, -150.0, propagate_nan=tl.PropagateNan.ALL)
            e = tl.exp2(y)
            if SOFTCAP:  # else columns past the end would have the cap's mass
                e = tl.where(o < n_vocab, e, 0.0)
            d, s = add_lanes(d, s, y, e, ROWS, GROUP, GROUP // VECTOR)
            tile_max = tl.max(x, 1)
            lane_max = tl.maximum(lane_max, tile_max)
            if GROUPS:
                slot = n_whole // GROUP + groups
                tl.store(group_max + slot, tile_max, mask=slot < n_slots)
        d_row = tl.sum(tl.sum(d, 1), 0)
        s_row = tl.sum(tl.sum(s, 1), 0)
        # The shift was the first tile's maximum. Far from the true one, log2(d) and s / d are large
        # numbers whose difference is the entropy: 32 keeps that error near 2e-6. Rare, so the row
        # is simply read again. Not a row of -inf alone: the new shift is its log-sum-exp, unless
        # there is a NaN, which the sums have and a maximum does not.
        top = transformed(tl.max(lane_max, 0), inner, outer, 0.0, SOFTCAP)
        far = tl.abs(top - shift) > 32.0
        repeat = (far & (top > -float("inf"))).to(tl.int32)
        shift = tl.where(far, top, shift)
    log_d = tl.log2(d_row)
    tl.store(log_sum_exp + row, (shift + log_d) * LN2)
    tl.store(entropy + row, (log_d - s_row / d_row) * LN2)


def scan_rows(
    logits: Tensor,
    n_vocab: int,
    group: int,
    logit_transform: LogitTransform = PLAIN,
    exp_out: Tensor | None = None,
) -> RowScan:
    """Compute row_stats of [P, V] logits without checks, and group maxima where group > 0.

    exp_out: gets exp(y - max y) [P, n_vocab] on a CPU; not the logits.
    """
    if runs_triton(logits):
        return _scan_triton(logits, n_vocab, group, logit_transform)
    return _scan_torch(logits[:, :n_vocab], group, logit_transform, exp_out)


def _scan_triton(
    logits: Tensor, n_vocab: int, group: int, logit_transform: LogitTransform
) -> RowScan:
    n_rows = logits.shape[0]
    width = group or 64
    tile = min(TILE, max(next_power_of_2(n_vocab), width))
    # Rows of the scratch start on 64-byte lines, so that they are written and read in wide words.
    n_slots = -(-n_vocab // (16 * width)) * 16
    lse = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(lse)
    group_max = lse.new_empty(n_rows, n_slots) if group else None
    softcap = logit_transform.softcap is not None
    if n_rows:
        with on_device(logits):
            scan_kernel[(n_rows,)](
                logits,
                lse,
                entropy,
                lse if group_max is None else group_max,
                logits.stride(0),
                n_vocab,
                n_slots,
                *logit_transform.factors(),
                ROWS=tile // width,
                GROUP=width,
                VECTOR=16 // logits.element_size(),
                GROUPS=group_max is not None,
                SOFTCAP=softcap,
                num_warps=num_warps(tile),
                **compile_options("scan_kernel", logits, softcap),
            )
    return RowScan(RowStats(lse, entropy), group_max)


def _scan_torch(
    z: Tensor, group: int, logit_transform: LogitTransform, exp_out: Tensor | None
) -> RowScan:
    n_rows, n_vocab = z.shape
    lse = z.new_empty(n_rows, dtype=compute_dtype(z.dtype))
    entropy = torch.empty_like(lse)
    group_max = z.new_empty(n_rows, -(-n_vocab // group)) if group else None
    chunk_rows = cpu_chunk_rows(n_vocab)
    shifted = lse.new_empty(min(chunk_rows, n_rows), n_vocab)
    exp = torch.empty_like(shifted) if exp_out is None else exp_out
    for rows in row_chunks(n_rows, chunk_rows):
        z_c = z[rows]
        if group_max is None:
            top = z_c.amax(-1)  # [C]
        else:
            _group_max_torch(z_c, group, out=group_max[rows])
            top = group_max[rows].amax(-1)
        top = logit_transform.apply(top.to(lse.dtype))
        top.masked_fill_(top == -torch.inf, 0.0)  # a log-sum-exp of -inf, and not NaN as with a NaN
        if not logit_transform.is_plain:
            z_c = logit_transform.apply(z_c.to(lse.dtype))
        y = torch.sub(z_c, top[:, None], out=shifted[: z_c.shape[0]])
        y.clamp_(min=-1e4)  # -inf adds exp(-1e4) = 0, and 0 * -1e4 = 0 instead of NaN
        e = torch.exp(y, out=exp[: z_c.shape[0]] if exp_out is None else exp[rows])
        d = e.sum(-1)
        log_d = d.log()
        torch.add(top, log_d, out=lse[rows])
        torch.sub(log_d, y.mul_(e).sum(-1) / d, out=entropy[rows])
    return RowScan(RowStats(lse, entropy), group_max)


def group_maxima(logits: Tensor, n_vocab: int, group: int) -> Tensor:
    """Return RowScan.group_max alone, [P, n_groups (or more)], without statistics."""
    if runs_triton(logits):
        group_max = _scan_triton(logits, n_vocab, group, PLAIN).group_max
        assert group_max is not None
        return group_max
    group_max = logits.new_empty(logits.shape[0], -(-n_vocab // group))
    _group_max_torch(logits[:, :n_vocab], group, out=group_max)
    return group_max


def _group_max_torch(z: Tensor, group: int, out: Tensor) -> None:
    n_whole = z.shape[1] // group
    torch.amax(z[:, : n_whole * group].view(-1, n_whole, group), -1, out=out[:, :n_whole])
    if n_whole < out.shape[1]:
        out[:, n_whole] = z[:, n_whole * group :].amax(-1)


def row_stats(
    logits: Tensor, *, n_vocab: int | None = None, logit_transform: LogitTransform = PLAIN
) -> RowStats:
    """Return log-sum-exp and entropy of each row of `logits` [P, V], in nats. Not differentiable.

    logits: bfloat16, float16, float32, or float64 on a CPU; contiguous along V, the row stride may
    exceed V.
    n_vocab: rows are normalized over columns [0, n_vocab); the columns after it, the padding of a
    head, are never read.
    logit_transform: scale, soft cap and temperature of the logits.

    Raises ValueError or TypeError for a shape, layout, dtype, n_vocab or logit_transform that
    does not fit.
    """
    n_vocab = check_logits(logits, n_vocab)
    logit_transform.check()
    with torch.no_grad():
        lse, entropy = scan_rows(logits, n_vocab, group=0, logit_transform=logit_transform).stats
        empty = lse == -torch.inf
        return RowStats(lse.masked_fill(empty, torch.nan), entropy.masked_fill(empty, torch.nan))
