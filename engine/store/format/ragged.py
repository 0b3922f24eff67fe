"""Arithmetic on ragged arrays: flat entries, and the counts of P rows.

Two ragged arrays A and B over the same P rows are compared row by row, one column of A at a time:
the j-th entry of every row of A with all entries of B. Rows are taken in blocks that fit the CPU's
cache, in a block the long rows of A first, so that a column touches only the rows that have it.
"""

from collections.abc import Iterator

import numpy as np

from logitcask.engine.types import Array

_BLOCK = 8192
"""Rows: a block of 16 uint16 entries is 256 KiB."""


def starts(cnt: Array) -> Array:
    """Return the offsets [P + 1] int64 of counts [P]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(cnt, dtype=np.int64)])


def check_offsets(off: Array, total: int) -> None:
    """Raise ValueError where offsets do not divide `total` entries into rows."""
    # Not by differences, which wrap around.
    if len(off) == 0 or off[0] != 0 or off[-1] != total or (off[1:] < off[:-1]).any():
        raise ValueError(f"offsets that do not divide {total} entries")


def check_counts(cnt: Array, total: int, most: int) -> None:
    """Raise ValueError where counts do not add up to `total`, or one is above `most`."""
    if int(cnt.sum(dtype=np.int64)) != total:
        raise ValueError(f"counts that do not add up to {total} entries")
    if int(cnt.max(initial=0)) > most:
        raise ValueError(f"a row of {int(cnt.max())} entries, at most {most} are stored")


def has_duplicates(ids: Array, cnt: Array) -> bool:
    """Return whether a row names an id twice."""
    keys = (row_of_entry(cnt).astype(np.uint64) << np.uint64(32)) | ids.astype(np.uint64)
    keys.sort()
    return bool((keys[1:] == keys[:-1]).any())


def row_of_entry(cnt: Array) -> Array:
    """Return the row of each entry, int64, from counts [P]."""
    return np.repeat(np.arange(len(cnt), dtype=np.int64), cnt)


def index_in_row(cnt: Array) -> Array:
    """Return the index of each entry in its row, int64, from counts [P]."""
    offset = starts(cnt)
    index: Array = np.arange(offset[-1], dtype=np.int64) - np.repeat(offset[:-1], cnt)
    return index


def count_marked(marks: Array, cnt: Array) -> Array:
    """Count the marked entries of each row, [P] uint16."""
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(marks, dtype=np.int64)])
    return np.diff(total[starts(cnt)]).astype(np.uint16)


def matrix(flat: Array, cnt: Array, pad: float) -> tuple[Array, Array]:
    """Pad to ([P, K] entries, [P, K] bool: an entry, not padding), K the longest row."""
    width = int(cnt.max(initial=0))
    valid = np.arange(width) < cnt.astype(np.int64)[:, None]
    if len(flat) == valid.size:
        return flat.reshape(valid.shape), valid
    out = np.full(valid.shape, pad, flat.dtype)
    out[valid] = flat
    return out, valid


def count_less(a: Array, a_cnt: Array, b: Array, b_cnt: Array) -> Array:
    """Count for each entry of B the lesser entries of A in the same row, [B] uint16."""
    out = np.empty(len(b), np.uint16)
    for block in _blocks(a_cnt, b_cnt):
        wide, valid = matrix(b[block.of_b], b_cnt[block.rows], 0)
        wide = wide[block.order]
        found = np.zeros(wide.shape, np.uint8 if block.longest < 256 else np.uint16)
        for at, reach in block.columns():
            found[:reach] += a[at][:, None] < wide[:reach]
        out[block.of_b] = block.flat(found, valid)
    return out


def rank_in_row(b: Array, b_cnt: Array) -> Array:
    """Count for each entry the lesser entries of its own row, [B] uint16; of unsigned numbers."""
    out = np.empty(len(b), np.uint16)
    b_start = starts(b_cnt)
    for first in range(0, len(b_cnt), _BLOCK):
        part = slice(first, min(first + _BLOCK, len(b_cnt)))
        of_b = slice(int(b_start[part.start]), int(b_start[part.stop]))
        wide, valid = matrix(b[of_b], b_cnt[part], 0)
        if not valid.all():
            # One long row would make all others as long.
            out[of_b] = count_less(b[of_b], b_cnt[part], b[of_b], b_cnt[part])
            continue
        found = np.zeros(wide.shape, np.uint8 if wide.shape[1] < 256 else np.uint16)
        for column in range(wide.shape[1]):
            found += wide[:, column : column + 1] < wide
        out[of_b] = found.reshape(-1)
    return out


def find(a: Array, a_cnt: Array, b: Array, b_cnt: Array) -> Array:
    """Return the index [B] int32 of each entry of B in its row of A, -1 where it is absent.

    Entries of a row of A are distinct.
    """
    out = np.empty(len(b), np.int32)
    for block in _blocks(a_cnt, b_cnt):
        wide, valid = matrix(b[block.of_b], b_cnt[block.rows], 0)
        wide = wide[block.order]
        found = np.zeros(wide.shape, np.uint16)
        for j, (at, reach) in enumerate(block.columns()):
            found[:reach] |= (a[at][:, None] == wide[:reach]) * np.uint16(j + 1)
        out[block.of_b] = block.flat(found, valid)
    return out - 1


def remaining(taken: Array, taken_cnt: Array, rest_cnt: Array) -> Array:
    """Return the ranks [sum of rest_cnt] uint16 other than `taken` [T], ascending in each row.

    A row has taken_cnt + rest_cnt ranks. Raises ValueError where a rank is taken twice or lies
    outside its row.
    """
    out = np.empty(int(rest_cnt.sum(dtype=np.int64)), np.uint16)
    for block in _blocks(rest_cnt, taken_cnt):
        wide, valid = matrix(taken[block.of_b], taken_cnt[block.rows], 0)
        ranks = (taken_cnt[block.rows].astype(np.int32) + rest_cnt[block.rows])[:, None]
        if ((wide.astype(np.int32) >= ranks) & valid).any():
            raise ValueError("a rank lies outside its row")
        width = int(ranks.max(initial=0))
        free = np.arange(width, dtype=np.int32) < ranks
        at = np.arange(len(ranks), dtype=np.int32)[:, None] * width + wide
        free.reshape(-1)[at if valid.all() else at[valid]] = False
        left = np.flatnonzero(free)
        # No row can have fewer left than rest_cnt, so a row with more shows in the sum.
        if len(left) != block.of_a.stop - block.of_a.start:
            raise ValueError("two ids have one rank")
        out[block.of_a] = left.astype(np.int32) % max(width, 1)
    return out


class _Block:
    """A slice of rows, ordered by their number of entries of A, descending."""

    def __init__(self, rows: slice, of_a: slice, of_b: slice, a_cnt: Array) -> None:
        self.rows = rows
        self.of_a, self.of_b = of_a, of_b
        """Slices of their entries of A and of B."""
        counts = a_cnt[rows].astype(np.int32)
        # uint16 is sorted by radix, several times faster.
        self.order = np.argsort((0xFFFF - counts).astype(np.uint16), kind="stable")
        self._counts = counts[self.order]
        self._starts = (of_a.start + starts(counts)[:-1])[self.order]
        self.longest = int(self._counts[0]) if len(counts) else 0

    def columns(self) -> Iterator[tuple[Array, int]]:
        """Yield the indices [n] of each column of A, for the first n rows of `order`."""
        reaches = np.searchsorted(-self._counts, -np.arange(self.longest), side="left")
        for j, reach in enumerate(reaches.tolist()):
            yield self._starts[:reach] + j, reach

    def flat(self, found: Array, valid: Array) -> Array:
        """Return the flat entries of B, in their own order, of [n, K] in the block's order."""
        out = np.empty_like(found)
        out[self.order] = found
        entries: Array = out.reshape(-1) if valid.all() else out[valid]
        return entries


def _blocks(a_cnt: Array, b_cnt: Array) -> Iterator[_Block]:
    a_start, b_start = starts(a_cnt), starts(b_cnt)
    for first in range(0, len(a_cnt), _BLOCK):
        last = min(first + _BLOCK, len(a_cnt))
        yield _Block(
            slice(first, last),
            slice(int(a_start[first]), int(a_start[last])),
            slice(int(b_start[first]), int(b_start[last])),
            a_cnt,
        )
