"""Comparison of tokenizer maps: an id that occurs must be the same token to student and teacher."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcask.engine.backends.hf import HF
from logitcask.engine.errors import IdentityError, ModelError, UnitError
from logitcask.engine.models.fingerprint import (
    MIN_PROB,
)
from logitcask.engine.rollout.plan import rollout
from logitcask.engine.rollout.unit import RolloutRequest
from logitcask.engine.store import Store, open_store
from logitcask.engine.teachers.token_maps import (
    compare_maps,
    shared_vocabulary,
)
from logitcask.engine.types import ModelRef, Prompt, Rollouts, SamplingParams, ScoreParams
from tests.engine.score.scored import ref, run
from tests.engine.tiny import CHARACTERS, N_VOCAB, make_model, make_tokenizer, save_folder

TOP_2 = ScoreParams(entry_kind="topk", top_p=1.0, k_min=2, k_max=2)
MAPS = st.dictionaries(st.integers(0, 30), st.sampled_from("abc"), min_size=1)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ref(save_folder(tmp_path_factory.mktemp("models") / "student"))


@pytest.fixture(scope="module")
def template_store(student: ModelRef, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store with one short sequence, so that most ids do not occur."""
    path = tmp_path_factory.mktemp("stores") / "made"
    rollout(
        RolloutRequest(
            store=open_store(path, create=True),
            model=student,
            sampler=HF(student),
            prompts=[Prompt(id="p0", token_ids=(3, 4))],
            sampling=SamplingParams(n=1, max_new_tokens=4),
            student_k=3,
        )
    )
    return path


@pytest.fixture
def store(template_store: Path, tmp_path: Path) -> Store:
    return open_store(shutil.copytree(template_store, tmp_path / "s"))


def rolled(store: Store) -> Rollouts:
    return store.read_rollouts(store.head().rollouts("main")[0])


def teacher_without(token: int, folder: Path) -> ModelRef:
    """Return a teacher with another token at this id than the student."""
    renamed = CHARACTERS[: token - 3] + "é" + CHARACTERS[token - 2 :]
    return ref(save_folder(folder, make_model(seed=1), make_tokenizer(characters=renamed)))


def score(store: Store, student: ModelRef, teacher: ModelRef, **kwargs: Any) -> Any:
    """Score as the command with --student-tokenizer does."""
    shared = shared_vocabulary(student.provenance(), teacher, str(student.path))
    assert shared is not None
    teacher = replace(teacher, n_vocab=shared.n_vocab)
    return run(Path(store.url), teacher, HF(teacher), params=TOP_2, shared=shared, **kwargs)


def test_an_unused_id_may_be_another_token(store: Store, student: ModelRef, tmp_path: Path) -> None:
    found, plain = rolled(store), HF(ref(save_folder(tmp_path / "plain", make_model(seed=1))))
    expected = plain.score(found, TOP_2)
    used = {3, 4, *found.tokens, *found.student.ids, *expected.ids}
    unused = min(set(range(3, N_VOCAB)) - used)
    report = score(store, student, teacher_without(unused, tmp_path / "t"))
    (note,) = report.notes
    word = repr(CHARACTERS[unused - 3])
    assert "differ in 1 ids, which is harmless" in note
    assert f"{unused} ({word} to the student, 'é' to the teacher)" in note
    (segments,) = store.head().scores("big").values()
    known = store.read_scores(segments, base=found)
    np.testing.assert_allclose(known.lp, expected.lp, rtol=1e-6)
    assert segments[0].provenance["teacher"]["tokenizer"] != student.tokenizer_digest


@pytest.mark.parametrize("where", ["prompt", "responses", "student's best", "teacher's likely"])
def test_a_used_id_of_another_token_is_an_error(
    where: str, store: Store, student: ModelRef, tmp_path: Path
) -> None:
    found = rolled(store)
    listed, sampled = set(found.student.ids.tolist()), set(found.tokens.tolist())
    best = HF(ref(save_folder(tmp_path / "plain", make_model(seed=1)))).score(found, TOP_2)
    assert (best.entry_lp > np.log(MIN_PROB)).all()
    token = {
        "prompt": 4,
        "responses": min(sampled - {1}),
        "student's best": min(listed - sampled - {3, 4}),
        "teacher's likely": min(set(best.ids.tolist()) - listed - sampled - {3, 4}),
    }[where]
    teacher = teacher_without(token, tmp_path / "t")
    with pytest.raises(UnitError, match=rf"{where}.*of different tokens .* {token} \("):
        score(store, student, teacher)
    assert not store.head().scores("big")


