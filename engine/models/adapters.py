"""LoRA adapters of peft: made before a training, saved with the student, proved on its parent."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from logitcask.engine.config.training import Lora
from logitcask.engine.errors import ConfigError
from logitcask.engine.models.forward import folded_head, pack_states
from logitcask.engine.types import ModelRef

ADAPTER = "adapter"
"""Folder of the adapters below that of the student."""


def with_adapters(
    model: Any, lora: Lora, seed: int, *, packed: bool, check: bool = True
) -> nn.Module:
    """Return the model with float32 adapters in place of all its weights to train.

    seed: initialises them; packed: see pack_states; check: run the model. Raises ConfigError for
    layers that cannot have adapters, or that would be saved as something else than what was
    trained.
    """
    ids = torch.arange(8)[None]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        try:
            adapted = wrap(model, lora)
            if check:
                folded_head(model, pack_states(adapted.eval(), ids, ids, packed=packed))
        except ConfigError:
            raise
        # peft wraps any linear layer, and some models read more of a layer than its output.
        except Exception as error:
            raise _refused(model, lora, error) from error
    return adapted


def wrap(model: Any, lora: Lora) -> nn.Module:
    """Return the model with adapters that no forward pass has tried; see with_adapters."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(
            f"lora r = {lora.r} needs the package peft", hint='pip install -e ".[lora]"'
        ) from error
    ends = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    tied = ends["embeddings"] is not None and ends["embeddings"].weight is ends["head"].weight
    targets = lora.target_modules
    with warnings.catch_warnings():
        # They concern peft's own settings; a forward pass and the check at the save decide.
        warnings.simplefilter("ignore")
        try:
            adapted: nn.Module = get_peft_model(
                model,
                LoraConfig(
                    r=lora.r,
                    lora_alpha=lora.alpha or 2 * lora.r,
                    lora_dropout=lora.dropout,
                    target_modules=targets if isinstance(targets, str) else list(targets),
                    modules_to_save=list(lora.modules_to_save) or None,
                    use_rslora=lora.use_rslora,
                    use_dora=lora.use_dora,
                    bias=lora.bias,
                ),
            )
            _check(adapted, lora, ends, tied=tied)
        except Exception as error:  # of any kind, see above
            raise _refused(model, lora, error) from error
    return adapted


def _refused(model: Any, lora: Lora, error: Exception) -> ConfigError:
    targets = lora.target_modules
    shown = targets if isinstance(targets, str) else ",".join(targets)
    return ConfigError(
        f"lora target_modules = {shown}: {type(model).__name__} does not run with these adapters: "
        f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        hint='name other layers, such as --lora-target-modules ".*(q|k|v|o)_proj"',
    )


def _check(adapted: Any, lora: Lora, ends: dict[str, Any], *, tied: bool) -> None:
    """Raise ValueError for adapters that would not train, or would be saved as something else."""
    from peft.utils import ModulesToSaveWrapper

    modules = list(adapted.modules())
    bases = [each.base_layer for each in modules if hasattr(each, "base_layer")]
    weights = [id(base.weight) for base in bases if isinstance(base, nn.Linear)]
    if len(set(weights)) < len(weights):
        raise ValueError("layers with the same weights would get several adapters")
    if any(base is ends["head"] for base in bases):
        # The loss multiplies by the head's own weight, past an adapter.
        raise ValueError("the head cannot have an adapter; name it in modules_to_save")
    whole = [each.original_module for each in modules if isinstance(each, ModulesToSaveWrapper)]
    names = {name.rpartition(".")[2] for name, _ in adapted.named_modules()}
    if missing := sorted(set(lora.modules_to_save) - names):
        raise ValueError(f"modules_to_save names {missing[0]}, which the model does not have")
    for name, end in ends.items():
        if tied and any(each is end for each in [*bases, *whole]):
            raise ValueError(f"the {name} cannot train alone: embeddings and head are one matrix")
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    if lora.bias != "none" and not any(name.endswith("bias") for name in trained):
        raise ValueError(f"bias = {lora.bias}, and these layers have no bias")


def save_adapter(adapted: Any, folder: Path, parent: ModelRef) -> None:
    """Save the adapters to `folder`, in peft's format, for the model `parent`."""
    for config in adapted.peft_config.values():
        # A local folder has no revision.
        config.base_model_name_or_path = parent.name if parent.revision else str(parent.path)
        config.revision = parent.revision or None
    # Its default asks the hub whether the vocabulary has grown.
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's template of a model card


def load_adapter(base: Any, folder: Path) -> Any:
    """Return a loaded base model with the adapters of `folder`."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old names of peft's that transformers deprecates
        return PeftModel.from_pretrained(base, str(folder)).eval()
