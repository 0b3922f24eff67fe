"""Paths of models: each is proved to equal a plain forward pass, or refused with its reason."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcask.engine.errors import ModelError
from logitcask.engine.models import check
from logitcask.engine.models.check import (
    CheckedPaths,
    check_paths,
    checked_paths,
    lengths_of_change,
)
from logitcask.engine.models.identity import model_ref
from tests.engine.tiny import make_model, save_folder
from tests.models.build import make_family

PACKED = ("mistral", "phi3 longrope", "gemma2", "phi", "llama4_text", "qwen3_moe")
PADDED = ("qwen3_5_text", "lfm2", "gpt_oss", "mpt")
EQUAL = ("phi3 longrope", "mamba")
"""Families of which a batch of prompts has one length."""
REFUSED = {
    "rwkv": "cached sampling gives log-probs",
    "nemotron_h": "cached sampling gives log-probs",
}


@pytest.mark.parametrize("name", [*PACKED, *PADDED, "mamba", *REFUSED])
def test_each_family_has_the_paths_that_are_right(name: str) -> None:
    model = make_family(name)
    found = check_paths(model, 99, [n for n in lengths_of_change(model.config) if n < 100])
    assert found.scoring == ""
    assert found.packed is (name in PACKED)
    assert bool(found.packing) is (name not in PACKED)
    assert found.equal_prompts is (name in (*EQUAL, *REFUSED))
    assert found.sampling.startswith(REFUSED.get(name, ""))
    assert bool(found.sampling) is (name in REFUSED)


def test_a_plain_decoder_has_every_path() -> None:
    assert check_paths(make_model(), 99) == CheckedPaths()


def test_a_flat_distribution_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare rows without an id above MIN_PROB, as of a new model with 150,000 ids."""
    monkeypatch.setattr(check, "MIN_PROB", 0.5)
    model = make_model(spread=1e-3)
    assert check_paths(model, 99) == CheckedPaths()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.flip(-1) * 1e3)
    assert "log-probs" in check_paths(model, 99).scoring


def capped_in_name_only() -> Any:
    model: Any = make_model()
    model.config.final_logit_softcapping = 1e-3
    return model


def scaled() -> Any:
    model: Any = make_model()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.01)
    return model


def not_a_number() -> Any:
    model: Any = make_model()
    model.model.norm.weight.data[3] = torch.nan
    return model


def attends_to_the_future() -> Any:
    model: Any = make_model()
    model.model.layers[0].register_forward_hook(lambda m, i, out: out + out.mean(1, keepdim=True))
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (capped_in_name_only, "final_logit_softcapping = 0.001"),
        (scaled, "a padded batch of sequences gives log-probs"),
        (not_a_number, "inf nats off"),
        (attends_to_the_future, "a later token gives log-probs"),
    ],
)
def test_a_model_that_does_more_is_refused_everywhere(make: Any, why: str) -> None:
    found = check_paths(make(), 99)
    for reason in (found.scoring, found.sampling, found.packing):
        assert why in reason
    with pytest.raises(ModelError, match="not right in scoring"):
        found.require("scoring", of=Path("folder"))


def test_a_head_smaller_than_the_tokenizer_is_refused() -> None:
    assert check_paths(make_model(), 120).scoring == "its head has 99 ids, its tokenizer 120"


def test_lengths_of_change_are_windows_and_the_switch_of_longrope() -> None:
    def of(name: str, **changes: int) -> list[int]:
        config = make_family(name).config
        config.update(changes)
        return lengths_of_change(config)

    assert of("llama") == []
    assert of("mistral") == [], "the short sequences pass a window of 16"
    assert of("mistral", sliding_window=80) == of("gpt_oss", sliding_window=80) == [80]
    assert of("phi3 longrope") == [64]
    assert of("llama4_text", attention_chunk_size=8192) == [8192]
    assert of("mamba2", chunk_size=256) == [256]
    assert of("deepseek_v32", index_topk=2048) == [2048]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """Record the lengths of each computed check, with an empty cache."""
    calls: list[Any] = []
    real = check.check_paths

    def spy(model: Any, n_vocab: int, changes: Any = ()) -> CheckedPaths:
        calls.append(tuple(changes))
        return real(model, n_vocab, changes)

    monkeypatch.setattr(check, "check_paths", spy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_a_model_is_checked_once_and_again_for_longer_sequences(
    checks: list[Any], tmp_path: Path
) -> None:
    model = make_family("mistral")
    model.config.sliding_window = 80
    save_folder(tmp_path / "model", model)
    ref = model_ref(str(tmp_path / "model"), chat_template=False)
    for length in (0, 80, 81, 90, 12):
        checked_paths(model, ref, 99, length=length)
    assert checks == [(), (80,)]
    other = save_folder(tmp_path / "other", make_model(seed=5))
    checked_paths(make_model(seed=5), model_ref(str(other), chat_template=False), 99)
    assert len(checks) == 3


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"scoring": 3}', "\x00"])
def test_a_damaged_result_is_computed_again(
    checks: list[Any], tmp_path: Path, content: str
) -> None:
    model = make_model()
    ref = model_ref(str(save_folder(tmp_path / "model", model)), chat_template=False)
    expected = checked_paths(model, ref, 99)
    (file,) = (tmp_path / "cache" / "logitcask" / "checks").iterdir()
    assert json.loads(file.read_text())["packed"] is True
    file.write_text(content)
    assert checked_paths(model, ref, 99) == expected
    assert len(checks) == 2
