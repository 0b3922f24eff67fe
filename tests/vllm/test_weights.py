"""Weights that change between rounds: every open engine loads them, or an error is raised."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.vllm import backend
from logitcask.engine.backends.vllm.backend import VLLM
from logitcask.engine.errors import IdentityError
from logitcask.engine.types import ModelRef, Rollouts, SamplingParams
from tests.engine.tiny import make_model, save_folder
from tests.vllm.scored import PROMPTS, STUDENT_TOP_7, teacher

GREEDY = SamplingParams(n=1, temperature=0.0, max_new_tokens=12)


def start(tmp_path: Path, *, tie: bool) -> tuple[ModelRef, Path]:
    """Return a model and a folder of other weights."""
    before = save_folder(tmp_path / "before", make_model(hidden=64, tie=tie))
    after = save_folder(tmp_path / "after", make_model(hidden=64, tie=tie, seed=5))
    return teacher(str(before)), after


def sample(model: Any, version: int) -> Rollouts:
    rolled: Rollouts = model.generate(PROMPTS, GREEDY, seed=0, version=version)
    return rolled


def test_rollouts_and_scores_use_the_new_weights(tmp_path: Path) -> None:
    ref, after = start(tmp_path, tie=True)
    vllm, new = VLLM(ref, exact=True), HF(dataclasses.replace(ref, path=after))
    old = sample(vllm, 0)
    vllm.score(old, STUDENT_TOP_7)
    vllm.update_weights(after)
    rolled, from_hf = sample(vllm, 1), sample(new, 1)
    np.testing.assert_array_equal(rolled.tokens, from_hf.tokens)
    assert rolled.tokens.tolist() != old.tokens.tolist()
    found, exact = vllm.score(rolled, STUDENT_TOP_7), new.score(rolled, STUDENT_TOP_7)
    np.testing.assert_allclose(found.entropy, exact.entropy, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5, rtol=1e-5)
    vllm.close()


@pytest.mark.parametrize("tie", [True, False])
def test_the_probe_finds_a_tied_head_without_the_update(
    tmp_path: Path, tie: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "reloads_in_place", lambda device: True)
    ref, after = start(tmp_path, tie=tie)
    vllm = VLLM(ref)
    sample(vllm, 0)
    if tie:
        with pytest.raises(IdentityError, match="after an update of its weights"):
            vllm.update_weights(after)
    else:
        vllm.update_weights(after)
        new = HF(dataclasses.replace(ref, path=after))
        np.testing.assert_array_equal(sample(vllm, 1).tokens, sample(new, 1).tokens)
    vllm.close()
