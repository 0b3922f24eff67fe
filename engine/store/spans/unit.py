"""The join of a teacher's spans with a student's rollouts, as the unit that packs are made of.

Each row of the student gets its span and the teacher's log-probs of it. The lists of ids of a span
stand at one row of the student: its first, where both models have read the same bytes, or its last
where the teacher's are of its last.

The teacher's ids become the student's ids of the same bytes. In a span of one token on both sides
the teacher's token becomes the student's, whatever its bytes: so the ends of a turn are joined too.
Where two ids of a row would become one, the better one does, and the other counts as unmapped.
"""

from typing import NamedTuple

import numpy as np

from logitcask.engine.alignment.span_scores import END, ENDS, NO_TWIN, NONE, SpanScores
from logitcask.engine.store.decoded_unit import (
    UNMAPPED,
    DecodedUnit,
    rollout_arrays,
    student_of,
    unit_of,
)
from logitcask.engine.store.format.ragged import find, index_in_row, row_of_entry, starts
from logitcask.engine.store.format.rows import lists_at
from logitcask.engine.store.spans.checks import piece_of, span_of
from logitcask.engine.types import Array, IdLists, Rollouts

_UNLISTED = 0xFFFF
"""Rank of an id that is in no list of the teacher."""


class _Side(NamedTuple):
    """The spans of one side: [n] number of each token, or -1; [G] first, last and count."""

    span: Array
    first: Array
    last: Array
    tokens: Array


def decode_span_unit(seg_id: str, rollouts: Rollouts, scores: SpanScores) -> DecodedUnit:
    """Build the unit of rollouts and the checked scores of a teacher with another tokenizer.

    Raises IncompleteError for rollouts without the student's own scores.
    """
    student = student_of(seg_id, rollouts)
    own, of = _side(scores.student_marks), _side(scores.marks)
    inside = of.span >= 0
    total = np.bincount(
        of.span[inside], scores.log_probs[inside].astype(np.float64), minlength=len(of.last)
    )
    one = (own.tokens == 1) & (of.tokens == 1)
    before = starts((scores.student_marks & END) != 0)[rollouts.seq_off[:-1]]
    row_token = of.last if scores.rows == ENDS else of.first
    number = own.span - np.repeat(before, np.diff(rollouts.seq_off))
    arrays = rollout_arrays(rollouts, student) | {
        "span": np.where(own.span < 0, -1, number),
        "span_q": _of_rows(own, total, np.nan),
        "span_row_q": _of_rows(own, scores.log_probs[row_token], np.nan),
        "span_tokens": _of_rows(own, of.tokens, 0),
        "q_token_lp": _of_rows(own, np.where(one, total, np.nan), np.nan),
    }
    rows = own.last if scores.rows == ENDS else own.first
    if scores.rows == NONE:
        rows = rows[:0]
    at = np.zeros(rollouts.positions, bool)
    at[rows] = True
    lists = lists_at(IdLists(cnt=student.cnt, ids=student.ids), at)
    ids = _twins(scores, np.where(one, scores.tokens[of.first], -1), rollouts.tokens[rows])
    found = find(ids, scores.cnt, lists.ids.astype(np.uint32), lists.cnt)
    listed = (found >= 0) & (lists.ids != UNMAPPED)
    entry = (np.repeat(starts(scores.cnt)[:-1], lists.cnt) + found)[listed]
    s_q = np.full(len(listed), -np.inf, np.float32)
    s_rank = np.full(len(listed), _UNLISTED, np.uint16)
    s_q[listed], s_rank[listed] = scores.entry_lp[entry], found[listed]
    others = np.ones(len(ids), bool)
    others[entry] = False
    t_cnt = np.bincount(row_of_entry(scores.cnt)[others], minlength=len(rows))

    def placed(values: Array, elsewhere: float) -> Array:
        out = np.full(len(at), elsewhere, values.dtype)
        out[rows] = values
        return out

    s_at, t_at = placed(lists.cnt, 0), placed(t_cnt, 0)
    return unit_of(
        arrays
        | {
            "q_entropy": placed(scores.entropy, np.nan),
            "q_log_tail": placed(scores.log_tail, 0.0),
            "kept": placed(scores.kept, 0),
            "s_cnt": s_at,
            "t_cnt": t_at,
            "s_off": starts(s_at),
            "t_off": starts(t_at),
            "s_ids": lists.ids,
            "s_q": s_q,
            "s_rank": s_rank,
            "s_p": student.entry_lp[np.repeat(at, student.cnt)],
            "t_ids": ids[others],
            "t_q": scores.entry_lp[others],
            "t_rank": index_in_row(scores.cnt)[others],
        }
    )


def _side(marks: Array) -> _Side:
    span, last = span_of(marks), np.flatnonzero((marks & END) != 0)
    tokens = np.bincount(span[span >= 0], minlength=len(last))
    return _Side(span, last + 1 - tokens, last, tokens)


def _of_rows(own: _Side, values: Array, elsewhere: float) -> Array:
    """Return [P] the values [G] of the span of each row."""
    found: Array = np.append(values, np.asarray(elsewhere, values.dtype))[own.span]
    return found


def _twins(scores: SpanScores, realised: Array, tokens: Array) -> Array:
    """Return [E] uint32, the student's id of each entry, distinct in a row, or UNMAPPED.

    realised: [G], the teacher's token of a span of one token on both sides, else -1; tokens: [G],
    the student's.
    """
    if not len(scores.ids):
        return np.zeros(0, np.uint32)
    piece = piece_of(scores, scores.ids)
    twin = scores.piece_twins[piece]
    row = row_of_entry(scores.cnt)
    is_realised = scores.ids == realised[row]
    twin = np.where(is_realised, tokens[row], twin)
    # Two ids of one row can be equal only where a piece shares its twin, or where a realised token
    # has another twin than the student's.
    _, place, times = np.unique(scores.piece_twins, return_inverse=True, return_counts=True)
    shared = (times[place] > 1)[piece] | (is_realised & (twin != scores.piece_twins[piece]))
    suspect = np.zeros(len(scores.cnt), bool)
    suspect[row[shared & (twin != NO_TWIN)]] = True
    some = np.flatnonzero(suspect[row] & (twin != NO_TWIN))
    order = some[np.lexsort((some, ~is_realised[some], twin[some], row[some]))]
    again = (row[order][1:] == row[order][:-1]) & (twin[order][1:] == twin[order][:-1])
    twin[order[1:][again]] = NO_TWIN
    return np.where(twin == NO_TWIN, UNMAPPED, twin).astype(np.uint32)
