"""Models: loaded whole, in the dtype of training, with adapters that run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from logitcask.engine.config.training import Lora
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.models import load
from logitcask.engine.models.identity import model_ref
from logitcask.engine.models.load import load_model, load_student, set_mode
from logitcask.engine.types import ModelRef
from tests.engine.tiny import make_model, save_folder
from tests.models.build import make_family

CPU = torch.device("cpu")


@pytest.fixture
def ref(tmp_path: Path) -> ModelRef:
    save_folder(tmp_path / "student")
    return model_ref(str(tmp_path / "student"), chat_template=True)


def family_ref(name: str, path: Path) -> ModelRef:
    return model_ref(str(save_folder(path, make_family(name))), chat_template=False)


def test_weights_are_float32_also_from_a_bfloat16_folder(tmp_path: Path) -> None:
    save_folder(tmp_path / "half", make_model().bfloat16())
    ref = model_ref(str(tmp_path / "half"), chat_template=True)
    assert {p.dtype for p in load_student(ref).parameters()} == {torch.float32}


def test_a_folder_without_a_model_is_a_typed_error(ref: ModelRef) -> None:
    (ref.path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelError, match="unheard-of"):
        load_student(ref)


UP = "model.layers.1.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


def without_one(tensors: Tensors) -> None:
    del tensors[f"{UP}.weight"]


def in_another_shape(tensors: Tensors) -> None:
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"][1:].clone()


def with_a_bias(tensors: Tensors) -> None:
    tensors[f"{UP}.bias"] = torch.zeros(64)


def with_another_head(tensors: Tensors) -> None:
    tensors["mtp.layers.0.proj.weight"] = torch.zeros(4, 4)


def with_an_old_buffer(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without_one, rf"lack 1 tensors .*{UP}\.weight"),
        (in_another_shape, rf"{UP}\.weight|mismatch"),
        (with_a_bias, rf"1 tensors that its config turns off: {UP}\.bias"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_an_error(
    ref: ModelRef, change: Callable[[Tensors], None], why: str
) -> None:
    file = ref.path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    for attempt in (lambda: load_student(ref), lambda: load_model(ref.path, torch.bfloat16, CPU)):
        with pytest.raises(ModelError, match=why):
            attempt()


@pytest.mark.parametrize("change", [with_another_head, with_an_old_buffer])
def test_weights_beyond_the_model_are_ignored(
    ref: ModelRef, change: Callable[[Tensors], None]
) -> None:
    file = ref.path / "model.safetensors"
    expected = load_model(ref.path, torch.float32, CPU).state_dict()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    found = load_model(ref.path, torch.float32, CPU).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_an_unsupported_quantization_is_a_typed_error(ref: ModelRef) -> None:
    config = json.loads((ref.path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (ref.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded: ImportError"):
        load_student(ref)


def test_a_training_step_computes_as_in_evaluation_unless_dropout_is_requested() -> None:
    model = make_family("gpt2")
    ids = torch.arange(20)[None]
    expected = model(input_ids=ids).logits
    set_mode(model, dropout=False)
    assert torch.equal(model(input_ids=ids).logits, expected)
    set_mode(model, dropout=True)
    assert not torch.allclose(model(input_ids=ids).logits, expected, atol=0.1)


@pytest.mark.needs("peft")
def test_the_dropout_of_adapters_has_its_own_setting(ref: ModelRef) -> None:
    model: Any = load_student(ref, lora=Lora(r=2, dropout=0.5))
    set_mode(model, dropout=False)
    modes = {"lora_dropout" in name: module.training for name, module in model.named_modules()}
    assert modes == {False: False, True: True}


@pytest.mark.needs("peft")
def test_adapters_are_drawn_by_the_seed(ref: ModelRef) -> None:
    def drawn(seed: int) -> torch.Tensor:
        model = load_student(ref, lora=Lora(r=2), seed=seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


@pytest.mark.needs("peft")
def test_adapters_that_do_not_fit_are_an_error_before_training(ref: ModelRef) -> None:
    with pytest.raises(ConfigError, match="lora target_modules = nothing"):
        load_student(ref, lora=Lora(r=2, target_modules="nothing"))


@pytest.mark.needs("peft")
def test_adapters_of_shared_weights_are_an_error_before_training(
    ref: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tied(*args: Any, **options: Any) -> Any:
        model = load_model(*args, **options)
        first, second = (layer.mlp.up_proj for layer in model.model.layers)
        second.weight = first.weight
        return model

    monkeypatch.setattr(load, "load_model", tied)
    with pytest.raises(ConfigError, match="the same weights would get several adapters"):
        load_student(ref, lora=Lora(r=2))


def test_a_class_that_changes_a_loaded_row_is_an_error_before_training(
    ref: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clears(self: Any, module: Any) -> None:
        if isinstance(module, torch.nn.Embedding):
            module.weight.data[module.padding_idx].zero_()

    load_student(ref)
    monkeypatch.setattr(Qwen3ForCausalLM, "_init_weights", clears)
    with pytest.raises(ModelError, match="sets the row of its padding id to zero"):
        load_student(ref)
