"""Weights that change between units: open engines load them in place, proved, or open again."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.vllm.backend import VLLM
from logitcask.engine.backends.vllm.engine import Engine
from logitcask.engine.errors import ModelError
from logitcask.engine.types import ModelRef, Rollouts, SamplingParams
from tests.engine.tiny import make_model, save_folder
from tests.vllm.scored import PROMPTS, STUDENT_TOP_7, teacher

PLAIN = SamplingParams(n=2, max_new_tokens=12)


def versions(tmp_path: Path, *, tie: bool, count: int = 2) -> list[ModelRef]:
    """Return models of one architecture with other weights each."""
    models = (make_model(hidden=64, tie=tie, seed=3 + i) for i in range(count))
    refs = [teacher(str(save_folder(tmp_path / f"v{i}", m))) for i, m in enumerate(models)]
    return [dataclasses.replace(ref, version=i) for i, ref in enumerate(refs)]


def sample(vllm: VLLM, seed: int = 0) -> Rollouts:
    return vllm.generate(PROMPTS, PLAIN, seed=seed, version=0)


def fresh(ref: ModelRef, act: Callable[[VLLM], Any] = sample) -> Any:
    """Return what a new engine of that model gives."""
    vllm = VLLM(ref)
    try:
        return act(vllm)
    finally:
        vllm.close()


def check_equal(found: Rollouts, expected: Rollouts) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.b_lp, expected.b_lp, atol=1e-6, rtol=0)


def test_the_third_load_is_in_place_and_samples_as_a_new_engine(tmp_path: Path) -> None:
    first, second = versions(tmp_path, tie=False)
    expected, lines = fresh(second), list[str]()
    vllm = VLLM(first)
    before = sample(vllm)
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


def test_a_tied_head_that_stays_old_is_found_and_new_engines_open(tmp_path: Path) -> None:
    first, second = versions(tmp_path, tie=True)
    vllm, lines = VLLM(first), list[str]()
    before = sample(vllm)
    vllm.reload(second, lines.append)
    check_equal(sample(vllm), fresh(second))
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reload: Any, line: str
) -> None:
    monkeypatch.setattr(Engine, "reload", reload)
    first, second = versions(tmp_path, tie=False)
    vllm, lines = VLLM(first), list[str]()
    vllm.loads = 2  # the next one would not be compared with a new engine
    sample(vllm)
    vllm.reload(second, lines.append)
    check_equal(sample(vllm), fresh(second))
    assert len(lines) == 1
    assert line in lines[0]
    vllm.close()


def test_another_config_opens_a_new_engine(tmp_path: Path) -> None:
    first, second = versions(tmp_path, tie=False)
    file = second.path / "config.json"
    config = json.loads(file.read_text())
    config["rms_norm_eps"] = 0.1
    file.write_text(json.dumps(config))
    vllm, lines = VLLM(first), list[str]()
    sample(vllm)
    vllm.reload(second, lines.append)
    assert "config.json has another rms_norm_eps" in lines[0]
    check_equal(sample(vllm), fresh(second))
    vllm.close()


def test_scores_of_a_student_use_the_new_weights(tmp_path: Path) -> None:
    first, second = versions(tmp_path, tie=True)
    vllm, new = VLLM(first, exact=True), HF(second)
    vllm.score(sample(vllm), STUDENT_TOP_7)
    vllm.reload(second)
    rolled = sample(vllm)
    found, exact = vllm.score(rolled, STUDENT_TOP_7), new.score(rolled, STUDENT_TOP_7)
    np.testing.assert_allclose(found.entropy, exact.entropy, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(rolled.b_lp, found.lp, atol=1e-5, rtol=1e-5)
    vllm.close()
