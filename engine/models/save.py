"""Save a trained student as the next version, and prove that the folder gives the same logits."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logitcask.engine.errors import ModelError
from logitcask.engine.models.adapters import ADAPTER, load_adapter, save_adapter
from logitcask.engine.models.forward import folded_head, inner_model, states
from logitcask.engine.models.identity import METADATA_FILE, write_metadata
from logitcask.engine.models.load import load_model, quiet
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


def save_student(
    model: nn.Module,
    folder: Path,
    *,
    parent: ModelRef,
    updates: int,
    metadata: Mapping[str, Any],
    adapter: bool = False,
) -> None:
    """Save a loadable model to `folder`: safetensors in float32, tokenizer, metadata.

    LoRA adapters are merged into the weights, in memory too, so the folder loads without peft. With
    `adapter` they are also saved to its folder `adapter`, and proved on the parent.
    `metadata` holds pin, plan and objective; the version is the parent's plus `updates`. Files are
    staged, loaded again and then moved, logitcask.json last: a folder that has it is complete.
    Raises ModelError if the saved model gives other logits.
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
        _check_adapter(staging / ADAPTER, parent, before)
    plain = adapted if inner_model(model) is model else adapted.merge_and_unload()
    if (parent.path / GENERATION).is_file():
        # The parent's file is copied; transformers would refuse to write some that it has read.
        plain.generation_config = type(plain.generation_config)()
    with quiet():
        plain.save_pretrained(staging)
    for file in parent.path.iterdir():
        if file.is_file() and file.name.startswith(PARENT_FILES):
            shutil.copyfile(file, staging / file.name)
    _check_saved(plain, staging, before)
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


def _check_saved(model: Any, folder: Path, before: Tensor) -> None:
    """Raise ModelError unless the folder holds every tensor of `model`, bit for bit, and gives its
    logits from before the adapters were merged.
    """
    again = load_model(folder, torch.float32, before.device)
    saved = again.state_dict()
    other = [
        name
        for name, tensor in model.state_dict().items()
        if name not in saved or not torch.equal(tensor, saved[name])
    ]
    gap = float((_probe(again) - before).abs().max() / before.abs().max())
    if other or not gap <= TOLERANCE:
        raise ModelError(
            f"the student that was saved in {folder} is not the trained one: {len(other)} tensors "
            f"{other[:1]} differ, and its logits by {gap:.1e} of the largest",
            hint="the last checkpoint holds its weights; with LoRA, name other layers by "
            "--lora-target-modules",
        )


def _check_adapter(folder: Path, parent: ModelRef, before: Tensor) -> None:
    """Raise ModelError unless the parent with the adapters of `folder` gives the logits."""
    again = load_adapter(load_model(parent.path, torch.float32, before.device), folder)
    gap = float((_probe(inner_model(again)) - before).abs().max() / before.abs().max())
    if not gap <= TOLERANCE:
        raise ModelError(
            f"the adapters that were saved in {folder} are not the trained ones: logits differ by "
            f"{gap:.1e} of the largest",
            hint="the last checkpoint holds them; leave --lora-save-adapter out to save the merged "
            "model alone",
        )


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