def test_a_teacher_with_more_ids_is_renormalized_over_the_shared_ids(
    store: Store, student: ModelRef, tmp_path: Path
) -> None:
    more = make_tokenizer(characters=CHARACTERS + "éß")
    model = make_model(seed=1, vocab_size=N_VOCAB + 2)
    teacher = ref(save_folder(tmp_path / "t", model, more))
    found = rolled(store)
    report = score(store, student, teacher)
    assert f"{N_VOCAB} (none to the student, 'é' to the teacher)" in report.notes[0]
    (segments,) = store.head().scores("big").values()
    ids = np.array([[3, 4, *found.tokens.tolist()]])
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))).logits[0, 1:-1, :N_VOCAB].double()
    exact = logits.log_softmax(1).numpy()[np.arange(len(found.tokens)), found.tokens]
    np.testing.assert_allclose(store.read_scores(segments, base=found).lp, exact, atol=1e-5)


def test_without_the_students_tokenizer_other_maps_are_an_error(
    store: Store, student: ModelRef, tmp_path: Path
) -> None:
    teacher = teacher_without(9, tmp_path / "t")
    assert shared_vocabulary(student.provenance(), teacher) is None
    with pytest.raises(IdentityError, match="the student's tokenizer is") as caught:
        run(Path(store.url), teacher, HF(teacher), params=TOP_2)
    assert "--student-tokenizer" in caught.value.hint
    with pytest.raises(IdentityError, match="and that of the student is"):
        shared_vocabulary(student.provenance(), teacher, str(teacher.path))
    with pytest.raises(ModelError, match="no folder"):
        shared_vocabulary(student.provenance(), teacher, str(tmp_path / "none here"))


def test_equal_tokenizers_need_no_comparison(student: ModelRef) -> None:
    assert shared_vocabulary(student.provenance(), student, "/nowhere") is None


def test_maps_that_agree_on_few_ids_are_an_error(student: ModelRef) -> None:
    student_map = {i: str(i) for i in range(10)}
    teacher_map = {i: str(i) for i in range(4)} | dict.fromkeys(range(4, 10), "x")
    with pytest.raises(IdentityError, match="agree on 4 of 10 ids"):
        compare_maps(student_map, teacher_map, "s", student.tokenizer_digest, name=student.name)


def test_scores_with_a_differing_id_can_be_extended(
    store: Store, student: ModelRef, tmp_path: Path
) -> None:
    """Add extra ids to scores that hold an accepted id of another token."""
    full_params = replace(TOP_2, k_min=N_VOCAB, k_max=N_VOCAB)
    model = make_model(seed=1, spread=0.6)
    found, plain = rolled(store), HF(ref(save_folder(tmp_path / "plain", model)))
    best = plain.score(found, full_params)
    rare = {*best.ids[best.entry_lp < np.log(MIN_PROB) - 1].tolist()}
    seen = {3, 4, *found.tokens.tolist(), *found.student.ids.tolist()}
    seen |= {*best.ids[best.entry_lp > np.log(MIN_PROB) - 1].tolist()}
    token = min(rare - seen)
    renamed = CHARACTERS[: token - 3] + "é" + CHARACTERS[token - 2 :]
    folder = save_folder(tmp_path / "t", model, make_tokenizer(characters=renamed))
    teacher = ref(folder)
    shared = shared_vocabulary(student.provenance(), teacher, str(student.path))
    kwargs: dict[str, Any] = {"shared": shared, "params": full_params}
    run(Path(store.url), teacher, HF(teacher), **kwargs)
    more = HF(student)
    run(Path(store.url), student, more, teacher_name="self", params=TOP_2)
    assert run(Path(store.url), teacher, HF(teacher), extra_ids="self", **kwargs).units_new == 1


@given(MAPS, MAPS)
def test_differing_ids_are_all_ids_of_different_tokens(
    student_map: dict[int, str], teacher_map: dict[int, str]
) -> None:
    same = {i for i in student_map if teacher_map.get(i) == student_map[i]}
    if 2 * len(same) < len(student_map.keys() | teacher_map.keys()):
        with pytest.raises(IdentityError):
            compare_maps(student_map, teacher_map, "s", "t", name="t")
        return
    found = compare_maps(student_map, teacher_map, "s", "t", name="t")
    assert found.differing.tolist() == sorted((student_map.keys() | teacher_map.keys()) - same)
    assert found.n_vocab == max(student_map.keys() & teacher_map.keys()) + 1
    found.check(np.array(sorted(same)), "here", "t")
    for token in found.differing:
        with pytest.raises(UnitError, match=rf"here: ids .* \(1\): {token} "):
            found.check(np.array([*same, token]), "here", "t")
