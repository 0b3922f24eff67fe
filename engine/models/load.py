"""Load a model of transformers: complete, checked, and with adapters where they are requested.

Trainable weights are float32, whatever the dtype of the folder: at a learning rate of 1e-6 most
updates are below the resolution of bfloat16.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from logitcask.engine.config.training import Lora
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.events import running_step
from logitcask.engine.models.adapters import with_adapters
from logitcask.engine.models.attention import (
    PACKED,
    attention_of,
    ordinary_attention,
    use_ordinary,
    use_packed,
)
from logitcask.engine.models.check import TOLERANCE, CheckedPaths, checked_paths, sample_log_probs
from logitcask.engine.models.forward import inner_model, pack_states
from logitcask.engine.models.identity import digest
from logitcask.engine.types import ModelRef

NO_LORA = Lora()
ON_GPU = ("flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention implementations that train on a GPU alone."""
BUFFERS = ("inv_freq", "masked_bias", "attn.bias", "attention.bias", "position_ids")
"""Last parts of the names of buffers that older versions of transformers saved."""


@contextmanager
def quiet() -> Iterator[None]:
    """Turn transformers' progress bars and warnings off: the engine never prints.

    Its warnings on checkpoints (of a tied head that is stored once, for example) concern its own
    formats, and may hold any name of a tensor.
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


def load_model(
    path: Path, dtype: torch.dtype, device: torch.device, *, attention: str | None = None
) -> Any:
    """Load a causal language model in evaluation mode, with every tensor of its folder.

    attention: an implementation of transformers; None = its default for the architecture: sdpa, or
    eager where that is not supported. Raises ModelError for a folder that cannot be loaded; for
    weights that are missing or have another shape; and for weights of a layer of the model that
    the layer does not use.
    """
    factory: Any = transformers.AutoModelForCausalLM
    try:
        with quiet(), running_step(f"load {path.name}"):
            model, report = factory.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **({} if attention is None else {"attn_implementation": attention}),
            )
    # transformers raises OSError, ValueError, KeyError, ImportError or safetensors errors.
    except Exception as error:
        cause = " ".join(str(error).split())[:400]
        raise ModelError(
            f"the model in {path} cannot be loaded: {type(error).__name__}: {cause}",
            hint="give a folder of a causal language model that transformers itself supports, made "
            "by save_pretrained",
        ) from error
    _check_complete(model, report, path)
    return model.eval().to(device)


def _check_complete(model: Any, report: Mapping[str, Collection[Any]], path: Path) -> None:
    missing = sorted({*report["missing_keys"], *(str(m[0]) for m in report["mismatched_keys"])})
    if missing:
        raise ModelError(
            f"the weights in {path} lack {len(missing)} tensors of its config, or have them in "
            f"another shape: {missing[0]} ...",
            hint="take weights and config.json from the same model",
        )
    layers = dict(model.named_modules())
    unused = sorted(
        name
        for name in report["unexpected_keys"]
        if name.rpartition(".")[0] in layers and not name.endswith(BUFFERS)
    )
    if unused:
        raise ModelError(
            f"the weights in {path} hold {len(unused)} tensors that its config turns off: "
            f"{unused[0]} ...",
            hint="take weights and config.json from the same model",
        )


def load_student(
    ref: ModelRef,
    *,
    lora: Lora = NO_LORA,
    seed: int = 0,
    length: int = 0,
    attention: str | None = None,
) -> nn.Module:
    """Load a student with float32 weights on the CPU, checked for sequences of `length` tokens.

    With `lora.r` > 0 float32 adapters are trained instead of the weights; `seed` initialises them.
    attention: an implementation of transformers; None = that of packs, where the check proves it
    with this model. One of ON_GPU is set on the GPU, with `use_on_gpu`. Raises ModelError if the
    model cannot be loaded or trained.
    """
    here = None if attention in ON_GPU else attention
    model = load_model(ref.path, torch.float32, torch.device("cpu"), attention=here)
    if here is None and use_packed(model):
        _keep_if_proved(model, ref, length)
    set_paths(model, ref, ref.n_vocab, length=length)
    if lora.r:
        return with_adapters(model, lora, seed, packed=paths_of(model).packed)
    if _loses_a_row(model):
        raise ModelError(
            f"{type(model).__name__} is saved whole and loaded otherwise: transformers sets the "
            "row of its padding id to zero, and the output matrix is that matrix too",
            hint="train adapters, with --lora-r 16",
        )
    student: nn.Module = model
    return student


def _keep_if_proved(model: Any, ref: ModelRef, length: int) -> None:
    """Switch back to the ordinary attention unless the other has the same proved paths, or more."""
    found = checked_paths(model, ref, ref.n_vocab, length=length)
    if found == CheckedPaths():
        return
    with ordinary_attention(model):
        other = checked_paths(model, ref, ref.n_vocab, length=length)
    if not found.packed or replace(found, packed=other.packed, packing=other.packing) != other:
        use_ordinary(model)


@torch.no_grad()
def empty_student(
    ref: ModelRef,
    paths: CheckedPaths,
    buffers: Mapping[str, Tensor],
    *,
    attention: str,
    lora: Lora = NO_LORA,
    seed: int = 0,
) -> nn.Module:
    """Build a student on the CPU whose weights are not set, and take no memory until they are.

    paths, buffers, attention: those of the same student, loaded elsewhere.
    """
    config = transformers.AutoConfig.from_pretrained(
        ref.path, trust_remote_code=False, local_files_only=True
    )
    factory: Any = transformers.AutoModelForCausalLM
    with quiet(), torch.device("meta"):
        model = factory.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model = model.eval().to_empty(device="cpu")
    model.tie_weights()
    model.checked_paths = paths
    if not (attention in PACKED.values() and use_packed(model)):
        model.set_attn_implementation(attention)
    student: nn.Module = model
    if lora.r:
        student = with_adapters(model, lora, seed, packed=paths.packed, check=False)
    for name, buffer in student.named_buffers():
        buffer.copy_(buffers[name])
    return student


@torch.no_grad()
def _loses_a_row(model: Any) -> bool:
    """Return True if the class changes a row of a tied embedding after it was loaded."""
    tied = model.get_input_embeddings()
    if tied is None or tied.weight is not model.get_output_embeddings().weight:
        return False
    loaded = nn.Embedding(2, 1, padding_idx=0)
    loaded.weight.fill_(1.0)
    loaded.weight._is_hf_initialized = True  # type: ignore[attr-defined]
    model._init_weights(loaded)
    return getattr(tied, "padding_idx", None) is not None and bool((loaded.weight == 0).any())


def set_paths(
    model: nn.Module, ref: ModelRef | Path, n_vocab: int, *, length: int = 0
) -> CheckedPaths:
    """Check the paths of a model, and keep them with it; raises ModelError if it cannot score.

    length: see checked_paths.
    """
    found = checked_paths(model, ref, n_vocab, length=length)
    found.require("scoring", of=ref)
    inner_model(model).checked_paths = found
    return found


def paths_of(model: nn.Module) -> CheckedPaths:
    """Return the paths that `set_paths` kept; for any other model, those of a plain decoder."""
    found: CheckedPaths = getattr(inner_model(model), "checked_paths", CheckedPaths())
    return found


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


def set_mode(model: nn.Module, *, dropout: bool) -> None:
    """Prepare a student for a training step.

    Without `dropout` it computes as in evaluation, so that p of the loss is the distribution that
    samples and is scored; the dropout of LoRA's inputs has a setting of its own.
    """
    model.train(dropout)
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()
        # Not its parts: they have the mode of the computation, see _computed_again.
        elif getattr(module, "gradient_checkpointing", False):
            module.training = True


def hidden_states(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, lengths: Sequence[int] = ()
) -> Tensor:
    """Return the [L, D] last hidden states of one pack, input_ids and position_ids [1, L].

    lengths: of its sequences, see pack_states.
    """
    return pack_states(model, input_ids, position_ids, lengths, packed=paths_of(model).packed)


def checkpoint_layers(model: nn.Module, *, dropout: bool) -> None:
    """Compute the activations of each layer again in the backward pass; dropout: see set_mode.

    Raises ConfigError for a model without such layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"gradient_checkpointing: {type(inner_model(model)).__name__} has no layer of "
            "transformers that can be computed again",
            hint="leave it out, and lower --pack-length to save memory",
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(_computed_again, layer, dropout)  # type: ignore[assignment]


