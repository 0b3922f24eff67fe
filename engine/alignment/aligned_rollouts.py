"""Rollouts of a student as a teacher with another tokenizer reads them, and the spans of both."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from logitcask.engine.alignment.alignment import Alignment
from logitcask.engine.alignment.encode import Encoded
from logitcask.engine.alignment.span_scores import END, GAP, PATCHED
from logitcask.engine.alignment.spans import align
from logitcask.engine.alignment.token_bytes import TokenBytes
from logitcask.engine.errors import PromptError, UnitError
from logitcask.engine.types import Array, Prompt, Rollouts


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignedRollouts:
    """N responses: P tokens of the student, Q of the teacher, G spans."""

    rollouts: Rollouts
    """The teacher's, without scores of the student."""
    spans: Array
    """[G, 4] int64, ascending: rows [a0, a1) of the student and [b0, b1) of the teacher."""
    marks: Array
    """[Q] uint8, bits of `span_scores`."""
    student_marks: Array
    """[P] uint8."""
    texts: Array
    """[N] int64, see SpanScores."""


def align_rollouts(alignment: Alignment, rollouts: Rollouts) -> AlignedRollouts:
    """Return the same prompts and responses in the teacher's ids.

    A response has the bytes of the student's ids, and the end of a turn for its final stop id.
    Raises UnitError for another control token of the student, unless the alignment cuts responses
    there, and for bytes that the teacher cannot spell; PromptError where the teacher has no prompt
    of an id.
    """
    prompts = tuple(teacher_prompt(alignment, prompt) for prompt in rollouts.prompts)
    before = [_text_at_end(alignment.teacher.table, prompt.token_ids) for prompt in prompts]
    responses: list[Encoded] = []
    ended: list[bool] = []
    is_text = np.ones(rollouts.positions, bool)
    count = dict.fromkeys(range(len(prompts)), 0)
    for i, of in enumerate(rollouts.seq_prompt.tolist()):
        name = f"prompt {prompts[of].id!r:.80}, response {count[of]}"
        count[of] += 1
        ids = rollouts.tokens[rollouts.seq_off[i] : rollouts.seq_off[i + 1]].tolist()
        end = alignment.ends.get(ids[-1]) if ids else None
        body = ids if end is None else ids[:-1]
        if alignment.cuts and (cut := _first_control(alignment.student, body)) < len(body):
            body, end = body[:cut], None
        text = _bytes_of(alignment.student, body, name)
        is_text[rollouts.seq_off[i] + len(body) : rollouts.seq_off[i + 1]] = False
        found = alignment.teacher.encode_continuation(before[of], text, name)
        responses.append(found if end is None else _ended(found, end))
        ended.append(end is not None)
    offsets = np.cumsum([0, *(len(each.ids) for each in responses)], dtype=np.int64)
    tokens = np.concatenate([np.zeros(0, np.int64), *(each.ids for each in responses)])
    # Rows of the tokens that end a turn.
    ends = tuple((off[1:] - 1)[np.array(ended, bool)] for off in (rollouts.seq_off, offsets))
    spans = _spans(alignment, rollouts.tokens, is_text, tokens, ends)
    marks = _marks(spans[:, 2:], len(tokens))
    marks[np.concatenate([np.zeros(0, bool), *(each.patched for each in responses)])] |= PATCHED
    teacher = replace(
        rollouts,
        prompts=prompts,
        seq_off=offsets,
        tokens=tokens.astype(np.uint32),
        loss_mask=np.ones(len(tokens), np.uint16),
        b_lp=np.zeros(len(tokens), np.float32),
        student=None,
        draws=None,
        reward=None,
    )
    return AlignedRollouts(
        rollouts=teacher,
        spans=spans,
        marks=marks,
        student_marks=_marks(spans[:, :2], rollouts.positions),
        texts=text_digests(teacher),
    )


