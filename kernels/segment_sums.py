"""Sums of hidden states by id: rows of a gradient by the head, of which a position lists a few.

The n terms c x h_r are sorted by id, so those of an id are a segment of them. Blocks of BLOCK_N
terms cut a long segment: a common id, found in a quarter of all rows, would otherwise be one chain
of additions while the rest of the GPU waits. Two launches:

    piece_kernel     block by block, the sum of the terms that go on from the block before
    segment_kernel   id by id, the terms up to the end of the first block, plus the pieces after it

The order of additions is fixed by the terms, without atomic ones, so two runs give the same bits.
The host never learns how many ids there are: a fixed number of programs share them out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitcask.kernels.launch import compile_options, next_power_of_2, on_device

TILE_D = 128
"""Columns of the hidden states that a program holds at a time."""
TILE_N = 16
"""Terms that a program holds at a time."""
BLOCK_N = 64
"""Terms after which a segment is cut: 4 steps of a program."""
PROGRAMS = 4096
"""Largest number of programs, each with many ids: two rounds of the 16 that a core of an H200
holds."""


@triton.jit  # type: ignore[untyped-decorator]
def sum_terms(  # type: ignore[no-untyped-def]
    row_of, coefficients, hidden, hidden_stride, first, stop, o, n_columns, TILE_N: tl.constexpr
):
    # Sum of terms first..stop - 1 at columns o, in their order.
    total = tl.zeros(o.shape, tl.float32)
    for start in range(first, stop, TILE_N):
        term = start + tl.arange(0, TILE_N)
        row = tl.load(row_of + term, mask=term < stop, other=0)
        c = tl.load(coefficients + term, mask=term < stop, other=0.0)
        h = tl.load(
            hidden + row[:, None] * hidden_stride + o[None, :],
            mask=(term < stop)[:, None] & (o < n_columns)[None, :],
            other=0.0,
        )
        total += tl.sum(c[:, None] * h.to(tl.float32), 0)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def piece_kernel(  # type: ignore[no-untyped-def]
    by_id,  # [n] int64, ascending
    row_of,  # [n] int64, row of `hidden`
    coefficients,  # [n] float32
    hidden,  # [P, D], row stride `hidden_stride`
    pieces,  # [n_blocks, D] float32; written where an id goes on from the block before
    hidden_stride,
    n,
    n_columns,
    BLOCK_N: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    # A program takes TILE_D columns of every num_programs-th block of BLOCK_N terms.
    o = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    while first < n:
        v = tl.load(by_id + first)
        before = tl.load(by_id + first - 1, mask=first > 0, other=-1)
        if (v == before) & (v >= 0):
            term = first + tl.arange(0, BLOCK_N)
            same = tl.load(by_id + term, mask=term < n, other=-1) == v
            stop = first + tl.sum(same.to(tl.int32), 0)
            total = sum_terms(
                row_of, coefficients, hidden, hidden_stride, first, stop, o, n_columns, TILE_N
            )
            to = pieces + first // BLOCK_N * n_columns
            tl.store(to + o, total, mask=o < n_columns)
        first += tl.num_programs(0).to(tl.int64) * BLOCK_N


@triton.jit  # type: ignore[untyped-decorator]
def segment_kernel(  # type: ignore[no-untyped-def]
    by_id,  # [n] int64, ascending
    starts,  # [n + 1] int64: first term of each id, then n
    n_distinct,  # [] int64: number of ids, the padding's -1 included
    row_of,  # [n] int64, row of `hidden`
    coefficients,  # [n] float32
    hidden,  # [P, D], row stride `hidden_stride`
    pieces,  # [n_blocks, D] float32, from piece_kernel
    out,  # [V, D], or [n_distinct, D] with COMPACT
    hidden_stride,
    n_columns,
    COMPACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    # A program takes TILE_D columns of every num_programs-th id: its terms up to the end of their
    # block, then the pieces of the blocks that follow.
    o = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    at = tl.program_id(0).to(tl.int64)
    end_at = tl.load(n_distinct)  # the host does not wait for it
    while at < end_at:
        first = tl.load(starts + at)
        end = tl.load(starts + at + 1)
        v = tl.load(by_id + first)
        if v >= 0:
            block = first // BLOCK_N + 1
            stop = tl.minimum(end, block * BLOCK_N)
            total = sum_terms(
                row_of, coefficients, hidden, hidden_stride, first, stop, o, n_columns, TILE_N
            )
            for start in range(block, tl.cdiv(end, BLOCK_N), TILE_N):
                each = start + tl.arange(0, TILE_N)
                piece = tl.load(
                    pieces + each[:, None] * n_columns + o[None, :],
                    mask=(each * BLOCK_N < end)[:, None] & (o < n_columns)[None, :],
                    other=0.0,
                )
                total += tl.sum(piece, 0)
            to = out + (at if COMPACT else v) * n_columns
            tl.store(to + o, total.to(out.dtype.element_ty), mask=o < n_columns)
        at += tl.num_programs(0)


def first_terms(by_id: Tensor) -> Tensor:
    """Return [n] bool, true at the first term of each id, the padding's -1 included."""
    first = torch.ones_like(by_id, dtype=torch.bool)
    torch.ne(by_id[1:], by_id[:-1], out=first[1:])
    return first


def segments(by_id: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of distinct ids [] and [n + 1] int64, the first term of each, then n.

    by_id: [n] int64, ascending, n at least 1.
    """
    n_until = first_terms(by_id).cumsum(0)  # [n] ids up to each term
    rank = torch.arange(1, len(by_id) + 2, device=by_id.device)
    return n_until[-1], torch.searchsorted(n_until, rank)


def sum_segments(
    by_id: Tensor,
    row: Tensor,
    coefficient: Tensor,
    n_distinct: Tensor,
    starts: Tensor,
    hidden: Tensor,
    out: Tensor,
    *,
    compact: bool,
) -> None:
    """Write the sum of each id's terms to `out` with the Triton kernels.

    by_id, row, coefficient: [n] terms, as in indexed_rows.Terms; n_distinct, starts: their
    segments; hidden [P, D].
    out: [V, D], where ids without terms keep their rows, or with compact [n_distinct, D], where the
    padding's -1 does if there is one.
    """
    n, n_columns = len(by_id), hidden.shape[1]
    n_blocks = -(-n // BLOCK_N)
    pieces = torch.empty(n_blocks, n_columns, dtype=torch.float32, device=hidden.device)
    tile = min(TILE_D, next_power_of_2(n_columns))
    n_tiles = -(-n_columns // tile)
    most = max(1, PROGRAMS // n_tiles)
    with on_device(hidden):
        piece_kernel[(min(n_blocks, most), n_tiles)](
            by_id,
            row,
            coefficient,
            hidden,
            pieces,
            hidden.stride(0),
            n,
            n_columns,
            BLOCK_N=BLOCK_N,
            TILE_N=TILE_N,
            TILE_D=tile,
            num_warps=4,
            **compile_options("piece_kernel", hidden),
        )
        segment_kernel[(min(n, most), n_tiles)](
            by_id,
            starts,
            n_distinct,
            row,
            coefficient,
            hidden,
            pieces,
            out,
            hidden.stride(0),
            n_columns,
            COMPACT=compact,
            BLOCK_N=BLOCK_N,
            TILE_N=TILE_N,
            TILE_D=tile,
            num_warps=4,
            **compile_options("segment_kernel", hidden),
        )