def _computed_again(
    layer: nn.Module, dropout: bool, forward: Callable[..., Any], *inputs: Any
) -> Any:
    """Return forward(*inputs) of a layer, with activations that the backward pass computes again.

    transformers asks for it in layers in training mode alone; the forward pass has the mode of
    `dropout`.
    """

    def run(*inputs: Any) -> Any:
        layer.training = dropout
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    return checkpoint(run, *inputs, use_reentrant=False)


def use_on_gpu(model: nn.Module, ref: ModelRef, attention: str, *, explicit: bool) -> None:
    """Switch a student to an attention of ON_GPU if it gives what ours gives.

    explicit: raise ModelError where it does not; else keep ours. Log-probs of a few tokens are
    compared under bfloat16 autocast, as far as the weights are on a GPU.
    """
    if (reason := _switch_on_gpu(inner_model(model), ref.n_vocab, attention)) and explicit:
        raise ModelError(
            f"{ref.name} does not run with attn_implementation = {attention}: {reason}",
            hint="leave the key out",
        )


@torch.no_grad()
def _switch_on_gpu(model: Any, n_vocab: int, attention: str) -> str:
    """Switch the attention, or return the reason why not."""
    before = attention_of(model)
    try:
        expected = sample_log_probs(model, n_vocab)
        model.set_attn_implementation(attention)
        if attention_of(model) != attention:
            return f"{type(model).__name__} keeps {before}"
        gap = sample_log_probs(model, n_vocab).sub(expected).abs().mean().item()
        reason = "" if gap <= TOLERANCE[torch.bfloat16] else f"log-probs are {gap:.2g} nats off"
    # transformers raises ValueError or ImportError for an attention that it cannot set, and
    # kernels raise anything.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if reason:
        model.set_attn_implementation(before)
    return reason
