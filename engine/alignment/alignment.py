"""Two models that read one text: tables of bytes, ids of equal bytes, and the ends of turns."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcask.engine.alignment.encode import ByteEncoder
from logitcask.engine.alignment.span_scores import NO_TWIN, STARTS
from logitcask.engine.alignment.token_bytes import TokenBytes, token_bytes
from logitcask.engine.errors import ModelError
from logitcask.engine.models.identity import tokenizer_digest
from logitcask.engine.prompts.encode import special_ids
from logitcask.engine.prompts.templates import render
from logitcask.engine.types import Array, ModelRef, Prompt

_ANSWER = "Zebra"
"""Text of an assistant turn, behind which the token stands that ends it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """A student, and a teacher that reads its responses in other tokens."""

    student: TokenBytes
    teacher: ByteEncoder
    tokenizers: tuple[str, str]
    """Digests of both tokenizers, as of `identity.tokenizer_digest`."""
    begins: tuple[tuple[int, ...], tuple[int, ...]]
    """Ids that each tokenizer adds before any text."""
    ends: Mapping[int, int]
    """Stop id of the student, a control token -> the teacher's token that ends a turn."""
    to_teacher: Array
    """[V] int64, id of the student -> the teacher's lowest id of the same bytes, or NO_TWIN; a stop
    id -> the end of a turn."""
    to_student: Array
    """[V] int64, the same for the ids of the teacher."""
    prompts: Mapping[str, Prompt] | None = None
    """Prompt id -> the teacher's prompt; None = the bytes of the student's."""
    rows: str = STARTS
    """Row of each span that has the teacher's best ids: NONE, STARTS or ENDS."""
    cuts: bool = False
    """A response ends for the teacher at a control token of the student that has no counterpart;
    False = it is refused."""

    def matches(self, student: str, model: ModelRef) -> bool:
        """Return True for this digest of a student's tokenizer, and this teacher's."""
        return self.tokenizers == (student, model.tokenizer_digest)

    def record(self) -> dict[str, str]:
        """Return the provenance of scores."""
        tables = {"student": self.student.digest, "teacher": self.teacher.table.digest}
        return {**tables, "rows": self.rows}


def align_tokenizers(
    student: Any,
    teacher: Any,
    *,
    student_stops: Collection[int],
    teacher_stops: Collection[int],
    chat_template: bool,
    rows: str = STARTS,
    cuts: bool = False,
) -> Alignment:
    """Compare two tokenizers of transformers. Seconds for 200,000 ids.

    student_stops, teacher_stops: stop ids of both models; chat_template: a turn of the teacher ends
    as its template ends one; rows, cuts: of the alignment. Raises ModelError as `token_bytes`, and
    for a teacher without a control token that ends a turn, where the student has one.
    """
    table, encoder = token_bytes(student), ByteEncoder(teacher)
    to_teacher, to_student = twins(table, encoder.table), twins(encoder.table, table)
    controls = [i for i in sorted(student_stops) if _is_control(table, i)]
    ends: dict[int, int] = {}
    if controls:
        end = turn_end(teacher, encoder.table, teacher_stops, chat_template=chat_template)
        templated = chat_template and bool(student.chat_template)
        own = turn_end(student, table, controls, chat_template=templated)
        ends = dict.fromkeys(controls, end)
        to_teacher[controls] = end
        to_student[end] = own if own in controls else controls[0]
    return Alignment(
        student=table,
        teacher=encoder,
        tokenizers=(tokenizer_digest(student), tokenizer_digest(teacher)),
        begins=(_begin(student), _begin(teacher)),
        ends=ends,
        to_teacher=to_teacher,
        to_student=to_student,
        rows=rows,
        cuts=cuts,
    )


def twins(a: TokenBytes, b: TokenBytes) -> Array:
    """Return [V of a] int64, for each id the lowest id of b with the same bytes, or NO_TWIN."""
    lowest: dict[bytes, int] = {}
    for index, piece in enumerate(b.pieces):
        if piece:
            lowest.setdefault(piece, index)
    return np.array([lowest.get(p, NO_TWIN) if p else NO_TWIN for p in a.pieces], np.int64)


def turn_end(
    tokenizer: Any, table: TokenBytes, stops: Collection[int], *, chat_template: bool
) -> int:
    """Return the token that ends a turn of the assistant.

    The control token behind such a turn in the chat template; without one the tokenizer's eos
    token, and else the lowest of `stops`. Raises ModelError where that is no control token.
    """
    if chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
        after = render(tokenizer, turns).rpartition(_ANSWER)[2]
        for each in tokenizer(after, add_special_tokens=False)["input_ids"]:
            if _is_control(table, each):
                return int(each)
            if (table.pieces[each] or b"").strip():
                break
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for each in (*eos, *sorted(stops)):
        if _is_control(table, each):
            return int(each)
    raise ModelError(
        f"{tokenizer.name_or_path or 'a tokenizer'} has no control token that ends a turn",
        hint="set its eos_token",
    )


def _is_control(table: TokenBytes, index: int) -> bool:
    return index < len(table.pieces) and table.pieces[index] is None


def _begin(tokenizer: Any) -> tuple[int, ...]:
    ids = tokenizer(_ANSWER, add_special_tokens=False)["input_ids"]
    return tuple(special_ids(tokenizer, _ANSWER, ids)[0]) if ids else ()
