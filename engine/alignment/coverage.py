"""Coverage of a text by the spans of stored scores, in the words of the report.

span-exact           the log-prob of a span, by the chain rule over the teacher's own tokens
boundary-conditioned the teacher's best ids at one row of a span: "the next token is v" is another
                     event to either model, also where the bytes of v are the same
truncated            mass of such a row without an id of the student, and outside of all entries
patched              bytes in tokens that the teacher's tokenizer itself would not have chosen
aligned              shares of the spans by their tokens: 1:1, n:1, 1:m, n:m, the student's first
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from logitcask.engine.alignment.span_scores import (
    END,
    GAP,
    NO_TWIN,
    NONE,
    PATCHED,
    SpanScores,
)
from logitcask.engine.types import Array

SPAN_KINDS = ("1:1", "n:1", "1:m", "n:m")
"""Tokens of the student to tokens of the teacher, in the order of SpanCoverage.kinds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanCoverage:
    """Sums over responses; those of several segments add up."""

    responses: int = 0
    student_tokens: int = 0
    student_gaps: int = 0
    """Tokens of the student in no span: they have no loss."""
    teacher_tokens: int = 0
    teacher_gaps: int = 0
    spans: int = 0
    one_to_one: int = 0
    many_to_one: int = 0
    """Spans of several tokens of the student and one of the teacher."""
    one_to_many: int = 0
    many_to_many: int = 0
    largest_span: int = 0
    """Tokens of the student in one span, at most."""
    bytes: int = 0
    """Of the teacher's tokens, which spell the responses."""
    bytes_in_spans: int = 0
    bytes_patched: int = 0
    rows: int = 0
    """Spans with the teacher's best ids."""
    unmapped_mass: float = 0.0
    """Sum over the rows of the mass at ids without a twin."""
    tail_mass: float = 0.0
    """Sum over the rows of the mass outside of all entries."""

    @property
    def kinds(self) -> tuple[int, int, int, int]:
        """Return the spans of each of SPAN_KINDS."""
        return self.one_to_one, self.many_to_one, self.one_to_many, self.many_to_many

    def __add__(self, other: "SpanCoverage") -> "SpanCoverage":
        """Add the sums of two sets of responses."""
        added = {
            each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)
        }
        largest = max(self.largest_span, other.largest_span)
        return SpanCoverage(**{**added, "largest_span": largest})


def coverage_of(scores: Iterable[SpanScores]) -> SpanCoverage:
    """Sum the coverage of some segments."""
    return sum((_coverage(each) for each in scores), SpanCoverage())


def _coverage(scores: SpanScores) -> SpanCoverage:
    student, teacher = _widths(scores.student_marks), _widths(scores.marks)
    one, one_of_teacher = student == 1, teacher == 1
    at = np.searchsorted(scores.piece_ids, scores.tokens)
    lengths = scores.piece_lengths[at].astype(np.int64)
    in_span, patched = scores.marks & GAP == 0, scores.marks & PATCHED != 0
    with_rows = scores.rows != NONE
    entry = np.searchsorted(scores.piece_ids, scores.ids)
    unmapped = scores.piece_twins[entry] == NO_TWIN
    return SpanCoverage(
        responses=len(scores.offsets) - 1,
        student_tokens=len(scores.student_marks),
        student_gaps=int(np.count_nonzero(scores.student_marks & GAP)),
        teacher_tokens=len(scores.tokens),
        teacher_gaps=int(np.count_nonzero(~in_span)),
        spans=len(teacher),
        one_to_one=int((one & one_of_teacher).sum()),
        many_to_one=int((~one & one_of_teacher).sum()),
        one_to_many=int((one & ~one_of_teacher).sum()),
        many_to_many=int((~one & ~one_of_teacher).sum()),
        largest_span=int(student.max(initial=0)),
        bytes=int(lengths.sum()),
        bytes_in_spans=int(lengths[in_span].sum()),
        bytes_patched=int(lengths[patched].sum()),
        rows=len(teacher) if with_rows else 0,
        unmapped_mass=float(np.exp(scores.entry_lp[unmapped].astype(np.float64)).sum()),
        tail_mass=float(np.exp(scores.log_tail.astype(np.float64)).sum()) if with_rows else 0.0,
    )


def _widths(marks: Array) -> Array:
    """Return [G] the tokens of each span, of the marks of all tokens of one side."""
    ends = marks & END != 0
    number = np.cumsum(ends) - ends
    in_span = marks & GAP == 0
    widths: Array = np.bincount(number[in_span], minlength=int(ends.sum()))
    return widths


def describe(coverage: SpanCoverage) -> Mapping[str, str]:
    """Return name -> text, one for each word of the report."""
    of, spans = coverage, max(1, coverage.spans)
    kinds = zip(SPAN_KINDS, of.kinds, strict=True)
    aligned = ", ".join(f"{name} {count / spans:.1%}" for name, count in kinds)
    covered = of.bytes_in_spans / of.bytes if of.bytes else 1.0
    return {
        "spans": f"{of.spans:,}, of {of.student_tokens:,} tokens of the student and "
        f"{of.teacher_tokens:,} of the teacher",
        "aligned": f"{aligned} of the spans, student:teacher; the largest has "
        f"{of.largest_span:,} of the student's tokens",
        "covered": f"{covered:.1%} of the {of.bytes:,} bytes that the teacher read are in a span; "
        f"in none, and without a loss, are {of.student_gaps:,} tokens of the student",
        "span-exact": "the log-prob of each span, over the teacher's own tokens",
        "patched": f"{of.bytes_patched / max(1, of.bytes):.2%} of the bytes are in tokens that the "
        "teacher's tokenizer would not choose",
        **_of_rows(coverage),
    }


def _of_rows(of: SpanCoverage) -> dict[str, str]:
    if not of.rows:
        return {"boundary-conditioned": "nothing: these scores have log-probs of spans alone"}
    return {
        "boundary-conditioned": f"the teacher's best ids at {of.rows:,} rows, one of each span",
        "truncated": f"of the teacher's mass in such a row {of.unmapped_mass / of.rows:.2%} is at "
        f"ids that are no token of the student, and {of.tail_mass / of.rows:.2%} outside of the "
        "entries",
    }
