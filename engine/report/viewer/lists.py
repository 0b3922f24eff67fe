"""Top lists of rows: flat entries, best first in each row, and their counts."""

from dataclasses import dataclass

import numpy as np

from logitcask.engine.exchange.positions import Block, Column
from logitcask.engine.probes.columns import column_of
from logitcask.engine.store.format.ragged import (
    count_marked,
    find,
    index_in_row,
    row_of_entry,
    starts,
)
from logitcask.engine.types import Array


@dataclass(frozen=True, slots=True)
class Lists:
    """Entries of P rows."""

    counts: Array
    """[P]."""
    ids: Array
    """[E] uint32."""
    log_probs: Array
    """[E] float64, nats."""

    def marked(self, marks: Array) -> "Lists":
        """Return the entries with a mark, [E] bool."""
        return Lists(count_marked(marks, self.counts), self.ids[marks], self.log_probs[marks])


def block_at(block: Block, rows: Array) -> Block:
    """Return a block of some rows of a block, in their order; lists of null are empty."""
    return {name: None if each is None else _column_at(each, rows) for name, each in block.items()}


def _column_at(column: Column, rows: Array) -> Column:
    valid = None if column.valid is None else column.valid[rows]
    if column.counts is None:
        return Column(column.values[rows], valid=valid)
    counts = column.counts[rows] if valid is None else np.where(valid, column.counts[rows], 0)
    entries = np.repeat(starts(column.counts)[rows], counts) + index_in_row(counts)
    return Column(column.values[entries], counts, valid)


def lists_of(block: Block, ids: str, log_probs: str) -> Lists:
    """Return the lists of a block; without such a column they are empty."""
    column = block.get(ids)
    if column is None:
        rows, none = len(column_of(block, "token")), np.zeros(0)
        return Lists(np.zeros(rows, np.uint16), none.astype(np.uint32), none)
    assert column.counts is not None, "a column of lists"
    return Lists(column.counts, column.values, column_of(block, log_probs).astype(np.float64))


def log_probs_at(lists: Lists, others: Lists) -> Array:
    """Return [E] the log-prob in `lists` of each entry of other lists; NaN = it is not there."""
    at = find(lists.ids, lists.counts, others.ids, others.counts)
    found = np.full(len(at), np.nan)
    present = at >= 0
    entry = np.repeat(starts(lists.counts)[:-1], others.counts) + at
    found[present] = lists.log_probs[entry[present]]
    return found


def holds(lists: Lists, tokens: Array) -> Array:
    """Return [P] bool, the token [P] of each row is in its list."""
    hits = lists.ids == np.repeat(tokens, lists.counts)
    marked: Array = count_marked(hits, lists.counts) > 0
    return marked


def top(lists: Lists, most: int, mass: float) -> Array:
    """Mark [E] the first entries of each row, `most` at most, until they have this mass."""
    probabilities = np.exp(lists.log_probs)
    before = np.concatenate([[0.0], np.cumsum(probabilities)])[:-1]
    at_start = np.append(before, 0.0)[starts(lists.counts)[:-1]]
    within = before - at_start[row_of_entry(lists.counts)] if len(before) else before
    marks: Array = (index_in_row(lists.counts) < most) & (within < mass)
    return marks


def mass_of(lists: Lists, marks: Array) -> Array:
    """Sum [P] the probabilities of the marked entries [E] of each row."""
    rows = row_of_entry(lists.counts)[marks]
    total: Array = np.bincount(
        rows, np.exp(lists.log_probs[marks]), minlength=len(lists.counts)
    ).astype(np.float64)
    return total
