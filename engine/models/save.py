"""Save a trained student as the next version, and prove that the folder gives the same logits."""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logitcask.engine.errors import ModelError
from logitcask.engine.models.adapters import (
    ADAPTER,
    dequantize,
    four_bit_layers,
    load_adapter,
    quantize,
    save_adapter,
)
from logitcask.engine.models.forward import folded_head, inner_model, states
from logitcask.engine.models.identity import METADATA_FILE, write_metadata
from logitcask.engine.models.load import load_model, quiet
from logitcask.engine.models.weights import folder_tensors
from logitcask.engine.types import ModelRef

GENERATION = "generation_config.json"
PARENT_FILES = (
    *("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template"),
    *("spiece", "sentencepiece", "tekken", "processor_config", "preprocessor_config"),
    GENERATION,
)
"""First parts of the names of files that a student has from its parent."""
PROBE_TOKENS = 16
TOLERANCE = 1e-4
"""Of the largest logit: merged adapters round otherwise than separate ones."""


def dtype_of_result(choice: str, parent: ModelRef) -> torch.dtype:
    """Return the type to save a student in; auto = that of most weights of its parent, of bfloat16
    and float32.
    """
    if choice != "auto":
        return torch.bfloat16 if choice == "bfloat16" else torch.float32
    elements: Counter[str] = Counter()
    for dtype, shape, _ in folder_tensors(parent.path).values():
        elements[dtype] += math.prod(shape)
    return torch.bfloat16 if elements.most_common(1)[0][0] == "BF16" else torch.float32


def save_student(
    model: nn.Module,
    folder: Path,
    *,
    parent: ModelRef,
    updates: int,
    metadata: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    adapter: bool = False,
    check: bool = True,
) -> None:
    """Save a loadable model to `folder`: safetensors in `dtype`, tokenizer, metadata.

    LoRA adapters are merged into the weights, where those in 4 bits become plain numbers of the
    same values, and all are rounded to `dtype`, in memory too: the folder loads without peft, and
    holds the model that is left. With `adapter` they are also saved to its folder `adapter`, in
    float32, and proved on the parent. `metadata` holds pin, plan and objective; the version is the
    parent's plus `updates`. Files are staged, loaded again and then moved, logitcask.json last: a
    folder that has it is complete. Without `check` they are not loaded again, where an
    earlier save of the run has proved it. Raises ModelError if the saved model gives other logits.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    exists = folder.is_dir()
    staging = folder / ".saving" if exists else folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    adapted: Any = model
    before = _probe(inner_model(model))
    if adapter:
        save_adapter(model, staging / ADAPTER, parent)
        quantized = bool(four_bit_layers(model))
        _check_adapter(staging / ADAPTER, parent, before, quantized=quantized)
    dequantize(model)
    plain = adapted if inner_model(model) is model else adapted.merge_and_unload()
    if (parent.path / GENERATION).is_file():
        # The parent's file is copied; transformers would refuse to write some that it has read.
        plain.generation_config = type(plain.generation_config)()
    merged = _gap(_probe(plain), before)
    _round(plain, dtype)
    rounded = _probe(plain)
    with quiet():
        plain.save_pretrained(staging, state_dict=_in_type(plain, dtype))
    _set_type(staging / "config.json", dtype)
    for file in parent.path.iterdir():
        if file.is_file() and file.name.startswith(PARENT_FILES):
            shutil.copyfile(file, staging / file.name)
    if check:
        _check_saved(plain, staging, rounded, merged)
    write_metadata(
        staging,
        base_weights=parent.base_weights,
        parent=parent.digest,
        version=parent.version + updates,
        **metadata,
    )
    if not exists:
        staging.rename(folder)
        return
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)
    for file in sorted(staging.iterdir(), key=lambda f: f.name == METADATA_FILE):
        os.replace(file, folder / file.name)
    staging.rmdir()


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of a float32 model to the values of `dtype`."""
    if dtype != torch.float32:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def _in_type(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the state of a model with its weights in `dtype`, tied ones as one tensor."""
    cast: dict[int, Tensor] = {}
    weights = {id(parameter) for parameter in model.parameters()}
    return {
        name: cast.setdefault(id(each), each.detach().to(dtype)) if id(each) in weights else each
        for name, each in model.state_dict(keep_vars=True).items()
    }


def _set_type(file: Path, dtype: torch.dtype) -> None:
    """Name the type of the weights in config.json, from which loaders take it."""
    config = json.loads(file.read_text())
    for part in (config, *(each for each in config.values() if isinstance(each, dict))):
        if part.get("dtype") == "float32":
            part["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_saved(model: Any, folder: Path, before: Tensor, merged: float) -> None:
    """Raise ModelError unless the folder holds every tensor of `model`, bit for bit, and gives its
    logits `before`; merged: how far these are from those with separate adapters.
    """
    again = load_model(folder, torch.float32, before.device)
    saved = again.state_dict()
    other = [
        name
        for name, tensor in model.state_dict().items()
        if name not in saved or not torch.equal(tensor, saved[name])
    ]
    gap = _gap(_probe(again), before)
    if other or not max(gap, merged) <= TOLERANCE:
        raise ModelError(
            f"the student that was saved in {folder} is not the trained one: {len(other)} tensors "
            f"{other[:1]} differ, and its logits by {max(gap, merged):.1e} of the largest",
            hint="the last checkpoint holds its weights; with LoRA, name other layers by "
            "--lora-target-modules",
        )


def _check_adapter(folder: Path, parent: ModelRef, before: Tensor, *, quantized: bool) -> None:
    """Raise ModelError unless the parent with the adapters of `folder` gives the logits."""
    again = load_adapter(load_model(parent.path, torch.float32, before.device), folder)
    if quantized:
        quantize(again)
    gap = _gap(_probe(inner_model(again)), before)
    if not gap <= TOLERANCE:
        raise ModelError(
            f"the adapters that were saved in {folder} are not the trained ones: logits differ by "
            f"{gap:.1e} of the largest",
            hint="the last checkpoint holds them; leave --lora-save-adapter out to save the merged "
            "model alone",
        )


def _gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two outputs, relative to the largest value; NaN stays."""
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """Return the output of the head for a few tokens [L, V], in evaluation mode and float32."""
    training = model.training
    model.eval()
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids = (torch.arange(PROBE_TOKENS, device=model.device) * 7919 + 1) % vocabulary
    # Not model(ids): under bfloat16, Trainer has wrapped that forward in an autocast.
    hidden, weight = folded_head(model, states(model, ids[None])[0])
    model.train(training)
    return hidden @ weight.T
