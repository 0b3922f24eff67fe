"""The numbers of a teacher with another tokenizer at each position of the chosen responses.

Its log-probs are of spans, which every position of a span has. Its list stands at one of them, in
its own ids: an id of the same bytes as one of the student's list stands there instead.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from logitcask.engine.alignment.span_scores import ENDS, NO_TWIN, NONE, SpanScores
from logitcask.engine.probes.columns import numbers_of
from logitcask.engine.report.viewer.lists import (
    Lists,
    block_at,
    holds,
    lists_of,
    log_probs_at,
    mass_of,
    top,
)
from logitcask.engine.report.viewer.rows import (
    IN_TEACHER,
    IS_FIRST,
    IS_SCORED,
    Cut,
    Rows,
    TeacherRows,
)
from logitcask.engine.report.viewer.sources import Part
from logitcask.engine.report.viewer.texts import PieceTexts
from logitcask.engine.store.format.ragged import index_in_row, starts
from logitcask.engine.store.spans.checks import piece_of, span_of
from logitcask.engine.types import Array

_NO_ID = 0xFFFFFFFF
"""Stands for the student's id of an id without a twin."""
_MOST_SHOWN = 255
"""Tokens of the teacher that are shown of a span."""


class _Student(NamedTuple):
    """P rows of the student: tokens, their log-probs, its whole lists, and those that are shown."""

    tokens: Array
    lp: Array
    full: Lists
    shown: Lists


def with_spans(rows: Rows, part: Part, index: Array, cut: Cut) -> Rows:
    """Return rows with the teachers that have another tokenizer.

    rows: of the rows `index` [P] of a part, which hold whole responses, as of rows_of.
    """
    if not part.spans:
        return rows
    block = block_at(part.rows, index)
    of = _Student(
        tokens=rows.tokens,
        lp=numbers_of(block, "student_logprob"),
        full=lists_of(block, "student_topk_ids", "student_topk_logprobs"),
        shown=rows.student,
    )
    # A name may be of spans in one run and of tokens in another.
    found = {
        f"{each.teacher} (spans)": _rows(each.scores, each.tokens, index, of, cut)
        for each in part.spans
    }
    return replace(rows, teachers={**rows.teachers, **found})


def _rows(
    scores: SpanScores, tokens: str, index: Array, student: _Student, cut: Cut
) -> TeacherRows:
    full = student.full
    own, of = span_of(scores.student_marks), span_of(scores.marks)
    spans = scores.spans
    width, of_width = (np.bincount(each[each >= 0], minlength=spans) for each in (own, of))
    first, of_first = (_first(each, spans) for each in (own, of))
    log_q = np.bincount(of[of >= 0], scores.log_probs[of >= 0].astype(np.float64), spans)
    span = own[index]
    inside = span >= 0
    log_p = np.bincount(span[inside], student.lp[inside], spans)
    begins = inside & (index == _at(first, span))
    one = inside & (_at(width, span) == 1) & (_at(of_width, span) == 1)
    listed = np.zeros(len(index), bool)
    if scores.rows != NONE:
        row = first + width - 1 if scores.rows == ENDS else first
        listed = inside & (index == _at(row, span))
    kept, every = (_lists(scores, span, listed, counts) for counts in (scores.kept, scores.cnt))
    twins = _twins(scores, kept)
    shown = top(kept, cut.most, cut.mass) & (twins.ids != np.repeat(student.tokens, kept.counts))
    shown &= np.isnan(log_probs_at(student.shown, twins))
    others = _twins(scores, every)
    counts = np.where(begins, np.minimum(_at(of_width, span), _MOST_SHOWN), 0)
    entry = np.repeat(_at(of_first, span), counts) + index_in_row(counts)
    values = {"teacher_entropy": scores.entropy, "tail": np.exp(scores.log_tail)}
    at_row = {n: np.where(listed, _at(each, span), np.nan) for n, each in values.items()}
    nothing = np.full(len(index), np.nan)
    return TeacherRows(
        k=0,
        flags=(
            IN_TEACHER * holds(twins, student.tokens) + IS_SCORED * inside + IS_FIRST * begins
        ).astype(np.uint8),
        nats={
            "teacher_surprise": np.where(one, -_at(log_q, span), np.nan),
            "teacher_entropy": at_row["teacher_entropy"],
            "reverse_kl": nothing,
            "forward_kl": nothing,
            "span_teacher": np.where(inside, -_at(log_q, span), np.nan),
            "span_student": np.where(inside, -_at(log_p, span), np.nan),
        },
        shares={
            "teacher_tail": at_row["tail"],
            "coverage": np.where(
                listed & (full.counts > 0),
                mass_of(full, ~np.isnan(log_probs_at(others, full))),
                np.nan,
            ),
            **{f"overlap_{each}": nothing for each in ("ratio", "mass_student", "mass_teacher")},
        },
        at_student=log_probs_at(others, student.shown),
        own=kept.marked(shown),
        own_log_p=log_probs_at(full, twins.marked(shown)),
        span_tokens=Lists(counts, scores.tokens[entry], scores.log_probs[entry].astype(np.float64)),
        texts=PieceTexts(scores, tokens),
    )


def _first(span: Array, spans: int) -> Array:
    """Return [G], the first token of each span."""
    inside = np.flatnonzero(span >= 0)
    found = np.zeros(spans, np.int64)
    found[span[inside[::-1]]] = inside[::-1]
    return found


def _at(values: Array, span: Array) -> Array:
    """Return [P] the values [G] of the span of each row; without a value any number."""
    if not len(values):  # scores without lists
        return np.zeros(len(span), values.dtype)
    found: Array = np.append(values, values.dtype.type(0))[span]
    return found


def _lists(scores: SpanScores, span: Array, listed: Array, counts: Array) -> Lists:
    """Return the first `counts` [G] entries of each span, at the rows in `listed` [P]."""
    cnt = np.where(listed, _at(counts, span), 0)
    entry = np.repeat(_at(starts(scores.cnt)[:-1], span), cnt) + index_in_row(cnt)
    return Lists(cnt, scores.ids[entry], scores.entry_lp[entry].astype(np.float64))


def _twins(scores: SpanScores, lists: Lists) -> Lists:
    """Return the entries with the student's id of the same bytes, or _NO_ID."""
    twin = scores.piece_twins[piece_of(scores, lists.ids)]
    ids = np.where(twin == NO_TWIN, _NO_ID, twin).astype(np.uint32)
    return Lists(lists.counts, ids, lists.log_probs)
