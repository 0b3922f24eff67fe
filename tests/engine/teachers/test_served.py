"""Who a served teacher is, and what is refused when it is somebody else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.parity import CONTROL_TIMES, FLOOR, PROBE_ROWS
from logitcask.engine.errors import ConfigError, IdentityError, ModelError
from logitcask.engine.prompts import load_tokenizer
from logitcask.engine.teachers.served import (
    SameTeacher,
    check_declared,
    check_tokenizer,
    is_served,
    served_ref,
    urls_of,
)
from logitcask.engine.types import Prompt, Rollouts, SamplingParams, ScoreRequest, Scores
from tests.engine.tiny import CHARACTERS, EOS, N_VOCAB, make_model, make_tokenizer, save_folder

ASK = ScoreRequest(entry_kind="topk", top_p=1.0, k_min=8, k_max=8, at_student=False)


class Changing:
    """A teacher that becomes another one after so many scorings."""

    capabilities = frozenset({"top", "entropy", "tail"})

    def __init__(self, first: HF, then: HF, after: int) -> None:
        self.first, self.then, self.left = first, then, after

    def score(self, rollouts: Rollouts, request: ScoreRequest, at: Any = None) -> Scores:
        self.left -= 1
        return (self.first if self.left >= 0 else self.then).score(rollouts, request, at)

    def describe(self) -> dict[str, str]:
        return {"name": "changing"}


def hf(folder: Path, seed: int) -> HF:
    return HF(save_folder(folder, make_model(seed=seed)), n_vocab=N_VOCAB, stop_ids=(EOS,))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[HF, HF]:
    return hf(tmp_path_factory.mktemp("a"), 0), hf(tmp_path_factory.mktemp("b"), 1)


@pytest.fixture(scope="module")
def rolled(pair: tuple[HF, HF]) -> Rollouts:
    prompts = [Prompt(id="p", token_ids=(5, 6, 7))]
    return pair[0].generate(prompts, SamplingParams(n=2, max_new_tokens=6), seed=0, version=0)


def test_a_url_is_a_server_and_a_folder_is_none() -> None:
    assert urls_of("http://a:8000/, https://b") == ["http://a:8000", "https://b"]
    assert not is_served("Qwen/Qwen3-4B")
    assert not is_served("./http:")
    with pytest.raises(ConfigError, match="'b:8000' among the servers"):
        urls_of("http://a:8000,b:8000")


def test_who_is_served_is_its_source_and_its_revision(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "teacher")
    told: dict[str, Any] = {"tokenizer": str(folder), "chat_template": True}
    ref = served_ref("big", "org/big", revision="abc", **told)
    assert ref.name == "big"
    assert ref.n_vocab == N_VOCAB
    assert ref.stop_ids == (EOS,)
    # The name that an operator gave it is no part of it; what is loaded is.
    assert served_ref("other", "org/big", revision="abc", **told).digest == ref.digest
    assert served_ref("big", "org/big", revision="abe", **told).digest != ref.digest
    assert served_ref("big", "org/huge", revision="abc", **told).digest != ref.digest


def test_a_root_that_is_a_folder_here_needs_no_tokenizer_and_another_does(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "teacher")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()  # a server's weights are elsewhere
    assert served_ref("big", str(folder), chat_template=False).path == folder
    with pytest.raises(ModelError, match="the tokenizer of 'big'") as caught:
        served_ref("big", "/models/on another machine", chat_template=False)
    assert "--tokenizer" in caught.value.remedy


def test_a_declared_revision_is_compared_where_one_is_declared() -> None:
    check_declared("abc", "rev=abc;tok=1")
    check_declared("abc", "vllm-0.32.0-12345678")
    check_declared("", "rev=abc")
    with pytest.raises(IdentityError, match="declares revision 'abe', and 'abc'"):
        check_declared("abc", "tok=1;rev=abe")


def test_another_tokenizer_map_is_refused_at_the_first_id_that_differs(tmp_path: Path) -> None:
    ref = served_ref("big", str(save_folder(tmp_path / "a")), chat_template=False)

    def of(tokenizer: Any) -> Any:
        return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]

    assert check_tokenizer(ref, of(load_tokenizer(ref.path)))
    assert not check_tokenizer(ref, lambda text: None)
    swapped = make_tokenizer(characters=CHARACTERS[::-1])
    with pytest.raises(IdentityError, match=r"token \d+ is id \d+ there and id \d+ here"):
        check_tokenizer(ref, of(swapped))
    with pytest.raises(IdentityError, match="is none there"):
        check_tokenizer(ref, lambda text: of(load_tokenizer(ref.path))(text)[:5])


def test_scores_of_a_teacher_that_stays_are_its_own(pair: tuple[HF, HF], rolled: Rollouts) -> None:
    same = SameTeacher(pair[0], N_VOCAB, print)
    for _ in range(3):
        np.testing.assert_array_equal(
            same.score(rolled, ASK).entry_lp, pair[0].score(rolled, ASK).entry_lp
        )


def test_what_a_teacher_says_is_believed_only_if_it_is_still_the_same(
    pair: tuple[HF, HF], rolled: Rollouts
) -> None:
    changing = Changing(*pair, after=10**9)
    same = SameTeacher(changing, N_VOCAB, print)
    same.score(rolled, ASK)
    changing.left = 1  # this unit's scores are still the first one's, and its probe is not
    with pytest.raises(IdentityError, match="not the one that began this run"):
        same.score(rolled, ASK)


class Crowded:
    """A teacher whose log-probs depend on how many sequences it is shown at once, on long ones."""

    capabilities = frozenset({"top", "entropy", "tail"})

    def __init__(self, inner: HF, by: float) -> None:
        self.inner, self.by, self.rows = inner, by, 0

    def score(self, rollouts: Rollouts, request: ScoreRequest, at: Any = None) -> Scores:
        scores = self.inner.score(rollouts, request, at)
        self.rows += rollouts.positions
        crowd = len(rollouts.finish) > 4 and len(rollouts.prompts[0].token_ids) > 1
        off = np.float32(self.by if crowd else 0.0)
        return replace(scores, lp=scores.lp - off, entry_lp=scores.entry_lp - off)

    def describe(self) -> dict[str, str]:
        return {"name": "crowded"}


def test_the_first_unit_is_scored_twice_and_the_tolerance_is_three_times_what_differs(
    pair: tuple[HF, HF], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcask.engine.teachers.served.CONTROL_ROWS", 12)
    prompts = [Prompt(id=str(i), token_ids=(5, 6, 7 + i)) for i in range(3)]
    rolled = pair[0].generate(prompts, SamplingParams(n=2, max_new_tokens=6), seed=0, version=0)
    crowded = Crowded(pair[0], 0.02)
    same = SameTeacher(crowded, N_VOCAB, print)
    assert same.tolerance == FLOOR
    before = crowded.rows
    same.score(rolled, ASK)
    assert same.at_work is not None
    assert same.at_work.largest == pytest.approx(0.02, rel=1e-3)
    assert same.tolerance == pytest.approx(CONTROL_TIMES * 0.02, rel=1e-3)
    # At most so many rows again, and the probe.
    assert 0 < crowded.rows - before - rolled.positions - PROBE_ROWS <= 12
    before = crowded.rows
    same.score(rolled, ASK)
    assert crowded.rows - before == rolled.positions + PROBE_ROWS


class Uneven(Crowded):
    """A teacher that answers otherwise when it is asked for as many ids as a unit is."""

    def __init__(self, inner: HF) -> None:
        super().__init__(inner, 0.5)

    def score(self, rollouts: Rollouts, request: ScoreRequest, at: Any = None) -> Scores:
        scores = self.inner.score(rollouts, request, at)
        off = np.float32(self.by if request.k_max == ASK.k_max else 0.0)
        return replace(scores, lp=scores.lp - off, entry_lp=scores.entry_lp - off)


def test_a_teacher_that_is_unsteady_at_work_is_refused(pair: tuple[HF, HF]) -> None:
    prompts = [Prompt(id=str(i), token_ids=(5, 6, 7 + i)) for i in range(3)]
    rolled = pair[0].generate(prompts, SamplingParams(n=2, max_new_tokens=6), seed=0, version=0)
    odd = SameTeacher(Uneven(pair[0]), N_VOCAB, print)
    with pytest.raises(IdentityError, match="differs from itself by 0.5"):
        odd.score(rolled, ASK)


def test_a_name_is_bound_to_how_its_teacher_behaved(pair: tuple[HF, HF]) -> None:
    first, other = (SameTeacher(each, N_VOCAB, print) for each in pair)

    class Chained:
        def __init__(self, lineage: dict[str, Any]) -> None:
            self.lineage = lineage

    class OnePin:
        def scores(self, name: str) -> dict[str, Any]:
            return {"segment": (Chained(first.lineage()),)} if name == "big" else {}

    pin: Any = OnePin()
    first.check_name(pin, "big")
    other.check_name(pin, "new")
    with pytest.raises(IdentityError, match="began the scores named 'big'"):
        other.check_name(pin, "big")
    slightly = replace(first.behaviour, lp=first.behaviour.lp + first.tolerance / 2)
    first.check(slightly, "it")
