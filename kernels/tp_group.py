"""Messages between the ranks of a vocabulary-parallel call.

First each rank sends one line of integers, before any logit is read: the place of its columns, and
the numbers that must be equal on all ranks. A rank that rejects its own input sends that in its
line. So a call that cannot work raises on every rank, and none waits for one that has raised. The
host waits for the lines, on a GPU too.

Ranks are those of the group, and everything is gathered in their order, so every rank computes from
the same bits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

LINE = 16
"""Numbers of a line, filled up with 0. Fixed, so that any two calls can read each other."""


class Shards(NamedTuple):
    """The columns of each rank of a group. A column counts if its id is below n_vocab."""

    group: "dist.ProcessGroup | None"
    first: int
    """Id of this rank's first column."""
    n_own: int
    """Number of this rank's columns that count."""
    ranks: list[int]
    """All ranks, in the order of their columns."""
    counts: list[int]
    """Number of columns of each of `ranks` that count."""


def all_gather(tensor: Tensor, group: "dist.ProcessGroup | None") -> list[Tensor]:
    """Return the tensors of all ranks; all have one shape and dtype."""
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return parts


def all_sum(tensor: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """Sum the tensors of all ranks in place."""
    if tensor.numel():
        dist.all_reduce(tensor, group=group)
    return tensor


def fingerprint(tensor: Tensor) -> Tensor:
    """Return an int64 [] that differs for different tensors, up to chance.

    It is the sum modulo 2^64 of the 64 bits of the numbers, each times its own odd number.
    """
    bits = tensor.double().view(torch.int64) if tensor.is_floating_point() else tensor
    odd = torch.arange(bits.numel(), device=bits.device) * 0x1E3779B97F4A7C15
    odd = (odd ^ (odd >> 29)) * 0x3F58476D1CE4E5B9 | 1
    return (bits.flatten() * odd).sum()


def _is_member(group: "dist.ProcessGroup | None") -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_rank(group) >= 0


def check_group(group: "dist.ProcessGroup | None") -> None:
    """Raise ValueError unless this process is in the group."""
    if not _is_member(group):
        raise ValueError(
            f"group={group} must be a process group with this process in it, None for all; call "
            "torch.distributed.init_process_group, or use sparse_kl if one process has all columns"
        )


@contextmanager
def gather_errors(group: "dist.ProcessGroup | None", device: torch.device) -> Iterator[None]:
    """Make `join` raise on the other ranks if the block, which checks a rank's input, raises."""
    try:
        yield
    except Exception:
        if _is_member(group):
            all_gather(torch.zeros(LINE, dtype=torch.int64, device=device), group)
        raise


def join(
    group: "dist.ProcessGroup | None",
    first: int,
    n_columns: int,
    n_vocab: int,
    ids: Tensor,
    row_weight: Tensor | None,
    equal: Mapping[str, int],
) -> Shards:
    """Exchange lines with the other ranks; this rank has n_columns columns from `first`.

    ids [P, S], row_weight [P], n_vocab and the numbers `equal` (by name) must be equal on all
    ranks; `equal` holds the same names on all.

    Raises ValueError on every rank if one rejected its input, if the numbers are not equal, if the
    shards do not follow each other from column 0, or if n_vocab exceeds their columns.
    """
    numbers = {"rows": ids.shape[0], "ids per row": ids.shape[1], "n_vocab": n_vocab, **equal}
    data = {"ids": ids, "row_weight": ids.new_zeros(0) if row_weight is None else row_weight}
    head = torch.tensor([1, first, n_columns, *numbers.values()], device=ids.device)
    line = torch.cat([head, *(fingerprint(tensor)[None] for tensor in data.values())])
    line = torch.cat([line, line.new_zeros(LINE - len(line))])
    lines = torch.stack(all_gather(line, group)).tolist()
    _check_equal(lines, [*numbers, *(f"fingerprint of {name}" for name in data)])
    ranks = sorted(range(len(lines)), key=lambda rank: lines[rank][1])
    _check_tiles(lines, ranks, n_vocab)
    counts = [min(max(n_vocab - lines[rank][1], 0), lines[rank][2]) for rank in ranks]
    n_own = counts[ranks.index(dist.get_rank(group))]
    return Shards(group, first, n_own, ranks, counts)


def _check_equal(lines: list[list[int]], names: list[str]) -> None:
    """Raise ValueError for a rank that rejected its input, or numbers that differ."""
    for rank, line in enumerate(lines):
        if line[0] == 0:
            raise ValueError(
                f"rank {rank} of the group rejected its input, which ends the call on all ranks; "
                "see the error on that rank"
            )
    for rank, line in enumerate(lines):
        for name, here, there in zip(names, lines[0][3:], line[3:], strict=False):
            if here != there:
                raise ValueError(
                    f"{name}: {here} on rank 0 and {there} on rank {rank} of the group, must be "
                    "equal; pass the same rows and options on all ranks"
                )


def _check_tiles(lines: list[list[int]], ranks: list[int], n_vocab: int) -> None:
    """Raise ValueError unless the shards cover columns 0 to n_vocab without gaps."""
    end = 0
    for rank in ranks:
        _, first, n_columns = lines[rank][:3]
        if first != end:
            raise ValueError(
                f"first={first} on rank {rank} of the group must be {end}, where the columns of "
                "the shards before it end; pass their number of columns"
            )
        end += n_columns
    if n_vocab > end:
        raise ValueError(
            f"n_vocab={n_vocab} must lie in 1..{end}, the columns of all shards; "
            "pass the ids of the whole head"
        )
