"""The vllm backend without an installed vLLM: it opens, raises an error at use, imports nothing."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcask.engine.backends.base import open_backend
from logitcask.engine.backends.vllm.backend import to_matrix, valid_mask
from logitcask.engine.backends.vllm.hidden import read_head
from logitcask.engine.backends.vllm.sampling import check_supported
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.models.identity import model_ref
from logitcask.engine.types import IdLists, Prompt, SamplingParams
from tests.engine.tiny import make_model, save_folder


def test_without_vllm_the_backend_opens_and_its_use_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcask.engine.backends.vllm.engine.find_spec", lambda name: None)
    imported = "vllm" in sys.modules
    backend = open_backend("vllm")(model_ref(str(save_folder(tmp_path)), chat_template=True))
    prompt = Prompt(id="0", token_ids=(3,))
    with pytest.raises(ConfigError, match="needs the package vllm"):
        backend.generate([prompt], SamplingParams(max_new_tokens=2), seed=0, version=0)
    assert ("vllm" in sys.modules) == imported


@pytest.mark.parametrize("tie", [True, False])
def test_read_head_returns_the_head_of_the_model(tmp_path: Path, tie: bool) -> None:
    model = make_model(tie=tie)
    weight, bias = read_head(save_folder(tmp_path, model))
    assert torch.equal(weight, model.lm_head.weight)
    assert bias is None
    (tmp_path / "model.safetensors").rename(tmp_path / "lost")
    with pytest.raises(ModelError):
        read_head(tmp_path)


def test_ragged_rows_round_trip_through_a_matrix() -> None:
    lists = IdLists(cnt=np.array([2, 0, 3], np.uint16), ids=np.array([7, 5, 1, 2, 3], np.uint32))
    assert to_matrix(lists).tolist() == [[7, 5, -1], [-1, -1, -1], [1, 2, 3]]
    assert to_matrix(lists)[valid_mask(lists)].tolist() == lists.ids.tolist()


def test_distributions_that_vllm_would_change_are_rejected() -> None:
    for params in (
        {},
        {"min_p": 0.1},
        {"top_p": 0.5},
        {"temperature": 0.0},
        {"temperature": 0.01},
    ):
        check_supported(SamplingParams(**params))
    with pytest.raises(ConfigError, match="vLLM applies min-p first"):
        check_supported(SamplingParams(min_p=0.1, top_p=0.9))
    with pytest.raises(ConfigError, match="at 0.01 or more"):
        check_supported(SamplingParams(temperature=0.009))
