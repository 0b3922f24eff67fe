"""The digest is of the weights that transformers loads; folders that load others are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from logitcask.engine.backends.hf import HF
from logitcask.engine.errors import ModelError
from logitcask.engine.models import identity
from logitcask.engine.models.weight_files import INDEX, SINGLE, weight_files
from tests.engine.models.sharded import write_index
from tests.engine.tiny import make_model, save_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "model")


def digest(folder: Path) -> str:
    """Return the digest of the weights of a resolved folder, as every command does."""
    return identity.weights_digest(identity.resolve_model(str(folder)))


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Return what transformers loads from a folder."""
    load: Any = AutoModelForCausalLM.from_pretrained
    state: dict[str, torch.Tensor] = load(folder, use_safetensors=True).state_dict()
    return state


def shard(folder: Path, *names: str) -> None:
    """Save the tensors of a folder to files of these names, with an index."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(dict(list(tensors.items())[i :: len(names)]), folder / name, {"format": "pt"})
    write_index(folder, *names)


def other_weights(folder: Path, name: str) -> None:
    """Add the weights of another model to the folder."""
    other = save_folder(folder.parent / "other", make_model(seed=1))
    shutil.move(other / SINGLE, folder / name)


def test_a_digest_is_of_the_loaded_files(folder: Path) -> None:
    """Expect one digest for a file, shards, links to a cache, and a copy that no loader reads."""
    before, state = digest(folder), loaded(folder)
    other_weights(folder, "consolidated.safetensors")
    assert digest(folder) == before
    shard(folder, "model-1.safetensors", "model-2.safetensors")
    assert digest(folder) == before
    other_weights(folder, "value_head.safetensors")
    assert digest(folder) == before, "no loader reads a file that the index does not name"
    blob = folder.parent / "blob"
    (folder / "model-1.safetensors").rename(blob)
    (folder / "model-1.safetensors").symlink_to(blob)
    assert digest(folder) == before
    again = loaded(folder)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("names", "cause"),
    [
        (["../outside.safetensors"], "'../outside.safetensors'"),
        (["/etc/x.safetensors"], "'/etc/x.safetensors'"),
        (["sub/x.safetensors"], "'sub/x.safetensors'"),
        (["sub\\x.safetensors"], "no safetensors file of its own folder"),
        (["pytorch_model.bin"], "'pytorch_model.bin'"),
        ([7], "names 7"),
        (["gone.safetensors"], "names gone.safetensors, which is not there"),
        ([], "names no file"),
    ],
)
def test_an_index_names_files_of_its_folder(folder: Path, names: list[Any], cause: str) -> None:
    shutil.copytree(folder, folder / "sub")
    (folder / SINGLE).unlink()
    write_index(folder, *names)
    with pytest.raises(ModelError) as caught:
        digest(folder)
    assert cause in caught.value.cause
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"a": ' * 10_000])
def test_a_damaged_index_is_named(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(ModelError, match=r"index\.json is not an index of weights"):
        digest(folder)


def both(folder: Path) -> None:
    shutil.copy(folder / SINGLE, folder / "a.safetensors")
    write_index(folder, "a.safetensors")


def twice(folder: Path) -> None:
    shutil.copy(folder / SINGLE, folder / "a.safetensors")
    (folder / SINGLE).rename(folder / "b.safetensors")
    write_index(folder, "a.safetensors", "b.safetensors")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (both, "one or the other"),
        (twice, r"holds the tensor \S+ twice, again in b.safetensors"),
        (lambda f: other_weights(f, "model.fp16.safetensors"), "model.fp16.safetensors, which"),
        (lambda f: (f / SINGLE).rename(f / "a.safetensors"), "neither model.safetensors nor"),
        (
            lambda f: other_weights(f, "shard-00001-model-00001-of-00001.safetensors"),
            "distributed checkpoint",
        ),
    ],
)
def test_weights_that_two_loaders_read_differently_are_refused(
    folder: Path, change: Callable[[Path], None], cause: str
) -> None:
    change(folder)
    with pytest.raises(ModelError, match=cause):
        digest(folder)


def test_an_index_of_the_single_file_is_no_conflict(folder: Path) -> None:
    write_index(folder, SINGLE)
    assert weight_files(folder) == [folder / SINGLE]


@pytest.mark.parametrize(
    ("keys", "cause"),
    [
        ({"transformers_weights": "other.safetensors"}, "transformers_weights = 'other"),
        ({"attn_implementation": "someone/kernel"}, "loads code from the hub"),
        ({"text_config": {"_attn_implementation": "a/b"}}, "_attn_implementation = 'a/b'"),
        ({"quantization_config": {"quant_method": "new"}}, "quant_method = 'new'"),
        ({"quantization_config": ["gptq"]}, "does not know"),
        ({"model_type": "new", "auto_map": {"AutoConfig": "m.C"}}, "'new' .* never run"),
    ],
)
def test_a_config_that_loads_something_else_is_refused(
    folder: Path, keys: dict[str, Any], cause: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(ModelError, match=cause):
        identity.model_ref(str(folder), chat_template=False)


def test_a_quantization_without_its_package_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    model = identity.model_ref(str(folder), chat_template=False)
    with pytest.raises(ModelError, match=r"(?i)optimum|gptq"):
        HF(model)


def test_own_code_of_a_known_model_is_not_run(folder: Path) -> None:
    before = identity.model_ref(str(folder), chat_template=False)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code of the folder ran')")
    assert identity.model_ref(str(folder), chat_template=False) == before


@pytest.mark.parametrize("whole", [True, False], ids=["with-weights", "alone"])
def test_an_adapter_is_refused_with_its_base_model(folder: Path, whole: bool) -> None:
    if not whole:
        (folder / "config.json").unlink()
        (folder / SINGLE).unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ModelError, match="of the base model 'org/base'") as caught:
        identity.model_ref(str(folder), chat_template=False)
    assert "merge_and_unload" in caught.value.hint
