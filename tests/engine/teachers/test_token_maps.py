"""An id is one token to student and teacher wherever it occurs; elsewhere they may differ."""

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

ASK = ScoreParams(entry_kind="topk", top_p=1.0, k_min=2, k_max=2)
MAPS = st.dictionaries(st.integers(0, 30), st.sampled_from("abc"), min_size=1)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ref(save_folder(tmp_path_factory.mktemp("models") / "student"))


@pytest.fixture(scope="module")
def made(student: ModelRef, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sequence of few rows, so that most ids do not occur."""
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
def store(made: Path, tmp_path: Path) -> Store:
    return open_store(shutil.copytree(made, tmp_path / "s"))


def rolled(store: Store) -> Rollouts:
    return store.read_rollouts(store.head().rollouts("main")[0])


def teacher_without(token: int, folder: Path) -> ModelRef:
    """A teacher to which this id is another token than to the student."""
    renamed = CHARACTERS[: token - 3] + "é" + CHARACTERS[token - 2 :]
    return ref(save_folder(folder, make_model(seed=1), make_tokenizer(characters=renamed)))


def score(store: Store, student: ModelRef, teacher: ModelRef, **keys: Any) -> Any:
    """As a command with --student-tokenizer does."""
    shared = shared_vocabulary(student.lineage(), teacher, str(student.path))
    assert shared is not None
    teacher = replace(teacher, n_vocab=shared.n_vocab)
    return run(Path(store.url), teacher, HF(teacher), params=ASK, shared=shared, **keys)


def test_an_id_that_does_not_occur_may_be_another_token(
    store: Store, student: ModelRef, tmp_path: Path
) -> None:
    found, plain = rolled(store), HF(ref(save_folder(tmp_path / "plain", make_model(seed=1))))
    expected = plain.score(found, ASK)
    used = {3, 4, *found.tokens, *found.student.ids, *expected.ids}
    free = min(set(range(3, N_VOCAB)) - used)
    report = score(store, student, teacher_without(free, tmp_path / "t"))
    (note,) = report.notes
    word = repr(CHARACTERS[free - 3])
    assert "differ in 1 ids, which is harmless" in note
    assert f"{free} ({word} to the student, 'é' to the teacher)" in note
    (chain,) = store.head().scores("big").values()
    known = store.read_scores(chain, base=found)
    np.testing.assert_allclose(known.lp, expected.lp, rtol=1e-6)
    assert chain[0].lineage["teacher"]["tokenizer"] != student.tokenizer_digest


@pytest.mark.parametrize("where", ["prompt", "responses", "student's best", "teacher's likely"])
def test_an_id_that_occurs_is_one_token_to_both(
    where: str, store: Store, student: ModelRef, tmp_path: Path
) -> None:
    found = rolled(store)
    listed, sampled = set(found.student.ids.tolist()), set(found.tokens.tolist())
    best = HF(ref(save_folder(tmp_path / "plain", make_model(seed=1)))).score(found, ASK)
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


def test_a_teacher_with_more_ids_is_asked_over_those_that_both_know(
    store: Store, student: ModelRef, tmp_path: Path
) -> None:
    more = make_tokenizer(characters=CHARACTERS + "éß")
    model = make_model(seed=1, vocab_size=N_VOCAB + 2)
    teacher = ref(save_folder(tmp_path / "t", model, more))
    found = rolled(store)
    report = score(store, student, teacher)
    assert f"{N_VOCAB} (none to the student, 'é' to the teacher)" in report.notes[0]
    (chain,) = store.head().scores("big").values()
    ids = np.array([[3, 4, *found.tokens.tolist()]])
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))).logits[0, 1:-1, :N_VOCAB].double()
    exact = logits.log_softmax(1).numpy()[np.arange(len(found.tokens)), found.tokens]
    np.testing.assert_allclose(store.read_scores(chain, base=found).lp, exact, atol=1e-5)


def test_without_the_students_tokenizer_there_is_nothing_to_compare(
    store: Store, student: ModelRef, tmp_path: Path
) -> None:
    teacher = teacher_without(9, tmp_path / "t")
    assert shared_vocabulary(student.lineage(), teacher) is None
    with pytest.raises(IdentityError, match="the student's tokenizer is") as caught:
        run(Path(store.url), teacher, HF(teacher), params=ASK)
    assert "--student-tokenizer" in caught.value.hint
    with pytest.raises(IdentityError, match="and that of the student is"):
        shared_vocabulary(student.lineage(), teacher, str(teacher.path))
    with pytest.raises(ModelError, match="no folder"):
        shared_vocabulary(student.lineage(), teacher, str(tmp_path / "none here"))


def test_equal_tokenizers_need_no_comparison(student: ModelRef) -> None:
    assert shared_vocabulary(student.lineage(), student, "/nowhere") is None


def test_tokenizers_that_have_little_in_common_are_refused(student: ModelRef) -> None:
    ours = {i: str(i) for i in range(10)}
    theirs = {i: str(i) for i in range(4)} | dict.fromkeys(range(4, 10), "x")
    with pytest.raises(IdentityError, match="agree on 4 of 10 ids"):
        compare_maps(ours, theirs, "s", student)


def test_what_is_known_already_is_not_asked_after_again(
    store: Store, student: ModelRef, tmp_path: Path
) -> None:
    """An unlikely id of the teacher's own was accepted; more ids can still be asked at."""
    everything = replace(ASK, k_min=N_VOCAB, k_max=N_VOCAB)
    model = make_model(seed=1, spread=0.6)
    found, plain = rolled(store), HF(ref(save_folder(tmp_path / "plain", model)))
    best = plain.score(found, everything)
    rare = {*best.ids[best.entry_lp < np.log(MIN_PROB) - 1].tolist()}
    seen = {3, 4, *found.tokens.tolist(), *found.student.ids.tolist()}
    seen |= {*best.ids[best.entry_lp > np.log(MIN_PROB) - 1].tolist()}
    token = min(rare - seen)
    renamed = CHARACTERS[: token - 3] + "é" + CHARACTERS[token - 2 :]
    folder = save_folder(tmp_path / "t", model, make_tokenizer(characters=renamed))
    teacher = ref(folder)
    shared = shared_vocabulary(student.lineage(), teacher, str(student.path))
    told: dict[str, Any] = {"shared": shared, "params": everything}
    run(Path(store.url), teacher, HF(teacher), **told)
    more = HF(student)
    run(Path(store.url), student, more, teacher_name="self", params=ASK)
    assert run(Path(store.url), teacher, HF(teacher), extra_ids="self", **told).units_new == 1


@given(MAPS, MAPS)
def test_every_id_is_one_token_to_both_or_among_the_differing(
    ours: dict[int, str], theirs: dict[int, str]
) -> None:
    teacher = ModelRef(
        name="t",
        path=Path(),
        revision="",
        digest="",
        tokenizer_digest="t",
        template_digest="",
        n_vocab=31,
        stop_ids=(1,),
        version=0,
        root="",
    )
    same = {i for i in ours if theirs.get(i) == ours[i]}
    if 2 * len(same) < len(ours.keys() | theirs.keys()):
        with pytest.raises(IdentityError):
            compare_maps(ours, theirs, "s", teacher)
        return
    found = compare_maps(ours, theirs, "s", teacher)
    assert found.differing.tolist() == sorted((ours.keys() | theirs.keys()) - same)
    assert found.n_vocab == max(ours.keys() & theirs.keys()) + 1
    found.check(np.array(sorted(same)), "here", "t")
    for token in found.differing:
        with pytest.raises(UnitError, match=rf"here: ids .* \(1\): {token} "):
            found.check(np.array([*same, token]), "here", "t")
