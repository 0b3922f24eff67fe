"""Products with the few rows of the head that a position lists, instead of with all V rows.

For hidden states h [P, D], a head W [V, D], listed ids [P, S] and coefficients c [P, S]:

    logits_at       z_rj = h_r . W[ids_rj]                    gather, then a dot product
    weighted_rows   d h_r = sum_j c_rj W[ids_rj]              gather, then a weighted sum
    summed_by_id    d W_v = sum over (r, j) with ids_rj = v of c_rj h_r

The last one is a sum by id: its terms are sorted by id, stably, and each id is summed by one
program in the order of rows. So it is deterministic, where atomic additions are not. All products
and sums are in float32 (float64 for float64), from uncast operands.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitcask.kernels.indexed_cpu import (
    listed_products,
    listed_sums,
    sums_from,
    sums_of_every_id,
)
from logitcask.kernels.launch import compute_dtype, next_power_of_2, on_device, runs_triton

TILE_D = 128
"""Columns of the head that a program holds at a time."""
TILE_S = 16
"""Listed rows that a program holds at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def dot_kernel(  # type: ignore[no-untyped-def]
    hidden,  # [P, D], row stride `hidden_stride`
    weight,  # [V, D], row stride `weight_stride`
    ids,  # [P, S] int64
    out,  # [P, S] float32
    hidden_stride,
    weight_stride,
    n_ids,
    n_columns,
    TILE_S: tl.constexpr,
    TILE_D: tl.constexpr,
):
    # One program per row and TILE_S of its ids.
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * TILE_S + tl.arange(0, TILE_S)
    v = tl.load(ids + row * n_ids + slot, mask=slot < n_ids, other=-1)
    listed = v >= 0
    d = tl.arange(0, TILE_D)
    total = tl.zeros((TILE_S, TILE_D), tl.float32)
    for start in range(0, n_columns, TILE_D):
        o = start + d
        h = tl.load(hidden + row * hidden_stride + o, mask=o < n_columns, other=0.0)
        w = tl.load(
            weight + v[:, None] * weight_stride + o[None, :],
            mask=listed[:, None] & (o < n_columns)[None, :],
            other=0.0,
        )
        total += w.to(tl.float32) * h.to(tl.float32)[None, :]
    z = tl.where(listed, tl.sum(total, 1), -float("inf"))
    tl.store(out + row * n_ids + slot, z, mask=slot < n_ids)


@triton.jit  # type: ignore[untyped-decorator]
def weighted_sum_kernel(  # type: ignore[no-untyped-def]
    coefficients,  # [P, S] float32
    weight,  # [V, D], row stride `weight_stride`
    ids,  # [P, S] int64
    out,  # [P, D]
    weight_stride,
    n_ids,
    n_columns,
    TILE_S: tl.constexpr,
    TILE_D: tl.constexpr,
):
    # One program per row and TILE_D columns.
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    total = tl.zeros((TILE_D,), tl.float32)
    for start in range(0, n_ids, TILE_S):
        slot = start + tl.arange(0, TILE_S)
        v = tl.load(ids + row * n_ids + slot, mask=slot < n_ids, other=-1)
        c = tl.load(coefficients + row * n_ids + slot, mask=slot < n_ids, other=0.0)
        listed = v >= 0
        w = tl.load(
            weight + v[:, None] * weight_stride + o[None, :],
            mask=listed[:, None] & (o < n_columns)[None, :],
            other=0.0,
        )
        total += tl.sum(tl.where(listed, c, 0.0)[:, None] * w.to(tl.float32), 0)
    tl.store(out + row * n_columns + o, total.to(out.dtype.element_ty), mask=o < n_columns)


