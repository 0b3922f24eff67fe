"""Scoring of a store: one score segment per rollout segment, by a teacher with the same ids."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.errors import ConfigError, IdentityError, IncompleteError
from logitcask.engine.score.unit import unit_key
from logitcask.engine.store import open_store
from logitcask.engine.store.format.layouts import kept_lists
from logitcask.engine.types import (
    ModelRef,
    ScoreParams,
)
from tests.engine.score.scored import REQUEST, FailingScorer, ref, run, sampled_store
from tests.engine.tiny import EOS, make_model, make_tokenizer, save_folder


def test_every_rollout_segment_has_the_scores_of_the_scorer(
    store: Path, teacher: ModelRef, scorer: HF
) -> None:
    report = run(store, teacher, scorer)
    opened = open_store(store)
    snapshot = opened.head()
    by_base = snapshot.scores("big")
    assert (report.units_total, report.units_done_before, report.units_new) == (2, 0, 2)
    assert set(by_base) == {s.seg_id for s in snapshot.rollouts("main")}
    positions = 0
    for segment in snapshot.rollouts("main"):
        direct = scorer.score(opened.read_rollouts(segment), REQUEST)
        stored = opened.read_scores(by_base[segment.seg_id])
        ids, log_probs = kept_lists(stored)
        np.testing.assert_array_equal(ids, direct.ids)
        np.testing.assert_array_equal(stored.kept, direct.cnt)
        np.testing.assert_array_equal(stored.log_tail, direct.log_tail)
        np.testing.assert_allclose(log_probs, direct.entry_lp, rtol=2e-3)
        positions += len(direct.lp)
        provenance = by_base[segment.seg_id][0].provenance
        assert provenance["teacher"]["weights"] == teacher.digest
        assert provenance["request"] == REQUEST.record()
    assert report.positions == positions
    assert report.notes == ()
    seconds = [chain[0].seconds or 0.0 for chain in by_base.values()]
    assert min(seconds) > 0
    assert sum(seconds) < report.seconds


def test_a_killed_run_resumes_to_the_same_store(
    tmp_path: Path, store: Path, teacher: ModelRef, scorer: HF
) -> None:
    def contents(path: Path) -> dict[str, str]:
        return {k: c[0].seg_id for k, c in open_store(path).head().scores("big").items()}

    killed = shutil.copytree(store, tmp_path / "killed")
    run(store, teacher, scorer)
    with pytest.raises(KeyboardInterrupt):
        run(killed, teacher, FailingScorer(scorer, 1))
    seen: list[tuple[str, int, int]] = []
    report = run(killed, teacher, scorer, progress=lambda *x: seen.append(x[:3]))
    assert (report.units_done_before, report.units_new) == (1, 1)
    assert list(dict.fromkeys(seen)) == [("score", 1, 2), ("score", 2, 2)]
    assert contents(killed) == contents(store)
    idle = FailingScorer(scorer, 0)
    assert run(killed, teacher, idle).units_new == 0
    assert idle.started == 0


def test_a_teacher_with_another_tokenizer_is_refused(
    tmp_path: Path, store: Path, student: ModelRef, scorer: HF, folders: Path
) -> None:
    swapped = make_tokenizer()
    swapped.add_tokens(["<think>"])
    other = save_folder(tmp_path / "other", make_model(vocab_size=128), swapped)
    model = ref(other)
    with pytest.raises(IdentityError, match="tokenizer") as caught:
        run(store, model, scorer)
    assert student.tokenizer_digest in caught.value.cause
    assert model.tokenizer_digest in caught.value.cause
    assert "--student-tokenizer" in caught.value.hint
    wide = dataclasses.replace(ref(folders / "teacher"), n_vocab=120)
    with pytest.raises(IdentityError, match=r"vocabulary has 99 ids, that of .* has 120"):
        run(store, wide, scorer)
    assert open_store(store).head().names("score") == []


def test_another_template_is_a_note_and_another_unit(
    store: Path, folders: Path, scorer: HF
) -> None:
    chat = ref(folders / "teacher", chat_template=True)
    report = run(store, chat, scorer)
    assert len(report.notes) == 1
    assert "renders prompts differently" in report.notes[0]
    segment = open_store(store).head().rollouts("main")[0]
    plain, base = (
        {"teacher_kind": "teacher", "context": ""},
        {"teacher_kind": "base", "context": ""},
    )
    keys = {
        unit_key(segment, chat, REQUEST, plain),
        unit_key(segment, ref(folders / "teacher"), REQUEST, plain),
        unit_key(segment, ref(folders / "student"), REQUEST, plain),
        unit_key(segment, chat, ScoreParams(), plain),
        unit_key(segment, chat, REQUEST, base),
        unit_key(segment, chat, REQUEST, plain | {"context": "sha256:other"}),
    }
    assert len(keys) == 6


def test_a_stop_token_that_the_teacher_does_not_use(
    tmp_path: Path, teacher: ModelRef, folders: Path, scorer: HF
) -> None:
    """Stop the student at half of the ids, and its teacher at id 1 only."""
    model = make_model(eos=list(range(3, 50)))
    talker = ref(save_folder(tmp_path / "talker", model))
    sampled_store(tmp_path / "s", talker, n=4)
    with pytest.raises(IdentityError, match=r"\d+% of the stopped .* stop ids \[\d.*at \[1\] only"):
        run(tmp_path / "s", teacher, scorer)
    assert run(tmp_path / "s", teacher, scorer, eos_rows="keep").units_new == 2
    # A stop id that ended no response is allowed.
    unused = dataclasses.replace(ref(folders / "student"), stop_ids=(EOS, 2))
    sampled_store(tmp_path / "t", unused, length=1, n=1)
    opened = open_store(tmp_path / "t")
    tokens = [opened.read_rollouts(s).tokens for s in opened.head().rollouts("main")]
    assert 2 not in np.concatenate(tokens)
    assert run(tmp_path / "t", teacher, scorer).units_new == 2


def test_a_name_belongs_to_one_teacher(
    store: Path, student: ModelRef, teacher: ModelRef, scorer: HF
) -> None:
    run(store, teacher, scorer)
    with pytest.raises(IdentityError, match=r"'big' stands for teacher\.weights"):
        run(store, student, FailingScorer(HF(student), 0))
    with pytest.raises(IdentityError, match="'big' stands for teacher_kind"):
        run(store, teacher, FailingScorer(scorer, 0), role="base")
    drawn = ScoreParams(entry_kind="sampled", draws=3, at_student=False)
    with pytest.raises(IdentityError, match="'big' stands for a teacher's best ids, not drawn ids"):
        run(store, teacher, FailingScorer(scorer, 0), params=drawn)
    with pytest.raises(IdentityError, match="already, under the name 'big'"):
        run(store, teacher, scorer, teacher_name="copy")
    assert run(store, student, HF(student), teacher_name="self").units_new == 2


def test_scores_of_two_dtypes_are_a_note(store: Path, teacher: ModelRef, scorer: HF) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(store, teacher, FailingScorer(scorer, 1))
    report = run(store, teacher, HF(teacher, dtype="bfloat16"))
    assert report.units_new == 1
    assert report.notes == (
        "scores of 'big' in float32 exist already, and this run computes in bfloat16",
    )


def test_a_k_min_above_k_max_is_refused(store: Path, teacher: ModelRef, scorer: HF) -> None:
    """Prevent that train reports an exact top-20 of rows with 10 ids."""
    params = dataclasses.replace(REQUEST, k_min=20)
    with pytest.raises(ConfigError, match="k_min = 20 is more than k_max = 10"):
        run(store, teacher, FailingScorer(scorer, 0), params=params)


def test_missing_rollouts_and_capabilities_are_named(
    store: Path, teacher: ModelRef, scorer: HF
) -> None:
    with pytest.raises(IncompleteError, match="no rollouts named 'elsewhere'; it has: main"):
        run(store, teacher, scorer, rollouts_name="elsewhere")
    poor = FailingScorer(scorer, 9)
    poor.capabilities = frozenset({"top", "entropy", "tail"})
    with pytest.raises(ConfigError, match="the backend hf cannot give at_ids"):
        run(store, teacher, poor)
    whole = dataclasses.replace(REQUEST, at_student=False)
    assert run(store, teacher, poor, params=whole).units_new == 2


def test_a_teacher_without_at_ids_cannot_extend_its_scores(
    store: Path, teacher: ModelRef, scorer: HF
) -> None:
    poor = FailingScorer(scorer, 10**9)
    poor.capabilities = scorer.capabilities - {"at_ids"}
    plain = dataclasses.replace(REQUEST, at_student=False)
    with pytest.raises(ConfigError, match="cannot give at_ids"):
        run(store, teacher, poor, params=plain, extra_ids="mc")
    run(store, teacher, poor, params=plain)
    assert run(store, teacher, poor, params=plain).units_new == 0
    started = poor.started
    more = dataclasses.replace(plain, k_max=20)
    with pytest.raises(ConfigError, match="stored for a smaller request") as caught:
        run(store, teacher, poor, params=more)
    assert "under another name" in caught.value.hint
    assert poor.started == started
    assert run(store, teacher, scorer, params=more).units_new == 2
