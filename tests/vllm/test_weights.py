"""Weights that change between rounds: every open engine has the new ones, or it is refused."""

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
from tests.vllm.scored import OWN, PROMPTS, teacher

GREEDY = SamplingParams(n=1, temperature=0.0, max_new_tokens=12)


def start(tmp_path: Path, *, tie: bool) -> tuple[ModelRef, Path]:
    """A model and a folder of other weights."""
    before = save_folder(tmp_path / "before", make_model(hidden=64, tie=tie))
    after = save_folder(tmp_path / "after", make_model(hidden=64, tie=tie, seed=5))
    return teacher(str(before)), after


def roll(model: Any, version: int) -> Rollouts:
    rolled: Rollouts = model.generate(PROMPTS, GREEDY, seed=0, version=version)
    return rolled


def test_rollouts_and_scores_are_of_the_new_weights(tmp_path: Path) -> None:
    ref, after = start(tmp_path, tie=True)
    vllm, new = VLLM(ref, exact=True), HF(dataclasses.replace(ref, path=after))
    old = roll(vllm, 0)
    vllm.score(old, OWN)
    vllm.update_weights(after)
    rolled, theirs = roll(vllm, 1), roll(new, 1)
    np.testing.assert_array_equal(rolled.tokens, theirs.tokens)
    assert rolled.tokens.tolist() != old.tokens.tolist()
    ours, true = vllm.score(rolled, OWN), new.score(rolled, OWN)
    np.testing.assert_allclose(ours.entropy, true.entropy, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(ours.entry_lp, true.entry_lp, atol=1e-5, rtol=1e-5)
    vllm.close()


@pytest.mark.parametrize("tie", [True, False])
def test_in_place_the_probe_catches_a_tied_head_that_stays_old(
    tmp_path: Path, tie: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "reloads_in_place", lambda device: True)
    ref, after = start(tmp_path, tie=tie)
    vllm = VLLM(ref)
    roll(vllm, 0)
    if tie:
        with pytest.raises(IdentityError, match="after an update of its weights"):
            vllm.update_weights(after)
    else:
        vllm.update_weights(after)
        new = HF(dataclasses.replace(ref, path=after))
        np.testing.assert_array_equal(roll(vllm, 1).tokens, roll(new, 1).tokens)
    vllm.close()
