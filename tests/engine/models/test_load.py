"""Students: loaded in float32, checked for packing, and saved completely."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Lfm2Config,
    Lfm2ForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from logitcask.engine.config.training import Lora
from logitcask.engine.errors import ModelError
from logitcask.engine.models.identity import model_ref, read_metadata
from logitcask.engine.models.load import (
    check_trainable,
    head_weight,
    hidden_states,
    load_student,
    quiet,
    save_student,
)
from logitcask.engine.types import ModelRef
from tests.engine.tiny import make_model, save_folder

METADATA = {
    "pin": {"number": 1, "sha256": "0" * 64},
    "plan": "sha256:1",
    "objective": {"k": 4},
}
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}


@pytest.fixture
def ref(tmp_path: Path) -> ModelRef:
    save_folder(tmp_path / "student")
    return model_ref(str(tmp_path / "student"), chat_template=True)


def two_sequences() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 99, (1, 20), generator=generator)
    return ids, torch.cat([torch.arange(8), torch.arange(12)])[None]


def leak(model: Any, packed: torch.Tensor) -> float:
    """Return the largest difference of a packed row's states from those of its sequences alone."""
    ids, _ = two_sequences()
    alone = [model.base_model(input_ids=part).last_hidden_state for part in ids.split([8, 12], 1)]
    return float((packed - torch.cat(alone, 1)[0]).abs().max())


@torch.no_grad()
def test_packed_sequences_do_not_attend_to_each_other() -> None:
    model = make_model()
    ids, positions = two_sequences()
    assert leak(model, hidden_states(model, ids, positions)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "trap",
    [{"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones(1, 20).long()}],
    ids=["cache", "mask of ones"],
)
def test_with_a_cache_or_a_mask_they_would(trap: dict[str, Any]) -> None:
    model = make_model()
    ids, positions = two_sequences()
    out = model.base_model(input_ids=ids, position_ids=positions, **trap)
    assert leak(model, out.last_hidden_state[0]) > 0.1


def test_the_forward_pass_has_no_cache_and_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    assert model.config.use_cache, "by default, the model would make a cache"
    calls: list[dict[str, Any]] = []
    forward = model.base_model.forward

    def spy(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return forward(**kwargs)

    monkeypatch.setattr(model.base_model, "forward", spy)
    hidden_states(model, *two_sequences())
    assert calls[0]["use_cache"] is False
    assert calls[0].keys() == {"input_ids", "position_ids", "use_cache"}


@torch.no_grad()
def test_states_and_head_are_the_models_logits(ref: ModelRef) -> None:
    model = load_student(ref)
    ids = torch.arange(32)[None] % 99
    ours = hidden_states(model, ids, torch.arange(32)[None]) @ head_weight(model).T
    torch.testing.assert_close(ours, model(input_ids=ids).logits[0])


def test_weights_are_float32_also_from_a_bfloat16_folder(tmp_path: Path) -> None:
    save_folder(tmp_path / "half", make_model().bfloat16())
    ref = model_ref(str(tmp_path / "half"), chat_template=True)
    assert {p.dtype for p in load_student(ref).parameters()} == {torch.float32}


def with_bias() -> nn.Module:
    model = make_model(tie=False)
    model.lm_head = nn.Linear(32, 99, bias=True)
    nn.init.zeros_(model.lm_head.bias)
    return model


def with_a_cap_in_name_only() -> nn.Module:
    model = make_model()
    model.config.final_logit_softcapping = 1e-3
    return model


def with_unknown_scale() -> nn.Module:
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.01)
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (with_bias, "a bias of the output matrix"),
        (with_a_cap_in_name_only, "changes logits"),
        (with_unknown_scale, "changes logits"),
    ],
    ids=["bias", "cap in name only", "unknown"],
)
def test_other_heads_are_refused(make: Any, name: str) -> None:
    with pytest.raises(ModelError, match=name):
        check_trainable(make(), 99)


def convolutions() -> nn.Module:
    return Lfm2ForCausalLM(
        Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], tie_embedding=True)
    )


def no_positions() -> nn.Module:
    return MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=99))


@pytest.mark.parametrize(
    ("make", "why"),
    [(convolutions, "lets sequences of one pack attend"), (no_positions, "no position ids")],
    ids=["convolutions", "no positions"],
)
def test_models_whose_layers_leak_are_refused(make: Any, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        check_trainable(make(), 99)


def test_a_head_smaller_than_the_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="at least 120 rows"):
        check_trainable(make_model(), 120)


def test_a_folder_without_a_model_is_a_typed_error(ref: ModelRef) -> None:
    (ref.path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelError, match="unheard-of"):
        load_student(ref)


def test_saved_students_load_and_count_versions(ref: ModelRef, tmp_path: Path) -> None:
    model = load_student(ref)
    with torch.no_grad():
        head_weight(model).mul_(2)
    for folder in (tmp_path / "new", tmp_path / "there"):
        if folder.name == "there":
            folder.mkdir()
            (folder / "metrics.jsonl").write_text("kept")
        with quiet():
            save_student(model, folder, parent=ref, updates=7, metadata=METADATA)
        child = model_ref(str(folder), chat_template=True)
        assert (child.version, child.base_weights) == (7, ref.base_weights)
        assert child.tokenizer_digest == ref.tokenizer_digest
        metadata = read_metadata(folder)
        assert metadata is not None
        assert metadata["parent"] == ref.digest
        assert torch.equal(head_weight(load_student(child)), head_weight(model))
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
    assert torch.equal(head_weight(model), head_weight(load_student(ref)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with quiet():
        save_student(model, tmp_path / "out", parent=ref, updates=1, metadata=METADATA)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    base, merged = (load_file(p / "model.safetensors") for p in (ref.path, tmp_path / "out"))
    assert base.keys() == merged.keys()
    key = "model.layers.0.mlp.up_proj"
    lora = {k: before[f"base_model.model.{key}.lora_{k}.default.weight"] for k in "AB"}
    torch.testing.assert_close(
        merged[f"{key}.weight"], base[f"{key}.weight"] + 2 * lora["B"] @ lora["A"]
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids, positions = two_sequences()
    with torch.no_grad():
        ours = hidden_states(model.eval(), ids, positions)
        torch.testing.assert_close(ours, hidden_states(plain, ids, positions), atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


@pytest.mark.needs("peft")
def test_adapters_are_drawn_by_the_seed(ref: ModelRef) -> None:
    def drawn(seed: int) -> torch.Tensor:
        model = load_student(ref, lora=Lora(r=2), seed=seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
