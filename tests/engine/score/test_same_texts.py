"""Log-probs of equal texts serve a second student, whose tokens are others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.alignment.span_scores import NONE
from logitcask.engine.backends.hf import HF
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.score.same_texts import SameTexts
from logitcask.engine.score.spans import score_spans
from logitcask.engine.store import open_store
from logitcask.engine.types import ModelRef, Rollouts, Scores
from tests.engine.score.scored import REQUEST, ref, run
from tests.engine.score.test_spans import alignment_of, pair_tokenizer, stored
from tests.engine.tiny import CHARACTERS, make_model, make_tokenizer, save_folder

PARAMS = replace(REQUEST, at_student=False)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    tokenizer = pair_tokenizer()
    model = make_model(vocab_size=len(tokenizer), seed=2, eos=tokenizer.eos_token_id)
    return ref(save_folder(tmp_path_factory.mktemp("pairs") / "teacher", model, tokenizer))


@pytest.fixture
def other(tmp_path: Path) -> ModelRef:
    """Make a student with the characters in another order: every id is another."""
    tokenizer = make_tokenizer(characters=CHARACTERS[::-1])
    return ref(save_folder(tmp_path / "other", make_model(seed=5), tokenizer))


def in_tokens_of(other: ModelRef, student: ModelRef, rollouts: Rollouts) -> Rollouts:
    ours, theirs = load_tokenizer(student.path), load_tokenizer(other.path)

    def translated(ids: Any) -> list[int]:
        tokens = ours.convert_ids_to_tokens([int(each) for each in ids])
        found: list[int] = theirs.convert_tokens_to_ids(tokens)
        return found

    prompts = tuple(replace(p, token_ids=tuple(translated(p.token_ids))) for p in rollouts.prompts)
    tokens = np.array(translated(rollouts.tokens), np.uint32)
    return replace(rollouts, prompts=prompts, tokens=tokens, student=None)


def test_another_student_of_the_same_texts_needs_no_scoring(
    store: Path, student: ModelRef, pairs: ModelRef, other: ModelRef
) -> None:
    scorer, keys = HF(pairs), {"teacher_name": "pairs", "params": PARAMS}
    run(store, pairs, scorer, alignment=alignment_of(student, pairs, NONE), **keys)
    opened = open_store(store)
    known = SameTexts(opened, opened.head(), "pairs", pairs, "float32")
    scored: list[int] = []

    def score(part: Rollouts) -> tuple[Scores, float]:
        scored.append(len(part.seq_prompt))
        return scorer.score(part, PARAMS), 1.0

    for rollouts, first in stored(store):
        second = in_tokens_of(other, student, rollouts)
        alignment = alignment_of(other, pairs, NONE)
        found, took_s = score_spans(
            alignment, second, lambda teacher, _: known.score(teacher, score), at_student=False
        )
        assert (scored, took_s) == ([], 0.0)
        np.testing.assert_array_equal(found.log_probs, first.log_probs)
        np.testing.assert_array_equal(found.student_marks, first.student_marks)
        # The twins are those of the other student.
        twin = dict(zip(found.piece_ids.tolist(), found.piece_twins.tolist(), strict=True))
        before = dict(zip(first.piece_ids.tolist(), first.piece_twins.tolist(), strict=True))
        assert any(twin[each] != before[each] for each in twin)
        # Only a response with another text is scored.
        if len(second.tokens) > 1 and int(second.lengths()[-1]) > 1:
            changed = second.tokens.copy()
            changed[-2] = changed[-2] % 90 + 4
            both = replace(second, tokens=changed)
            mixed, _ = score_spans(
                alignment, both, lambda teacher, _: known.score(teacher, score), at_student=False
            )
            alone, _ = score_spans(
                alignment,
                both,
                lambda teacher, _: (scorer.score(teacher, PARAMS), 0.0),
                at_student=False,
            )
            assert scored == [1]
            np.testing.assert_allclose(mixed.log_probs, alone.log_probs, atol=1e-5)
            scored.clear()


def test_log_probs_of_another_teacher_are_refused(
    store: Path, student: ModelRef, pairs: ModelRef
) -> None:
    keys = {"teacher_name": "pairs", "params": PARAMS}
    run(store, pairs, HF(pairs), alignment=alignment_of(student, pairs, NONE), **keys)
    opened = open_store(store)
    with pytest.raises(IdentityError, match="in float32, and this teacher"):
        SameTexts(opened, opened.head(), "pairs", replace(pairs, digest="sha256:0"), "float32")
    with pytest.raises(IdentityError, match="in bfloat16"):
        SameTexts(opened, opened.head(), "pairs", pairs, "bfloat16")
    with pytest.raises(ConfigError, match="no scores over spans"):
        SameTexts(opened, opened.head(), "none", pairs, "float32")
