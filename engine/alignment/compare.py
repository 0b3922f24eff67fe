"""Comparison of two tokenizers over the same texts."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from logitcask.engine.alignment.encode import ByteEncoder
from logitcask.engine.alignment.spans import align
from logitcask.engine.errors import IncompleteError, UnitError


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A text that one of the tokenizers cannot spell."""

    text: str
    """Its name."""
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerComparison:
    """Sums over the texts that both tokenizers spell."""

    same_bytes: bool
    """Each id has the same bytes in both."""
    common_tokens: int
    """Distinct byte strings that are a token of both."""
    texts: int
    bytes: int
    student_tokens: int
    teacher_tokens: int
    spans: int
    one_to_one: int
    """Spans of one token on both sides."""
    largest_span: int
    """Tokens of the student in one span."""
    patched: int
    """Teacher tokens that spell the text and are not those that its tokenizer would choose."""
    refused: tuple[Refused, ...]

    @property
    def share_one_to_one(self) -> float:
        """Share of the student's tokens that are one token to the teacher."""
        return self.one_to_one / max(1, self.student_tokens)


def compare_tokenizers(
    student: ByteEncoder, teacher: ByteEncoder, texts: Iterable[tuple[str, bytes]]
) -> TokenizerComparison:
    """Encode each (name, bytes) by both and align them.

    Raises IncompleteError without a text that both spell.
    """
    sums = np.zeros(7, np.int64)
    largest, refused = 0, []
    for name, text in texts:
        if not text:
            continue
        try:
            ours = student.encode(text, "the student's tokenizer")
            theirs = teacher.encode(text, "the teacher's tokenizer")
        except UnitError as error:
            refused.append(Refused(text=name, cause=error.cause))
            continue
        lead = (ours.lead, theirs.lead)
        spans = align(student.table, ours.ids, teacher.table, theirs.ids, lead=lead)
        widths = spans.rows[:, 1::2] - spans.rows[:, ::2]  # [S, 2] tokens
        sums += (
            *(1, spans.bytes, len(ours.ids), len(theirs.ids), len(spans.rows)),
            *(int((widths == 1).all(1).sum()), int(theirs.patched.sum())),
        )
        largest = max(largest, int(widths[:, 0].max()))
    if not sums[0]:
        raise IncompleteError(
            f"there is no text that both tokenizers spell, and {len(refused)} that one cannot",
            hint="give a file with texts, one a line" if not refused else refused[0].cause,
        )
    ours_, theirs_ = ({p for p in each.table.pieces if p} for each in (student, teacher))
    return TokenizerComparison(
        same_bytes=student.table.digest == teacher.table.digest,
        common_tokens=len(ours_ & theirs_),
        texts=int(sums[0]),
        bytes=int(sums[1]),
        student_tokens=int(sums[2]),
        teacher_tokens=int(sums[3]),
        spans=int(sums[4]),
        one_to_one=int(sums[5]),
        largest_span=largest,
        patched=int(sums[6]),
        refused=tuple(refused),
    )
