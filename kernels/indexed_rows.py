"""Products with the few rows of the head that a position lists, instead of with all V rows.

For hidden states h [P, D], a head W [V, D], listed ids [P, S] and coefficients c [P, S]:

    logits_at       z_rj = h_r . W[ids_rj]                    gather, then a dot product
    weighted_rows   d h_r = sum_j c_rj W[ids_rj]              gather, then a weighted sum
    summed_by_id    d W_v = sum over (r, j) with ids_rj = v of c_rj h_r

The last one is a sum by id: its terms are sorted by id, stably, and each id is summed in the order
of rows (see segment_sums). So it is deterministic, where atomic additions are not. All products and
sums are in float32 (float64 for float64), from uncast operands.
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
from logitcask.kernels.launch import (
    compile_options,
    compute_dtype,
    next_power_of_2,
    on_device,
    runs_triton,
)
from logitcask.kernels.segment_sums import first_terms, segments, sum_segments

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
                **compile_options("dot_kernel", hidden),
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
                **compile_options("weighted_sum_kernel", weight),
            )
        return out
    return listed_sums(torch.where(ids < 0, 0.0, coefficients), weight, ids.clamp(min=0), dtype)


def summed_by_id(terms: Terms, hidden: Tensor, n_vocab: int, dtype: torch.dtype) -> Tensor:
    """Return [n_vocab, D] in `dtype`: per id the sum of coefficient x hidden row, or 0."""
    if not runs_triton(hidden) and dtype == terms.coefficient.dtype and len(terms.by_id):
        return sums_of_every_id(*_without_padding(terms), hidden, n_vocab)
    out = torch.zeros(n_vocab, hidden.shape[1], dtype=dtype, device=hidden.device)
    if not runs_triton(hidden):
        ids, sums = _compact_on_cpu(terms, hidden)
        out.index_copy_(0, ids, sums.to(dtype))
    elif len(terms.by_id):
        n_distinct, starts = segments(terms.by_id)
        sum_segments(*terms, n_distinct, starts, hidden, out, compact=False)
    return out


def compact_by_id(terms: Terms, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ids [U] int64, ascending, and sums [U, D] in `dtype`: summed_by_id without zero rows.

    U is a shape, so on a GPU the host waits for it.
    """
    if not runs_triton(hidden):
        ids, sums = _compact_on_cpu(terms, hidden)
        return ids, sums.to(dtype)
    if not len(terms.by_id):
        return terms.by_id, hidden.new_empty(0, hidden.shape[1], dtype=dtype)
    n_distinct, starts = segments(terms.by_id)
    n, padded = torch.stack([n_distinct, (terms.by_id[0] < 0).long()]).tolist()
    sums = torch.empty(n, hidden.shape[1], dtype=dtype, device=hidden.device)
    sum_segments(*terms, n_distinct, starts, hidden, sums, compact=True)
    return terms.by_id[starts[padded:n]], sums[padded:]


def _compact_on_cpu(terms: Terms, hidden: Tensor) -> tuple[Tensor, Tensor]:
    terms = _without_padding(terms)
    starts = first_terms(terms.by_id).nonzero()[:, 0]
    return terms.by_id[starts], sums_from(starts, terms.row, terms.coefficient, hidden)


def _without_padding(terms: Terms) -> Terms:
    n_padding = int((terms.by_id < 0).sum())
    return Terms(*(each[n_padding:] for each in terms))
