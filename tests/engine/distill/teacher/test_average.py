"""The moving average of weights, against float64."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from logitcask.engine.distill.teacher.average import write_average
from logitcask.engine.errors import IntegrityError
from logitcask.engine.models.identity import METADATA_FILE
from tests.engine.tiny import make_model, save_folder

DECAY, REFRESHES = 0.9, 6


def test_the_average_is_that_of_float64_and_a_model(tmp_path: Path) -> None:
    """Bound each step by three roundings of float32: two products and their sum."""
    models = [make_model(hidden=16, layers=1, seed=seed) for seed in range(REFRESHES)]
    expected: dict[str, torch.Tensor] = {}
    before: Path | None = None
    for number, model in enumerate(models):
        student = save_folder(tmp_path / f"v{number}", model)
        (student / METADATA_FILE).write_text("{}")
        folder = tmp_path / f"ema-v{number}"
        folder.mkdir()
        write_average(before, student, folder, DECAY)
        before = folder
        for name, tensor in load_file(student / "model.safetensors").items():
            now = tensor.double()
            expected[name] = DECAY * expected[name] + (1 - DECAY) * now if name in expected else now
    found = load_file(tmp_path / f"ema-v{REFRESHES - 1}" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        largest = max(float(m.state_dict()[name].abs().max()) for m in models)
        gap = (tensor.double() - expected[name]).abs().max()
        assert gap <= 3 * REFRESHES * torch.finfo(torch.float32).eps * largest
    first = load_file(tmp_path / "ema-v0" / "model.safetensors")
    assert all(torch.equal(first[n], t) for n, t in models[0].state_dict().items() if n in first)
    assert not (tmp_path / "ema-v1" / METADATA_FILE).exists(), "it is written last"
    loaded = AutoModelForCausalLM.from_pretrained(before).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in found.items())


def test_an_average_of_other_tensors_is_refused(tmp_path: Path) -> None:
    student = save_folder(tmp_path / "student", make_model(hidden=16, layers=1))
    other = save_folder(tmp_path / "other", make_model(hidden=32, layers=1))
    less = tmp_path / "less"
    less.mkdir()
    save_file({"lm_head.weight": torch.zeros(1)}, less / "model.safetensors")
    for before in (other, less, tmp_path / "none"):
        (into := tmp_path / f"into-{before.name}").mkdir()
        with pytest.raises(IntegrityError, match="is no earlier average of this student"):
            write_average(before, student, into, DECAY)
