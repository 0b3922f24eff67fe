"""Weights that change between units: open engines load them in place, proved, or open again."""

import dataclasses
import itertools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.vllm.backend import VLLM
from logitcask.engine.backends.vllm.engine import Engine
from logitcask.engine.backends.vllm.reload import config_change, is_compared
from logitcask.engine.commands.worker import watch_rollouts
from logitcask.engine.config.parse.toml import validate
from logitcask.engine.config.sections import RolloutConfig
from logitcask.engine.errors import ModelError
from logitcask.engine.models.identity import write_metadata
from logitcask.engine.store import open_store
from logitcask.engine.types import ModelRef, Rollouts, SamplingParams
from tests.engine.tiny import make_model, save_folder
from tests.vllm.scored import PROMPTS, STUDENT_TOP_7, teacher

PLAIN = SamplingParams(n=2, max_new_tokens=12)


Version = tuple[ModelRef, Rollouts]
"""A model, and what a new engine samples from it."""


@pytest.fixture(scope="module", params=["untied"])
def versions(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    """Return two models of one architecture with other weights."""
    found, tie = [], request.param == "tied"
    for number in range(2):
        model = make_model(hidden=64, tie=tie, seed=3 + number)
        ref = teacher(str(save_folder(tmp_path_factory.mktemp("version"), model)))
        vllm = VLLM(ref)
        found.append((dataclasses.replace(ref, version=number), sample(vllm)))
        vllm.close()
    return found


def sample(vllm: VLLM) -> Rollouts:
    return vllm.generate(PROMPTS, PLAIN, seed=0, version=0)


def check_equal(found: Rollouts, expected: Rollouts) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.b_lp, expected.b_lp, atol=1e-6, rtol=0)


def test_the_third_load_is_in_place_and_samples_as_a_new_engine(versions: list[Version]) -> None:
    (first, before), (second, expected) = versions
    vllm, lines = VLLM(first), list[str]()
    check_equal(sample(vllm), before)
    engines = [vllm.engine("sample")]
    for ref in (second, first, second):
        vllm.reload(ref, lines.append)
        engines.append(vllm.engine("sample"))
    assert lines == []
    assert [a is b for a, b in itertools.pairwise(engines)] == [False, False, True]
    found = sample(vllm)
    check_equal(found, expected)
    assert found.tokens.tolist() != before.tokens.tolist()
    vllm.reload(dataclasses.replace(second, version=7), lines.append)
    assert vllm.engine("sample") is engines[-1], "the same weights are not loaded again"
    vllm.close()


@pytest.mark.parametrize("versions", ["tied"], indirect=True)
def test_a_tied_head_that_stays_old_is_found_and_new_engines_open(versions: list[Version]) -> None:
    (first, before), (second, expected) = versions
    vllm, lines = VLLM(first), list[str]()
    sample(vllm)
    vllm.reload(second, lines.append)
    check_equal(sample(vllm), expected)
    # A vLLM that packs no head on a CPU would load it in place.
    assert len(lines) == 1
    assert f"version 1 of {second.name} in a new engine: " in lines[0]
    assert "differs after a load in place from a new engine" in lines[0]
    vllm.reload(first, lines.append)
    assert len(lines) == 2, "no second trial: engines open again with each version"
    check_equal(sample(vllm), before)
    vllm.close()


def stale(engine: Engine, path: Path) -> None:
    """Load nothing."""


def broken(engine: Engine, path: Path) -> None:
    raise ModelError("vLLM cannot load in place", hint="open a new engine")


@pytest.mark.parametrize(
    ("reload", "line"),
    [(stale, "gives the same answers to a probe"), (broken, "cannot load in place")],
)
def test_old_weights_never_stay(
    versions: list[Version], monkeypatch: pytest.MonkeyPatch, reload: Any, line: str
) -> None:
    monkeypatch.setattr(Engine, "reload", reload)
    (first, _), (second, expected) = versions
    vllm, lines = VLLM(first), list[str]()
    vllm.loads = 2  # the next one would not be compared with a new engine
    sample(vllm)
    vllm.reload(second, lines.append)
    check_equal(sample(vllm), expected)
    assert len(lines) == 1
    assert line in lines[0]
    vllm.close()


def test_only_values_that_an_engine_depends_on_are_another_config() -> None:
    old = {"rms_norm_eps": 1e-6, "dtype": "bfloat16", "transformers_version": "5.19.0", "n": 1}
    assert config_change(old, old | {"dtype": "float32", "transformers_version": "5.20.0"}) == ""
    new = {**old, "rms_norm_eps": 0.1, "rope": {}}
    assert config_change(old, new) == "config.json has another rms_norm_eps, rope"


def test_loads_are_compared_at_powers_of_two() -> None:
    assert [load for load in range(1, 70) if is_compared(load)] == [1, 2, 4, 8, 16, 32, 64]


def test_a_worker_samples_the_next_version_with_its_weights(
    versions: list[Version], tmp_path: Path
) -> None:
    folder = shutil.copytree(versions[0][0].path, tmp_path / "student")
    first, second = dataclasses.replace(versions[0][0], path=folder), versions[1][0]
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "0", "prompt": "1 + 1 ="}) + "\n")
    values = {
        "student": {"model": str(first.path)},
        "prompts": {"file": tmp_path / "p.jsonl", "chat_template": False},
        "store": {"url": str(tmp_path / "store")},
        "rollout": {"n": 2, "max_new_tokens": 8, "student_topk": 4},
        "work": {"worker": True, "worker_name": "w"},
        "run": {"device": "cpu", "backend": "vllm"},
    }
    lines = list[str]()

    def save() -> None:
        shutil.copy(second.path / "model.safetensors", first.path)
        more: dict[str, Any] = {"pin": None, "plan": "", "objective": ""}
        base = first.base_weights
        write_metadata(first.path, base_weights=base, parent=base, version=1, **more)

    actions = [save]

    class Stop(threading.Event):
        """Save the second version at the first wait, and stop at the second one."""

        def wait(self, timeout: float | None = None) -> bool:
            if actions:
                actions.pop()()
            else:
                self.set()
            return self.is_set()

    config = validate(RolloutConfig, values, source="test")
    assert watch_rollouts(config, stop=Stop(), on_event=lines.append).units == 2
    assert f"student version 1 of {first.path}" in lines
    assert not [line for line in lines if "new engine" in line]
    store = open_store(tmp_path / "store")
    segments = store.head().rollouts("main")
    assert [s.provenance["student"]["weights"] for s in segments] == [first.digest, second.digest]
    rolled = store.read_rollouts(segments[1])
    exact = HF(second).score(rolled, STUDENT_TOP_7)
    assert rolled.student is not None
    np.testing.assert_allclose(rolled.b_lp, exact.lp, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(rolled.student.entropy, exact.entropy, atol=1e-5, rtol=1e-5)
