"""Columns of stored rows as arrays, for probes that read the store alone."""

import numpy as np

from logitcask.engine.exchange.positions import Block
from logitcask.engine.store.format.ragged import matrix
from logitcask.engine.types import Array


def column_of(block: Block, name: str) -> Array:
    """Return [P] the values of a column that every row has."""
    column = block[name]
    assert column is not None, "a column of rollouts"
    values: Array = column.values
    return values


def counted_rows(block: Block) -> Array:
    """Return [P] bool, the scored rows that count in a loss."""
    counts: Array = column_of(block, "loss_mask").astype(bool)
    scores = block["teacher_entropy"]
    assert scores is not None, "a column of scores"
    return counts if scores.valid is None else counts & scores.valid


def numbers_of(block: Block, name: str) -> Array:
    """Return [P] float64, the values of a column; NaN where a row, or the store, has none."""
    column = block.get(name)
    if column is None:
        return np.full(len(column_of(block, "loss_mask")), np.nan)
    values: Array = column.values.astype(np.float64)
    return values if column.valid is None else np.where(column.valid, values, np.nan)


def teacher_entropy(block: Block) -> Array:
    """Return [P] float64, nats.

    A server returns the best ids alone: the middle of the interval stands for its entropy.
    """
    lower = numbers_of(block, "teacher_entropy")
    if block.get("teacher_entropy_upper") is None:
        return lower
    return (lower + numbers_of(block, "teacher_entropy_upper")) / 2


def lists_of(
    block: Block, ids: str, log_probs: str, rows: Array | None = None
) -> tuple[Array, Array]:
    """Return ([P, W] int64 ids, [P, W] float64 log-probs), best first, of all rows or some [P].

    A row with fewer than W has ids 0 of log-prob -inf at its end.
    """
    column = block[ids]
    assert column is not None, "a column of scores or of the student's lists"
    assert column.counts is not None, "a column of lists"
    wide, _ = matrix(column.values, column.counts, 0)
    log_p, _ = matrix(column_of(block, log_probs), column.counts, -np.inf)
    chosen = slice(None) if rows is None else rows
    return wide[chosen].astype(np.int64), log_p[chosen].astype(np.float64)
