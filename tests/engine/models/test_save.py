"""Students: saved completely, and loaded again with the same logits."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcask.engine.config.training import Lora
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.models import save
from logitcask.engine.models.adapters import load_adapter
from logitcask.engine.models.forward import folded_head, pack_states
from logitcask.engine.models.identity import model_ref, read_metadata
from logitcask.engine.models.load import load_model, load_student
from logitcask.engine.models.save import save_student
from logitcask.engine.types import ModelRef
from tests.engine.tiny import make_model, save_folder
from tests.models.build import make_family

CPU = torch.device("cpu")

METADATA = {
    "pin": {"number": 1, "sha256": "0" * 64},
    "plan": "sha256:1",
    "objective": {"k": 4},
}


@pytest.fixture
def ref(tmp_path: Path) -> ModelRef:
    save_folder(tmp_path / "student")
    return model_ref(str(tmp_path / "student"), chat_template=True)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(40)[None] * 3 % 99).logits
    return found


def weight_of(model: Any) -> torch.Tensor:
    weight: torch.Tensor = model.get_output_embeddings().weight
    return weight


def test_saved_students_load_and_count_versions(ref: ModelRef, tmp_path: Path) -> None:
    model = load_student(ref)
    with torch.no_grad():
        weight_of(model).mul_(2)
    for folder in (tmp_path / "new", tmp_path / "there"):
        if folder.name == "there":
            folder.mkdir()
            (folder / "metrics.jsonl").write_text("kept")
        save_student(model, folder, parent=ref, updates=7, metadata=METADATA)
        child = model_ref(str(folder), chat_template=True)
        assert (child.version, child.base_weights) == (7, ref.base_weights)
        assert child.tokenizer_digest == ref.tokenizer_digest
        metadata = read_metadata(folder)
        assert metadata is not None
        assert metadata["parent"] == ref.digest
        assert torch.equal(weight_of(load_student(child)), weight_of(model))
        assert not list(folder.glob(".*")), "no partial file remains"
    assert (tmp_path / "there" / "metrics.jsonl").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "student", "there"]


@pytest.mark.needs("peft")
def test_lora_trains_adapters_only_and_saves_base_plus_delta(ref: ModelRef, tmp_path: Path) -> None:
    model: Any = load_student(ref, lora=Lora(r=2), seed=3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * 2, "A and B of seven projections in two layers"
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(weight_of(model), weight_of(load_student(ref)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    expected = logits(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    save_student(model, tmp_path / "out", parent=ref, updates=1, metadata=METADATA)
    base, merged = (load_file(p / "model.safetensors") for p in (ref.path, tmp_path / "out"))
    assert base.keys() == merged.keys()
    key = "model.layers.0.mlp.up_proj"
    lora = {k: before[f"base_model.model.{key}.lora_{k}.default.weight"] for k in "AB"}
    torch.testing.assert_close(
        merged[f"{key}.weight"], base[f"{key}.weight"] + 2 * lora["B"] @ lora["A"]
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


@pytest.mark.needs("peft")
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_text", "gemma2"])
def test_adapters_of_any_module_are_saved(name: str, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "student", make_family(name))
    ref = model_ref(str(folder), chat_template=False)
    model: Any = load_student(ref, lora=Lora(r=2))
    with torch.no_grad():
        for each, p in model.named_parameters():
            if "lora_B" in each:
                p.normal_(0, 0.1)
    expected = logits(model)
    assert (expected - logits(load_student(ref))).abs().max() > 0.1
    save_student(model, tmp_path / "out", parent=ref, updates=1, metadata=METADATA)
    found = logits(load_model(tmp_path / "out", torch.float32, CPU))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.needs("peft")
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "q_proj,v_proj", "use_rslora": True},
        {"use_dora": True, "dropout": 0.5},
        {"modules_to_save": "norm,lm_head,embed_tokens"},
        {"target_modules": "embed_tokens"},
        {"bias": "all"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_merged_model_and_adapter_on_the_parent_give_the_trained_logits(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    network = make_family("qwen2") if "bias" in fields else make_model(tie=False)
    ref = model_ref(str(save_folder(tmp_path / "student", network)), chat_template=True)
    model: Any = load_student(ref, lora=Lora(r=2, save_adapter=True, **fields))
    ids = torch.arange(8)[None]
    hidden, head = folded_head(model, pack_states(model, ids, ids, packed=True))
    (hidden @ head.T).logsumexp(-1).sum().backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad is not None, f"{name} would not train"
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) / 10)
    expected = logits(model)
    for _ in range(2):  # the second time over the files of the first
        out = tmp_path / "out"
        copied = copy.deepcopy(model)
        save_student(copied, out, parent=ref, updates=1, metadata=METADATA, adapter=True)
    merged = logits(load_model(out, torch.float32, CPU))
    assert (expected - logits(load_student(ref))).abs().max() > 0.1
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()
    adapted = load_adapter(load_model(ref.path, torch.float32, CPU), out / "adapter")
    assert (logits(adapted) - expected).abs().max() < 1e-5 * expected.abs().max()
    recorded = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert recorded["base_model_name_or_path"] == str(ref.path)
    assert model_ref(str(out), chat_template=True).version == 1, "the next stage reads the folder"


@pytest.mark.needs("peft")
@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"modules_to_save": "lm_head"}, "embeddings and head are one matrix"),
        ({"modules_to_save": "embed_tokens"}, "embeddings and head are one matrix"),
        ({"target_modules": "embed_tokens"}, "embeddings and head are one matrix"),
        ({"target_modules": ".*(lm_head|q_proj)"}, "the head cannot have an adapter"),
        ({"modules_to_save": "no_such"}, "names no_such, which the model does not have"),
        ({"bias": "all"}, "these layers have no bias"),
    ],
)
def test_adapters_that_would_not_train_or_save_are_refused_before(
    fields: dict[str, Any], cause: str, ref: ModelRef
) -> None:
    with pytest.raises(ConfigError, match=cause):
        load_student(ref, lora=Lora(r=2, **fields))


@pytest.mark.needs("peft")
@pytest.mark.parametrize("lora", [Lora(), Lora(r=2)])
def test_the_files_of_the_parent_travel(lora: Lora, ref: ModelRef, tmp_path: Path) -> None:
    # transformers reads this, and would refuse to write it: a temperature without sampling.
    generation = json.dumps({"eos_token_id": [1, 7], "temperature": 0.6, "do_sample": False})
    (ref.path / "generation_config.json").write_text(generation)
    save_student(
        load_student(ref, lora=lora), tmp_path / "out", parent=ref, updates=1, metadata=METADATA
    )
    assert (tmp_path / "out" / "generation_config.json").read_text() == generation
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (ref.path / file).read_bytes()


def test_a_student_that_reloads_as_another_is_an_error(
    ref: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*args: Any) -> Any:
        model = load_model(*args)
        model.model.norm.weight.data[0] += 1e-6
        return model

    monkeypatch.setattr(save, "load_model", other)
    with pytest.raises(ModelError, match=r"is not the trained one: 1 tensors .*norm\.weight"):
        save_student(load_student(ref), tmp_path / "out", parent=ref, updates=1, metadata=METADATA)
    assert not (tmp_path / "out").exists()
