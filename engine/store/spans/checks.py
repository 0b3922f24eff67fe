"""Checks of scores of spans, before a commit and of segments from other stores."""

from typing import Any

import numpy as np

import logitcask.engine.store.format.ragged as ragged
import logitcask.engine.store.format.schema as schema
from logitcask.engine.alignment.span_scores import END, GAP, NO_TWIN, NONE, PATCHED, SpanScores
from logitcask.engine.store.format.checks import entropy_fault, log_prob_fault
from logitcask.engine.store.spans.arrays import ENTRY_FIELDS, FIELDS, LAYOUT_OF
from logitcask.engine.types import Array

_MOST_TOKENS = 0xFFFF
"""Teacher's tokens of one span."""
_MOST_TWIN = 0xFFFFFFFE
"""The highest id of a student: the next one stands for 'no twin' in a decoded unit."""


def check_structure(scores: SpanScores, seq_off: Array) -> None:
    """Check that the arrays fit each other and the student's sequences: seq_off [N + 1].

    Raises ValueError.
    """
    _check_shapes(scores, seq_off)
    ragged.check_offsets(scores.offsets, len(scores.tokens))
    for marks, off in ((scores.marks, scores.offsets), (scores.student_marks, seq_off)):
        _check_marks(marks, off)
    if (_ends(scores.marks, scores.offsets) != _ends(scores.student_marks, seq_off)).any():
        raise ValueError("a sequence has another number of spans for the teacher and the student")
    of = span_of(scores.marks)
    longest = int(np.bincount(of[of >= 0], minlength=1).max())
    if longest > _MOST_TOKENS:
        raise ValueError(f"a span of {longest} tokens, at most {_MOST_TOKENS} are stored")
    ids = scores.piece_ids
    if (ids[1:] <= ids[:-1]).any():
        raise ValueError("ids of pieces that do not ascend")
    piece_of(scores, scores.tokens)
    piece_of(scores, scores.ids)
    twins = scores.piece_twins
    low, high = int(twins.min(initial=0)), int(twins.max(initial=0))
    if low < NO_TWIN or high > _MOST_TWIN:
        raise ValueError(f"the student's ids of pieces from {low} to {high}")
    ragged.check_counts(scores.cnt, len(scores.ids), schema.MAX_K)
    if (scores.kept > scores.cnt).any():
        raise ValueError("more entries are kept than there are")


def check_values(scores: SpanScores) -> None:
    """Check the values of scores whose structure is sound. Raises ValueError."""
    faults = [
        log_prob_fault(scores.log_probs),
        log_prob_fault(scores.log_tail),
        log_prob_fault(scores.entry_lp),
        entropy_fault(scores.entropy),
    ]
    for fault in filter(None, faults):
        raise ValueError(fault)
    if ragged.has_duplicates(scores.ids, scores.cnt):
        raise ValueError("a row names an id twice")


def span_of(marks: Array) -> Array:
    """Return [n] int64, the number of the span of each token over all sequences, -1 = in none."""
    end = (marks & END) != 0
    number: Array = np.where((marks & GAP) != 0, -1, np.cumsum(end) - end)
    return number


def piece_of(scores: SpanScores, ids: Array) -> Array:
    """Return [n] the index of the piece of each id; raises ValueError for an id without one."""
    pieces = scores.piece_ids
    # One more, because searchsorted may return the index behind the last.
    at = np.searchsorted(pieces, ids)
    if (np.append(pieces.astype(np.int64), -1)[at] != ids).any():
        raise ValueError("an id of the teacher whose bytes are missing")
    return at


def _check_shapes(scores: SpanScores, seq_off: Array) -> None:
    if scores.rows not in LAYOUT_OF:
        raise ValueError(f"best ids at {scores.rows!r} rows; known: {', '.join(LAYOUT_OF)}")
    specs = schema.specs(schema.SPAN_STARTS)
    fields = {field: specs[name] for name, field in (FIELDS | ENTRY_FIELDS).items()}
    for field, spec in fields.items():
        array: Any = getattr(scores, field)
        dtype = "float32" if spec.dtype == schema.ENTRY else spec.dtype
        if array.ndim != 1 or array.dtype != dtype:
            raise ValueError(f"{field}: {array.dtype} {array.shape}, not {dtype} of one dimension")
    counts = {
        "N": len(seq_off) - 1,
        "P": int(seq_off[-1]),
        "Q": len(scores.tokens),
        "G": scores.spans if scores.rows != NONE else 0,
        "U": len(scores.piece_ids),
        "B": int(scores.piece_lengths.sum(dtype=np.int64)),
        "E": int(scores.cnt.sum(dtype=np.int64)),
    }
    for field, spec in fields.items():
        if (found := len(getattr(scores, field))) != spec.length(counts):
            raise ValueError(f"{field}: {found} elements, not {spec.length(counts)}")


def _check_marks(marks: Array, off: Array) -> None:
    if int(marks.max(initial=0)) > END | GAP | PATCHED:
        raise ValueError(f"a mark of {int(marks.max())}")
    if ((marks & (END | GAP)) == END | GAP).any():
        raise ValueError("a token ends a span and is in none")
    is_open = (marks & (END | GAP)) == 0
    last = off[1:][off[1:] > off[:-1]] - 1
    if is_open[last].any() or (is_open[:-1] & ((marks[1:] & GAP) != 0)).any():
        raise ValueError("a span that does not end")


def _ends(marks: Array, off: Array) -> Array:
    """Return [N + 1] the number of spans before each sequence."""
    found: Array = ragged.starts((marks & END) != 0)[off]
    return found