def teacher_prompt(alignment: Alignment, prompt: Prompt) -> Prompt:
    """Return the teacher's prompt: that of its own rendering, or the bytes of the student's.

    Raises as `align_rollouts`.
    """
    if alignment.prompts is not None:
        if prompt.id not in alignment.prompts:
            raise PromptError(
                f"the teacher has no prompt {prompt.id!r:.80}, which the rollouts answer",
                hint="give a prompt for every id of the rollouts",
            )
        return alignment.prompts[prompt.id]
    ids, name = prompt.token_ids, f"prompt {prompt.id!r:.80}"
    begin, of_teacher = alignment.begins
    if ids[: len(begin)] == begin:
        ids = ids[len(begin) :]
    # As the decoder of the student: the lead of a text is not in it.
    text = _bytes_of(alignment.student, ids, name).removeprefix(alignment.student.lead)
    encoded = alignment.teacher.encode(text, name).ids.tolist() if text else []
    if not (of_teacher or encoded):
        raise UnitError(
            f"{name} has no text, and the teacher's tokenizer begins a text with no token",
            hint="leave this prompt out: the teacher would read nothing before the response",
        )
    return replace(prompt, token_ids=(*of_teacher, *encoded))


def _first_control(table: TokenBytes, ids: Sequence[int]) -> int:
    """Return the index of the first id without bytes, len(ids) without one."""
    found = (i for i, each in enumerate(ids) if each >= len(table.pieces) or not table.pieces[each])
    return next(found, len(ids))


def _bytes_of(table: TokenBytes, ids: Sequence[int], name: str) -> bytes:
    """Return the bytes of ids; UnitError for one without bytes."""
    if (first := _first_control(table, ids)) < len(ids):
        raise UnitError(
            f"{name} has the id {ids[first]}, a control token of the student that is no text and "
            "no end of the response",
            hint="give --control-tokens cut, and such a response counts up to there; in a prompt: "
            "prompts of the teacher's own, --prompts FILE or --teacher-kind context",
        )
    return table.spell(ids)


def _text_at_end(table: TokenBytes, ids: Sequence[int]) -> bytes:
    """Return the bytes behind the last control token of a prompt."""
    start = next((i + 1 for i in reversed(range(len(ids))) if table.pieces[ids[i]] is None), 0)
    return table.spell(ids[start:]).removeprefix(table.lead)


def _ended(text: Encoded, end: int) -> Encoded:
    """Return a response with the token that ends its turn."""
    return replace(text, ids=np.append(text.ids, end), patched=np.append(text.patched, False))


def _spans(
    alignment: Alignment, ours: Array, is_text: Array, theirs: Array, ends: Sequence[Array]
) -> Array:
    """Return the spans [G, 4] of all responses, one after the other: both sides of each have the
    same bytes, so a boundary of responses is one of both.

    is_text: [P] bool, the student's rows that the teacher reads; ends: rows of the ends of turns.
    """
    a, b = alignment.student, alignment.teacher.table
    rows_a, rows_b = np.flatnonzero(is_text), np.delete(np.arange(len(theirs)), ends[1])
    found = align(a, ours[rows_a].astype(np.int64), b, theirs[rows_b]).rows
    of_text = [
        *(rows_a[found[:, 0]], rows_a[found[:, 1] - 1] + 1),
        *(rows_b[found[:, 2]], rows_b[found[:, 3] - 1] + 1),
    ]
    of_ends = [ends[0], ends[0] + 1, ends[1], ends[1] + 1]
    spans = np.concatenate([np.stack(of_text, axis=1), np.stack(of_ends, axis=1)])
    ordered: Array = spans[np.argsort(spans[:, 0], kind="stable")].astype(np.int64)
    return ordered


def _marks(spans: Array, count: int) -> Array:
    """Return [count] uint8: END at the last row of each span [G, 2], GAP outside of all."""
    change = np.zeros(count + 1, np.int64)
    change[spans[:, 0]] += 1
    np.subtract.at(change, spans[:, 1], 1)
    marks = np.where(np.cumsum(change)[:-1] > 0, 0, GAP).astype(np.uint8)
    marks[spans[:, 1] - 1] |= END
    return marks


def text_digests(rollouts: Rollouts) -> Array:
    """Return [N] int64, the digest of the ids of each prompt and response: see SpanScores.texts."""
    prompts = [np.array(p.token_ids, "<u4").tobytes() for p in rollouts.prompts]
    found = []
    for i, of in enumerate(rollouts.seq_prompt.tolist()):
        response = rollouts.tokens[rollouts.seq_off[i] : rollouts.seq_off[i + 1]]
        whole = hashlib.sha256(len(prompts[of]).to_bytes(8, "little") + prompts[of])
        whole.update(response.astype("<u4").tobytes())
        found.append(int.from_bytes(whole.digest()[:8], "little", signed=True))
    return np.array(found, np.int64)
