"""The model in training: load, check, read hidden states, save as the next version.

Trainable weights are float32, whatever the dtype of the folder: at a learning rate of 1e-6 most
updates are below the resolution of bfloat16. Sequences are packed without an attention mask: the
model separates them by position ids that restart at 0, if neither a mask nor a cache is passed. Not
every architecture does this, and not every head is a matrix followed by a scale or a soft cap, so
both are checked on a few tokens before training.
"""

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logitcask.engine.config.training import Lora
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.models.identity import METADATA_FILE, digest, write_metadata
from logitcask.engine.models.logit_transform import logit_transform_of
from logitcask.engine.types import ModelRef

NO_LORA = Lora()
PROBE_TOKENS = 32
TOKENIZER_FILES = (
    *("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template"),
)
"""First parts of the names of tokenizer files."""
TOLERANCE = 1e-4
"""Largest difference in a probe, relative to the largest value: float32 noise is some 1e-6."""


def load_student(ref: ModelRef, *, lora: Lora = NO_LORA, seed: int = 0) -> nn.Module:
    """Load a student with float32 weights on the CPU, checked for packed training.

    With `lora.r` > 0 float32 adapters are trained instead of the weights; `seed` initialises them.
    Raises ModelError if the model cannot be loaded or trained packed.
    """
    model = _load(ref.path)
    check_trainable(model, ref.n_vocab)
    return _with_adapters(model, lora, seed) if lora.r else model


@contextmanager
def quiet() -> Iterator[None]:
    """Turn transformers' progress bars and warnings off: the engine never prints.

    Its warnings on checkpoints (of a tied head that is stored once, for example) concern its own
    formats.
    """
    from transformers.utils import logging as module

    logging: Any = module
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path} cannot be loaded as a causal language model: {error}".replace("\n", " "),
            hint="give a folder with config.json and safetensors weights of an architecture that "
            "transformers itself knows",
        ) from error


def _with_adapters(model: Any, lora: Lora, seed: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(
            f"lora r = {lora.r} needs the package peft", hint='pip install -e ".[lora]"'
        ) from error
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft uses a deprecated name of transformers.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        torch.manual_seed(seed)
        adapted: nn.Module = get_peft_model(
            model,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha or 2 * lora.r,
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
            ),
        )
    return adapted


def inner_model(model: nn.Module) -> Any:
    """Return the transformers model, without LoRA's wrapper; adapters stay in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def hidden_states(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return the [L, D] last hidden states of one pack, input_ids and position_ids [1, L]."""
    # base_model, not get_decoder(): on multimodal models the latter would skip the embedding step.
    outputs = inner_model(model).base_model(
        input_ids=input_ids, position_ids=position_ids, use_cache=False
    )
    states: Tensor = outputs.last_hidden_state
    return states[0]


def head_weight(model: nn.Module) -> Tensor:
    """Return the [V, D] weight of the head; V may be padded beyond n_vocab."""
    weight: Tensor = inner_model(model).get_output_embeddings().weight
    return weight


@torch.no_grad()
def check_trainable(model: nn.Module, n_vocab: int) -> None:
    """Check the head and the packing of a model on a few tokens.

    Raises ModelError unless logits are the logit transform of hidden @ head^T, and packed sequences
    do not attend to each other.
    """
    inner = inner_model(model)
    name = type(inner).__name__
    head = inner.get_output_embeddings()
    if head is None or head.weight.dim() != 2 or head.weight.shape[0] < n_vocab:
        raise ModelError(
            f"{name} has no output matrix of at least {n_vocab} rows, one per id of its tokenizer",
            hint="train a causal language model whose head is a linear layer",
        )
    if "position_ids" not in signature(inner.base_model.forward).parameters:
        raise ModelError(
            f"{name} takes no position ids: sequences of one pack would attend to each other",
            hint="train a model with rotary or learned positions",
        )
    if getattr(head, "bias", None) is not None:  # a bias of zeros would pass the check below
        raise ModelError(
            f"{name} has a bias of the output matrix, which is not supported",
            hint="train a model whose logits are hidden states times the output matrix",
        )
    training = inner.training
    inner.eval()
    positions = torch.arange(PROBE_TOKENS, device=head.weight.device)[None]
    ids = (positions * 7 + 1) % n_vocab
    whole = hidden_states(inner, ids, positions)
    logits = inner(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
    if _differ(logit_transform_of(inner.config).apply(whole @ head.weight.T), logits):
        raise ModelError(
            f"{name} changes logits after its output matrix in a way that is not supported",
            hint="train a model whose logits are hidden states times that matrix, with a scale "
            "or a soft cap at most",
        )
    cut = PROBE_TOKENS // 3
    halves = [ids[:, :cut], ids[:, cut:]]
    alone = [hidden_states(inner, half, positions[:, : half.shape[1]]) for half in halves]
    restarting = torch.cat([positions[:, : half.shape[1]] for half in halves], 1)
    packed = hidden_states(inner, ids, restarting)
    inner.train(training)
    if _differ(packed, torch.cat(alone)):
        raise ModelError(
            f"{name} lets sequences of one pack attend to each other: it ignores that position ids "
            "restart",
            hint="train a model whose layers all use softmax attention, with sdpa",
        )


def _differ(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() > TOLERANCE * theirs.abs().max().clamp(min=1e-6))


def live_digest(model: nn.Module) -> str:
    """Return the digest of the current weights, the identity of a sampler in training.

    sha256 over the sorted (name, dtype, shape, sha256 of the bytes) of all parameters, shared ones
    once. It differs from the digest of the saved folder, whose tensors may have other names.
    """
    rows = []
    for name, tensor in model.named_parameters():
        data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        sha = hashlib.sha256(data.tobytes()).hexdigest()
        rows.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), sha])
    return digest(sorted(rows))


def save_student(
    model: nn.Module, folder: Path, *, parent: ModelRef, updates: int, metadata: Mapping[str, Any]
) -> None:
    """Save a loadable model to `folder`: safetensors in float32, tokenizer, metadata.

    LoRA adapters are merged into the saved weights (the model in memory keeps them separate), so
    the folder loads without peft. `metadata` holds pin, plan and objective; the version is the
    parent's plus `updates`. Files are staged and then moved, logitcask.json last: a folder that has
    it is complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    exists = folder.is_dir()
    staging = folder / ".saving" if exists else folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    _merged(model).save_pretrained(staging)
    for file in parent.path.iterdir():
        if file.is_file() and file.name.startswith(TOKENIZER_FILES):
            shutil.copyfile(file, staging / file.name)
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
    for file in sorted(staging.iterdir(), key=lambda f: f.name == METADATA_FILE):
        os.replace(file, folder / file.name)
    staging.rmdir()


def _merged(model: nn.Module) -> Any:
    """Return the model with LoRA adapters merged into its weights."""
    inner = inner_model(model)
    if inner is model:
        return inner
    from peft.tuners.lora import Linear
    from transformers import AutoModelForCausalLM

    state = {}
    for name, tensor in inner.state_dict().items():
        if ".lora_" not in name:
            state[name.replace(".base_layer.", ".")] = tensor
    layers: Any = inner.named_modules()
    for name, layer in layers:
        if isinstance(layer, Linear):
            key = f"{name}.weight"
            state[key] = state[key] + layer.get_delta_weight("default")
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        plain = build(inner.config, attn_implementation="sdpa")
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    return plain
