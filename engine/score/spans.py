"""Score rollouts by a teacher with another tokenizer: in its own ids, over spans of equal bytes.

The teacher reads the same prompts and responses in its own ids, as rollouts without scores of the
student, so that every scorer serves. Its log-prob of each of its tokens is kept. At one row of each
span its best ids are kept too, and the ids of equal bytes of the student's stored ids there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from logitcask.engine.alignment.aligned_rollouts import AlignedRollouts, align_rollouts
from logitcask.engine.alignment.alignment import Alignment
from logitcask.engine.alignment.span_scores import ENDS, NO_TWIN, NONE, SpanScores
from logitcask.engine.store.format import ragged
from logitcask.engine.store.format.rows import lists_at, scores_at
from logitcask.engine.types import Array, IdLists, Rollouts, Scores

ScoreFn = Callable[[Rollouts, IdLists | None], tuple[Scores, float]]
"""Scores the teacher's rollouts, at requested ids or none; returns the scores and their seconds."""


def score_spans(
    alignment: Alignment, rollouts: Rollouts, score: ScoreFn, *, at_student: bool
) -> tuple[SpanScores, float]:
    """Return the scores over spans, and their seconds.

    at_student: request the ids with the bytes of the student's stored ids. Raises as
    `align_rollouts`.
    """
    found = align_rollouts(alignment, rollouts)
    teacher = found.rollouts
    rows = np.zeros(teacher.positions, bool)
    at = None
    if alignment.rows != NONE:
        rows[_rows(alignment, found.spans[:, 2:])] = True
        if at_student and rollouts.student is not None:
            own = IdLists(cnt=rollouts.student.cnt, ids=rollouts.student.ids)
            at = _twins_at(alignment, found, own, rows)
    scores, took_s = score(teacher, at)
    return _built(alignment, found, scores, rows, at), took_s


def _rows(alignment: Alignment, spans: Array) -> Array:
    """Return [G], the row of each span [G, 2] that has ids."""
    rows: Array = spans[:, 1] - 1 if alignment.rows == ENDS else spans[:, 0]
    return rows


def _twins_at(alignment: Alignment, found: AlignedRollouts, own: IdLists, rows: Array) -> IdLists:
    """Return, at the marked rows of the teacher, its ids with the bytes of the student's ids.

    own: ids of the student's rows.
    """
    marked = np.zeros(len(own.cnt), bool)
    marked[_rows(alignment, found.spans[:, :2])] = True
    lists = lists_at(own, marked)
    # An id beyond the table has no bytes.
    known = lists.ids < len(alignment.to_teacher)
    ids = np.where(known, alignment.to_teacher[np.where(known, lists.ids, 0)], NO_TWIN)
    row = ragged.row_of_entry(lists.cnt)
    # Two ids of the student may have the same bytes.
    width = len(alignment.to_student) + 1
    first = np.zeros(len(ids), bool)
    first[np.unique(row * width + ids + 1, return_index=True)[1]] = True
    first &= ids != NO_TWIN
    cnt = np.zeros(len(rows), np.uint16)
    cnt[rows] = ragged.count_marked(first, lists.cnt)
    return IdLists(cnt=cnt, ids=ids[first].astype(np.uint32))


def _built(
    alignment: Alignment, found: AlignedRollouts, scores: Scores, rows: Array, at: IdLists | None
) -> SpanScores:
    tokens = found.rollouts.tokens
    entries = _entries(scores, rows, at)
    return SpanScores(
        offsets=found.rollouts.seq_off,
        tokens=tokens,
        log_probs=scores.lp.astype(np.float32),
        marks=found.marks,
        student_marks=found.student_marks,
        texts=found.texts,
        rows=alignment.rows,
        **entries,
        **_pieces(alignment, np.concatenate([tokens, entries["ids"]])),
    )


def _entries(scores: Scores, rows: Array, at: IdLists | None) -> dict[str, Array]:
    """Return the arrays of the marked rows: the kept ids, then those of `at` that are not kept."""
    part = scores_at(scores, rows, at)
    row, ids, lp = ragged.row_of_entry(part.cnt), part.ids.astype(np.uint32), part.entry_lp
    cnt = part.cnt.astype(np.uint16)
    if at is not None:
        assert part.at_lp is not None, "scored at requested ids"
        lists = lists_at(at, rows)
        new = ragged.find(ids, cnt, lists.ids, lists.cnt) < 0
        more = ragged.row_of_entry(lists.cnt)[new], lists.ids[new], part.at_lp[new]
        best_first = np.lexsort((more[1], -more[2], more[0]))
        row, ids, lp = (
            np.concatenate([kept, added[best_first]])
            for kept, added in zip((row, ids, lp), more, strict=True)
        )
        in_rows = np.argsort(row, kind="stable")
        ids, lp = ids[in_rows], lp[in_rows]
        cnt = (cnt + ragged.count_marked(new, lists.cnt)).astype(np.uint16)
    return {
        "entropy": part.entropy.astype(np.float32),
        "log_tail": part.log_tail.astype(np.float32),
        "kept": part.cnt.astype(np.uint16),
        "cnt": cnt,
        "ids": ids,
        "entry_lp": lp.astype(np.float32),
    }


def _pieces(alignment: Alignment, ids: Array) -> dict[str, Any]:
    """Return the arrays of the distinct ids: their bytes and the student's ids of these bytes."""
    found = np.unique(ids).astype(np.uint32)
    pieces = alignment.teacher.table.pieces
    texts = [(pieces[i] or b"") if i < len(pieces) else b"" for i in found.tolist()]
    known = found < len(pieces)
    twins = np.where(known, alignment.to_student[np.where(known, found, 0)], NO_TWIN)
    return {
        "piece_ids": found,
        "piece_twins": twins.astype(np.int64),
        "piece_lengths": np.array([len(text) for text in texts], np.uint16),
        "piece_bytes": np.frombuffer(b"".join(texts), np.uint8),
    }