@triton.jit  # type: ignore[untyped-decorator]
def segment_kernel(  # type: ignore[no-untyped-def]
    by_id,  # [n] int64, ascending
    target,  # [n] int64, the row of `out` that an id is summed into
    row_of,  # [n] int64, row of `hidden`
    coefficients,  # [n] float32
    hidden,  # [P, D], row stride `hidden_stride`
    out,  # [V or n distinct ids, D]
    hidden_stride,
    n,
    n_columns,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    # One program per term and TILE_D columns. The one at the first term of an id sums all of them,
    # the others leave at once.
    first = tl.program_id(0).to(tl.int64)
    v = tl.load(by_id + first)
    before = tl.load(by_id + first - 1, mask=first > 0, other=-1)
    if v != before:  # the terms of padding, -1, come first and equal `before`
        o = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
        total = tl.zeros((TILE_D,), tl.float32)
        at = first
        more = 1
        while more == 1:
            term = at + tl.arange(0, TILE_N)
            same = tl.load(by_id + term, mask=term < n, other=-1) == v
            row = tl.load(row_of + term, mask=same, other=0)
            c = tl.load(coefficients + term, mask=same, other=0.0)
            h = tl.load(
                hidden + row[:, None] * hidden_stride + o[None, :],
                mask=same[:, None] & (o < n_columns)[None, :],
                other=0.0,
            )
            total += tl.sum(c[:, None] * h.to(tl.float32), 0)
            more = tl.min(same.to(tl.int32), 0)
            at += TILE_N
        to = tl.load(target + first)
        tl.store(out + to * n_columns + o, total.to(out.dtype.element_ty), mask=o < n_columns)


class Terms(NamedTuple):
    """The n = P S terms of summed_by_id, sorted by id; padding, with id -1, comes first."""

    by_id: Tensor
    """[n] int64, ascending."""
    row: Tensor
    """[n] int64, ascending within an id."""
    coefficient: Tensor
    """[n]"""


def sorted_terms(coefficients: Tensor, ids: Tensor) -> Terms:
    """Sort the terms of coefficients [P, S] at ids [P, S] by id.

    A coefficient of 0 counts as padding: 0 times a NaN in a hidden state would be NaN.
    """
    flat = torch.where(coefficients == 0, -1, ids).flatten()
    by_id, order = flat.sort(stable=True)
    return Terms(by_id, order // max(ids.shape[1], 1), coefficients.flatten()[order])


def logits_at(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Return logits [P, S] of hidden [P, D] at ids [P, S] of the head weight [V, D]; -inf at -1."""
    dtype = compute_dtype(hidden.dtype)
    n_columns = hidden.shape[1]
    if ids.numel() == 0:
        return torch.empty(ids.shape, dtype=dtype, device=hidden.device)
    if runs_triton(hidden):
        z = torch.empty(ids.shape, dtype=dtype, device=hidden.device)
        with on_device(hidden):
            dot_kernel[(len(ids), -(-ids.shape[1] // TILE_S))](
                hidden,
                weight,
                ids.contiguous(),
                z,
                hidden.stride(0),
                weight.stride(0),
                ids.shape[1],
                n_columns,
                TILE_S=TILE_S,
                TILE_D=min(TILE_D, next_power_of_2(n_columns)),
                num_warps=4,
                enable_fp_fusion=True,  # the default differs between versions of Triton
            )
        return z
    z = listed_products(hidden, weight, ids.clamp(min=0), dtype)
    return z.masked_fill_(ids < 0, -torch.inf)


def weighted_rows(coefficients: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [P, D] in `dtype`: rows of weight [V, D] at ids, weighted by coefficients [P, S]."""
    n_rows, n_ids = ids.shape
    n_columns = weight.shape[1]
    if ids.numel() == 0:
        return torch.zeros(n_rows, n_columns, dtype=dtype, device=weight.device)
    if runs_triton(weight):
        out = torch.empty(n_rows, n_columns, dtype=dtype, device=weight.device)
        tile = min(TILE_D, next_power_of_2(n_columns))
        with on_device(weight):
            weighted_sum_kernel[(n_rows, -(-n_columns // tile))](
                coefficients.contiguous(),
                weight,
                ids.contiguous(),
                out,
                weight.stride(0),
                n_ids,
                n_columns,
                TILE_S=TILE_S,
                TILE_D=tile,
                num_warps=4,
                enable_fp_fusion=True,
            )
        return out
    return listed_sums(torch.where(ids < 0, 0.0, coefficients), weight, ids.clamp(min=0), dtype)


def summed_by_id(terms: Terms, hidden: Tensor, n_vocab: int, dtype: torch.dtype) -> Tensor:
    """Return [n_vocab, D] in `dtype`: per id the sum of coefficient x hidden row, or 0."""
    if not runs_triton(hidden) and dtype == terms.coefficient.dtype and len(terms.by_id):
        return sums_of_every_id(*_without_padding(terms), hidden, n_vocab)
    out = torch.zeros(n_vocab, hidden.shape[1], dtype=dtype, device=hidden.device)
    if runs_triton(hidden):
        _sum_segments(terms, terms.by_id, hidden, out)
    else:
        ids, sums = _compact_on_cpu(terms, hidden)
        out.index_copy_(0, ids, sums.to(dtype))
    return out


def compact_by_id(terms: Terms, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ids [U] int64, ascending, and sums [U, D] in `dtype`: summed_by_id without zero rows.

    On a GPU the host waits for U.
    """
    if not runs_triton(hidden):
        ids, sums = _compact_on_cpu(terms, hidden)
        return ids, sums.to(dtype)
    first = _first_terms(terms)
    ids, target = terms.by_id[first], first.cumsum(0) - 1
    sums = torch.zeros(len(ids), hidden.shape[1], dtype=dtype, device=hidden.device)
    _sum_segments(terms, target, hidden, sums)
    listed = ids >= 0
    return ids[listed], sums[listed]


def _sum_segments(terms: Terms, target: Tensor, hidden: Tensor, out: Tensor) -> None:
    """Write the sum of each id to row `target` [n] of `out` with the Triton kernel."""
    n, n_columns = len(terms.by_id), hidden.shape[1]
    if n == 0:
        return
    tile = min(TILE_D, next_power_of_2(n_columns))
    with on_device(hidden):
        segment_kernel[(n, -(-n_columns // tile))](
            terms.by_id,
            target,
            terms.row,
            terms.coefficient,
            hidden,
            out,
            hidden.stride(0),
            n,
            n_columns,
            TILE_N=TILE_S,
            TILE_D=tile,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _compact_on_cpu(terms: Terms, hidden: Tensor) -> tuple[Tensor, Tensor]:
    terms = _without_padding(terms)
    starts = _first_terms(terms).nonzero()[:, 0]
    return terms.by_id[starts], sums_from(starts, terms.row, terms.coefficient, hidden)


def _without_padding(terms: Terms) -> Terms:
    n_padding = int((terms.by_id < 0).sum())
    return Terms(*(each[n_padding:] for each in terms))


def _first_terms(terms: Terms) -> Tensor:
    """Return [n] bool, true at the first term of each id, the padding's -1 included."""
    first = torch.ones_like(terms.by_id, dtype=torch.bool)
    torch.ne(terms.by_id[1:], terms.by_id[:-1], out=first[1:])
    return first
