"""Rollouts of a student in the ids of a teacher with another tokenizer."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from logitcask.engine.alignment.aligned_rollouts import align_rollouts
from logitcask.engine.alignment.alignment import Alignment, align_tokenizers, twins
from logitcask.engine.alignment.span_scores import END, GAP, NO_TWIN, PATCHED
from logitcask.engine.errors import PromptError, UnitError
from logitcask.engine.types import LENGTH, STOP, Prompt, Rollouts
from tests.engine.alignment.small_tokenizers import MAKERS, tokenizer_of

KINDS = [kind for kind in MAKERS if kind not in ("wordpiece", "unigram", "characters")]
TEXTS = ["12 + 30 = 42", " the teacher's text", "漢字 🙂 e\u0301", ""]


def alignment_of(student: str, teacher: str, **keys: Any) -> Alignment:
    ours, theirs = tokenizer_of(student), tokenizer_of(teacher)
    return align_tokenizers(
        ours,
        theirs,
        student_stops=[ours.eos_token_id],
        teacher_stops=[theirs.eos_token_id],
        **{"chat_template": False} | keys,
    )


def rollouts_of(kind: str, prompt: str, texts: list[str | list[int]]) -> Rollouts:
    """Make responses, each but the last with the end of the text."""
    tokenizer = tokenizer_of(kind)

    def ids(text: str | list[int]) -> list[int]:
        if isinstance(text, list):
            return text
        # Behind a character, so that no tokenizer begins the text with a space.
        whole: list[int] = tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"]
        before: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
        return whole[len(before) :]

    last = len(texts) - 1
    made = [ids(t) + [tokenizer.eos_token_id] * (i < last) for i, t in enumerate(texts)]
    count = sum(map(len, made))
    return Rollouts(
        prompts=(Prompt(id="p", token_ids=tuple(tokenizer(prompt)["input_ids"])),),
        seq_prompt=np.zeros(len(made), np.uint32),
        seq_off=np.cumsum([0, *map(len, made)]).astype(np.int64),
        tokens=np.array([i for each in made for i in each], np.uint32),
        loss_mask=np.ones(count, np.uint16),
        b_lp=np.zeros(count, np.float32),
        finish=np.array([STOP] * last + [LENGTH], np.uint16),
        version_start=np.zeros(len(made), np.int64),
        version_end=np.zeros(len(made), np.int64),
    )


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_every_byte_is_in_one_span_of_both(student: str, teacher: str) -> None:
    alignment = alignment_of(student, teacher)
    rollouts = rollouts_of(student, "the student reads", [*TEXTS, " 42"])
    found = align_rollouts(alignment, rollouts)
    theirs = found.rollouts
    ours, table = alignment.student, alignment.teacher.table
    assert table.spell(theirs.prompts[0].token_ids) == table.lead + b"the student reads"
    for i in range(len(TEXTS) + 1):
        response = rollouts.tokens[rollouts.seq_off[i] : rollouts.seq_off[i + 1]].tolist()
        tokens = theirs.tokens[theirs.seq_off[i] : theirs.seq_off[i + 1]].tolist()
        assert table.spell(tokens) == ours.spell(response)
        if i < len(TEXTS):
            assert tokens[-1] == tokenizer_of(teacher).eos_token_id
    spans = found.spans.tolist()
    assert (spans[0][0], spans[0][2]) == (0, 0)
    assert (spans[-1][1], spans[-1][3]) == (rollouts.positions, theirs.positions)
    for (_, a1, _, b1), (a0, _, b0, _) in pairwise(spans):
        assert (a1, b1) == (a0, b0)
    for a0, a1, b0, b1 in spans:
        assert ours.spell(rollouts.tokens[a0:a1]) == table.spell(theirs.tokens[b0:b1])
    for marks, offsets in ((found.student_marks, rollouts.seq_off), (found.marks, theirs.seq_off)):
        ends = np.add.reduceat(marks & END != 0, offsets[:-1])
        assert ends.sum() == len(spans)
        assert (marks[offsets[1:] - 1] & END).all()
    # The same response after the same prompt is the same text to the teacher.
    assert len(set(found.texts.tolist())) == len(TEXTS) + 1
    again = align_rollouts(alignment, replace(rollouts, finish=rollouts.finish[::-1]))
    np.testing.assert_array_equal(again.texts, found.texts)
    if student == teacher:
        np.testing.assert_array_equal(theirs.tokens, rollouts.tokens)
        assert found.spans.tolist() == [[i, i + 1] * 2 for i in range(rollouts.positions)]


def test_a_seam_inside_a_token_of_the_teacher_is_a_boundary_and_marked() -> None:
    """Let the teacher have one token where the prompt ends and the response begins."""
    alignment = alignment_of("characters", "byte-level")
    rollouts = rollouts_of("characters", "the stud", ["ent reads"])
    found = align_rollouts(alignment, rollouts)
    table = alignment.teacher.table
    assert table.spell(found.rollouts.prompts[0].token_ids) == b"the stud"
    assert table.spell(found.rollouts.tokens) == b"ent reads"
    assert (found.marks & PATCHED != 0).tolist() == [True] + [False] * (len(found.marks) - 1)


def test_control_tokens_without_a_counterpart_are_refused_by_id() -> None:
    alignment = alignment_of("nfc", "sentencepiece")
    tokenizer = tokenizer_of("nfc")
    unknown, a = tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids("a")
    with pytest.raises(UnitError, match=f"response 1 has the id {unknown}, a control token"):
        align_rollouts(alignment, rollouts_of("nfc", "the", ["a", [a, unknown, a]]))
    with pytest.raises(UnitError, match=f"prompt 'p' has the id {tokenizer.eos_token_id}"):
        align_rollouts(alignment, rollouts_of("nfc", "the</s>the", ["a"]))
    no_begin = replace(rollouts_of("nfc", "x", ["a"]), prompts=(Prompt(id="p", token_ids=()),))
    with pytest.raises(UnitError, match="has no text"):
        align_rollouts(alignment, no_begin)
    with pytest.raises(PromptError, match="has no prompt 'p'"):
        align_rollouts(replace(alignment, prompts={}), no_begin)


def test_a_response_is_cut_at_a_control_token_on_demand() -> None:
    alignment = alignment_of("nfc", "sentencepiece", cuts=True)
    tokenizer = tokenizer_of("nfc")
    unknown, a = tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids("a")
    texts: Any = ["a", [a, unknown, a], [unknown], [a, a]]
    found = align_rollouts(alignment, rollouts_of("nfc", "the", texts))
    table, theirs = alignment.teacher.table, found.rollouts
    read = [table.spell(theirs.tokens[i:j].tolist()) for i, j in pairwise(theirs.seq_off.tolist())]
    assert read == [b"a", b"a", b"", b"aa"]
    # a </s> | a <unk> a </s> | <unk> </s> | a a
    assert found.student_marks.tolist() == [END, END, END, GAP, GAP, GAP, GAP, GAP, END, END]
    assert (found.marks == END).all()
    assert found.spans[:, [1, 3]].tolist() == [[1, 1], [2, 2], [3, 3], [9, 4], [10, 5]]


def test_what_a_tokenizer_adds_before_a_text_is_its_own() -> None:
    alignment = replace(alignment_of("nfc", "sentencepiece"), begins=((7,), (5, 6)))
    rollouts = rollouts_of("nfc", "the", ["a"])
    plain = rollouts.prompts[0].token_ids
    begun = replace(rollouts, prompts=(Prompt(id="p", token_ids=(7, *plain)),))
    ids = align_rollouts(alignment, begun).rollouts.prompts[0].token_ids
    assert ids[:2] == (5, 6)
    assert alignment.teacher.table.spell(ids[2:]) == b"the"


def test_a_response_that_ends_inside_a_character_is_spelled_by_bytes() -> None:
    alignment = alignment_of("byte-level", "sentencepiece")
    single = alignment.student.single
    ids = [single[byte] for byte in b"a\xf0\x9f"]
    found = align_rollouts(alignment, rollouts_of("byte-level", "the", [ids]))
    assert alignment.teacher.table.spell(found.rollouts.tokens) == b"a\xf0\x9f"
    assert (found.marks & PATCHED != 0).tolist() == [False, True, True]
    characters = alignment_of("byte-level", "characters")
    with pytest.raises(UnitError, match=r"response 0: no ids .* spell b'\\xf0'"):
        align_rollouts(characters, rollouts_of("byte-level", "the", [ids]))


def test_twins_have_equal_bytes_and_stops_end_a_turn() -> None:
    alignment = alignment_of("byte-level", "sentencepiece")
    ours, theirs = alignment.student, alignment.teacher.table
    found = twins(ours, theirs)
    for index, twin in enumerate(found.tolist()):
        if twin != NO_TWIN:
            assert ours.pieces[index] == theirs.pieces[twin] != b""
            assert theirs.pieces.index(ours.pieces[index]) == twin
        elif ours.pieces[index]:
            assert ours.pieces[index] not in theirs.pieces
    stop, end = (tokenizer_of(k).eos_token_id for k in ("byte-level", "sentencepiece"))
    assert alignment.to_teacher[stop] == end
    assert alignment.to_student[end] == stop
    assert found[stop] == NO_TWIN


def test_the_end_of_a_turn_is_that_of_the_chat_template() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}END\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    made = tokenizer_of("sentencepiece").__class__(
        tokenizer_object=MAKERS["sentencepiece"](), unk_token="<unk>", eos_token="</s>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    student = tokenizer_of("byte-level")
    keys: Any = {"student_stops": [student.eos_token_id], "teacher_stops": []}
    for end in ("<turn>", "</s>", ""):
        made.chat_template = template.replace("END", end)
        found = align_tokenizers(student, made, chat_template=True, **keys)
        expected = made.convert_tokens_to_ids(end or "</s>")
        assert found.ends == {student.eos_token_id: expected}
