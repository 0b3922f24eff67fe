"""Weight files that a loader reads from a model folder, and folders that load something else.

The rules are those of transformers' `from_pretrained` with safetensors: `model.safetensors`, else
the files that `model.safetensors.index.json` names. A digest covers the tensors of these files.
Folders from which transformers, or another loader, would read other files are rejected: two loaders
must read the same weights under one digest.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from logitcask.engine.errors import ModelError

WEIGHTS = "*.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
OWN_COPIES = "consolidated"
"""First part of the names of Mistral's own copy of the same weights, which no loader here reads."""
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Names of a distributed checkpoint, which transformers prefers to any other file."""
SAVE_AGAIN = "save it with save_pretrained(folder), which names its files itself"


def weight_files(path: Path) -> list[Path]:
    """Return the sorted weight files of a folder; raises ModelError where they are unclear."""
    path = path.resolve()
    names = {f.name for f in path.glob(WEIGHTS) if not f.name.startswith(OWN_COPIES)}
    if any(map(DISTRIBUTED.fullmatch, names)):
        raise ModelError(f"{path} holds a distributed checkpoint", hint=SAVE_AGAIN)
    if (path / INDEX).exists():
        named = _named_by(path / INDEX)
        if SINGLE in names - named:
            raise ModelError(
                f"{path} holds {SINGLE} and {INDEX}, of which loaders read one or the other",
                hint="remove the one that does not belong to this model",
            )
        if missing := sorted(name for name in named if not (path / name).is_file()):
            raise ModelError(
                f"{path / INDEX} names {missing[0]}, which is not there",
                hint="copy or download the folder again",
            )
        return [path / name for name in sorted(named)]
    if SINGLE in names:
        if others := sorted(names - {SINGLE}):
            raise ModelError(
                f"{path} holds {SINGLE}, and {others[0]}, which some loaders read too",
                hint="move the weight files that do not belong to this model to another folder",
            )
        return [path / SINGLE]
    if names:
        raise ModelError(
            f"{path} holds {min(names)}, and neither {SINGLE} nor {INDEX}", hint=SAVE_AGAIN
        )
    pickles = sorted(p.name for p in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles:
        raise ModelError(
            f"{path} holds no {WEIGHTS}, only {pickles[0]}, a pickle: reading it can run code",
            hint="convert it where you trust it: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(folder) writes safetensors",
        )
    raise ModelError(
        f"{path} holds no {WEIGHTS}",
        hint="give a folder made by save_pretrained: weights, config.json and tokenizer",
    )


def _named_by(index: Path) -> set[str]:
    """Return the names in the weight map of an index; raises ModelError for other places."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index} is not an index of weights: {type(error).__name__}: {error}",
            hint="copy or download it again",
        ) from error
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index} names {name!r}, which is no safetensors file of its own folder",
                hint=SAVE_AGAIN,
            )
    if not names:
        raise ModelError(f"{index} names no file", hint=SAVE_AGAIN)
    return names


def check_own_files(path: Path) -> None:
    """Raise ModelError for a folder from which transformers would load code, or weights of another
    place or an adapter.
    """
    if (adapter := _read(path / ADAPTER)) is not None:
        base = adapter.get("base_model_name_or_path")
        raise ModelError(
            f"{path} holds an adapter ({ADAPTER}), of the base model {base!r}",
            hint="merge it into its base model and save that: "
            "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()",
        )
    if (config := _read(path / "config.json")) is None:
        return
    if (other := config.get("transformers_weights")) is not None:
        raise ModelError(
            f"{path / 'config.json'} names other weights, transformers_weights = {other!r}",
            hint=SAVE_AGAIN,
        )
    for key, value in _pairs(config):
        if key.endswith("attn_implementation") and isinstance(value, str) and "/" in value:
            raise ModelError(
                f"{path / 'config.json'} loads code from the hub, {key} = {value!r}",
                hint=f"remove {key} from it, and read it with an attention of transformers",
            )
        if key == "quantization_config" and value is not None:
            _check_quantization(path, value)
    if "auto_map" in config:
        from transformers import CONFIG_MAPPING

        if config.get("model_type") not in CONFIG_MAPPING:
            raise ModelError(
                f"the model type {config.get('model_type')!r} of {path} needs code of its own "
                "(auto_map), which is never run",
                hint="use a model that transformers itself knows, or a newer transformers",
            )


def _check_quantization(path: Path, config: Any) -> None:
    """Raise ModelError for a quantization whose weights transformers would read as plain numbers.

    It raises by itself where only a package is missing.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = config.get("quant_method") if isinstance(config, dict) else config
    known = {*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"}
    if not isinstance(method, str) or method not in known:
        raise ModelError(
            f"{path / 'config.json'} has a quantization that transformers does not know, "
            f"quant_method = {method!r}",
            hint="use the weights before quantization, or a newer transformers",
        )


def _read(file: Path) -> Mapping[str, Any] | None:
    """Return a JSON object; None where the file is absent, and {} for another content."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}  # another check reads the file for its content
    return content if isinstance(content, dict) else {}


def _pairs(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of a configuration and of those inside it."""
    left: list[Any] = [config]  # not by recursion, which has a limit
    while left:
        for key, value in left.pop().items():
            yield key, value
            if isinstance(value, dict):
                left.append(value)
