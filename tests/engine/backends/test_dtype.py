"""The compute type of dtype = auto: by the device, the config of the model and the CPU."""

import json
from pathlib import Path

import pytest
import torch

from logitcask.engine.backends.hf import HF, pick_dtype
from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.models.identity import config_dtype
from logitcask.engine.training.settings import training_arguments
from tests.engine.tiny import EOS, N_VOCAB, make_model, save_folder

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALF, FULL = torch.bfloat16, torch.float32


@pytest.fixture
def half(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "half", make_model().bfloat16())


@pytest.mark.parametrize(
    ("able", "dtype"),
    [
        ({"amx_bf16": True}, HALF),
        ({"avx512_bf16": True, "amx_bf16": False}, HALF),
        ({"avx512_f": True, "amx_bf16": False}, FULL),
        (None, FULL),  # an older torch
    ],
)
def test_auto_follows_the_config_where_the_cpu_multiplies_bfloat16(
    half: Path, able: dict[str, bool] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if able is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    full = save_folder(half.parent / "full", make_model())
    assert [config_dtype(each) for each in (half, full)] == ["bfloat16", "float32"]
    assert pick_dtype("auto", CPU, half) == dtype
    assert pick_dtype("auto", CPU, full) == pick_dtype("auto", CPU) == FULL
    assert pick_dtype("float32", CPU, half) == FULL
    assert pick_dtype("bfloat16", CPU, full) == HALF
    assert pick_dtype("auto", GPU, full) == pick_dtype("auto", GPU) == HALF
    hf = HF(half, device="cpu", n_vocab=N_VOCAB, stop_ids=(EOS,))
    assert (hf.dtype, hf.model.dtype) == (dtype, dtype)
    # A student in training: its weights are float32, and samples have the type of the training.
    network = make_model().requires_grad_(False)
    live = HF(half, n_vocab=N_VOCAB, stop_ids=(EOS,), network=network)
    run = Run(out=half.parent / "out", device="cpu")
    assert live.dtype == dtype
    assert training_arguments(Train(), run, half).bf16 == (dtype == HALF)
    assert not training_arguments(Train(), run, full).bf16


def test_the_type_of_a_config_has_several_places(half: Path) -> None:
    file = half / "config.json"
    config = json.loads(file.read_text())
    name = config.pop("dtype")
    for change in ({"torch_dtype": name}, {"text_config": {"dtype": name}}):
        file.write_text(json.dumps({**config, **change}))
        assert config_dtype(half) == "bfloat16"
    file.write_text(json.dumps({**config, "dtype": ["bfloat16"]}))
    assert config_dtype(half) is None
