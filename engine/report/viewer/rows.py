"""The numbers of each position of the chosen responses.

The sampled token has its own numbers, and is left out of the lists that are cut. So a position
where both models are sure of it, as most are, has no entry at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from logitcask.engine.exchange.positions import Block
from logitcask.engine.probes.columns import column_of, numbers_of, teacher_entropy
from logitcask.engine.probes.positions import MEASURES, row_values
from logitcask.engine.report.viewer.lists import (
    Lists,
    block_at,
    holds,
    lists_of,
    log_probs_at,
    mass_of,
    top,
)
from logitcask.engine.report.viewer.sources import Part
from logitcask.engine.report.viewer.texts import PieceTexts
from logitcask.engine.types import Array

LOSS, IN_STUDENT, IN_TEACHER, IS_SCORED, IS_FIRST = 1, 2, 1, 2, 4
"""Bits: of `flags` of the student the first two, of a teacher the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRows:
    """A teacher's numbers at P positions."""

    k: int
    """Of the overlap; 0 = none."""
    flags: Array
    """[P] IN_TEACHER: the token is in its stored list; IS_SCORED: it scored the position; IS_FIRST:
    a span begins there."""
    nats: Mapping[str, Array]
    """Name -> [P] float64, NaN = none."""
    shares: Mapping[str, Array]
    at_student: Array
    """[E] float64, log q of each entry of the student's list; NaN = not stored."""
    own: Lists
    """The teacher's top list without the student's entries."""
    own_log_p: Array
    """[E'] float64, log p of each of these; NaN = it is not in the student's list."""
    span_tokens: Lists | None = None
    """The teacher's tokens of each span at its first position; None for the student's tokenizer."""
    texts: PieceTexts | None = None
    """Of the ids in `own` and `span_tokens`; None = the student's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """P positions of some responses."""

    tokens: Array
    """[P] uint32."""
    flags: Array
    """[P] LOSS: it counts in a loss; IN_STUDENT: the token is in the student's stored list."""
    nats: Mapping[str, Array]
    shares: Mapping[str, Array]
    student: Lists
    """The student's top list without the sampled token."""
    teachers: Mapping[str, TeacherRows]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Entries of a list that are shown: the first `most`, until they have `mass`."""

    most: int
    mass: float
    coarse: int = 1
    """Numbers are rounded to so many times STEPS."""


CUTS = (
    *(Cut(most=8, mass=0.99), Cut(most=5, mass=0.95)),
    *(Cut(most=3, mass=0.9), Cut(most=3, mass=0.9, coarse=10)),
)
"""The first one whose page is small enough is taken."""


def rows_of(part: Part, index: Array, cut: Cut) -> Rows:
    """Return the numbers of the rows `index` [P] of a part."""
    block = block_at(part.rows, index)
    tokens = column_of(block, "token")
    full = lists_of(block, "student_topk_ids", "student_topk_logprobs")
    student = full.marked(top(full, cut.most, cut.mass) & _is_other(full, tokens))
    flags = LOSS * column_of(block, "loss_mask") + IN_STUDENT * holds(full, tokens)
    return Rows(
        tokens=tokens,
        flags=flags.astype(np.uint8),
        nats={
            "student_surprise": -numbers_of(block, "student_logprob"),
            "student_entropy": numbers_of(block, "student_entropy"),
        },
        shares={"student_tail": np.exp(numbers_of(block, "student_log_tail"))},
        student=student,
        teachers={
            each.teacher: _teacher_rows(block_at(each.block, index), each.k, full, student, cut)
            for each in part.scored
        },
    )


def _is_other(lists: Lists, tokens: Array) -> Array:
    """Mark [E] the entries that are not the token [P] of their row."""
    marks: Array = lists.ids != np.repeat(tokens, lists.counts)
    return marks


def _teacher_rows(block: Block, k: int, full: Lists, student: Lists, cut: Cut) -> TeacherRows:
    """full: the student's whole lists; student: those that are shown; k of the overlap."""
    tokens = column_of(block, "token")
    lists = lists_of(block, "teacher_ids", "teacher_logprobs")
    is_scored = _is_scored(block)
    shown = top(lists, cut.most, cut.mass) & _is_other(lists, tokens)
    own = lists.marked(shown & np.isnan(log_probs_at(student, lists)))
    return TeacherRows(
        k=k,
        flags=(IN_TEACHER * holds(lists, tokens) + IS_SCORED * is_scored).astype(np.uint8),
        nats={
            "teacher_surprise": -numbers_of(block, "teacher_logprob"),
            "teacher_entropy": teacher_entropy(block),
            "reverse_kl": numbers_of(block, "reverse_kl"),
            "forward_kl": numbers_of(block, "forward_kl"),
        },
        shares={
            "teacher_tail": np.exp(numbers_of(block, "teacher_log_tail")),
            "coverage": np.where(
                is_scored & (full.counts > 0),
                mass_of(full, ~np.isnan(log_probs_at(lists, full))),
                np.nan,
            ),
            **_overlap(block, k, is_scored),
        },
        at_student=log_probs_at(lists, student),
        own=own,
        own_log_p=log_probs_at(full, own),
    )


def _is_scored(block: Block) -> Array:
    column = block["teacher_logprob"]
    assert column is not None, "a column of scores"
    if column.valid is None:
        return np.ones(len(column.values), bool)
    return column.valid


_OVERLAP = {
    "overlap_ratio": "overlap/ratio",
    "overlap_mass_student": "overlap/mass_student",
    "overlap_mass_teacher": "overlap/mass_teacher",
}
"""Name here -> name of the probes' MEASURES."""


def _overlap(block: Block, k: int, is_scored: Array) -> dict[str, Array]:
    """Return the overlap at k of both lists; k = 0: one side's top-k is not stored."""
    if not k:
        return {name: np.full(len(is_scored), np.nan) for name in _OVERLAP}
    _, values = row_values(block, k)
    return {
        name: np.where(is_scored, values[:, MEASURES.index(of)], np.nan)
        for name, of in _OVERLAP.items()
    }
