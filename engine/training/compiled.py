"""torch.compile of a student's layers, each by itself.

A whole step cannot be compiled: the loss runs inside the head's forward, and its shapes change with
each pack. A layer can, with lengths as symbols, so that no pack compiles it again. The attention of
packs reads its lengths on the host, and runs between the compiled parts of a layer.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from logitcask.engine.config.trainer_args import BACKENDS
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.models.attention import leave_uncompiled
from logitcask.engine.models.check import TOLERANCE
from logitcask.engine.models.forward import folded_head, inner_model
from logitcask.engine.models.load import hidden_states
from logitcask.engine.models.logit_transform import logit_transform_of

LENGTHS = (17, 9)
"""Tokens of the sequences on which compiled layers are compared with those that are not."""


def compile_layers(
    model: nn.Module, fields: Mapping[str, Any], *, n_vocab: int, bf16: bool
) -> None:
    """Compile each layer for passes with gradients, and compare the log-probs of a small pack.

    fields: torch_compile_backend and torch_compile_mode, where they are set. bf16: compute under
    bfloat16 autocast. Raises ConfigError for a model without such layers, ModelError where the
    compilation fails here or gives other log-probs.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    every = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    parts = {part for layer in every for part in layer.modules() if part is not layer}
    layers: list[Any] = [each for each in every if each not in parts]
    if not layers:
        raise ConfigError(
            f"train.args.torch_compile: {type(inner_model(model)).__name__} has no layer of "
            "transformers that can be compiled",
            hint="leave torch_compile out",
        )
    expected = _log_probs(model, n_vocab, bf16=bf16)
    leave_uncompiled()
    compiled: Callable[..., Any] = cache(
        partial(
            torch.compile,
            backend=fields.get("torch_compile_backend", BACKENDS[0]),
            mode=fields.get("torch_compile_mode"),
            dynamic=True,
        )
    )
    for layer in layers:
        layer._compiled_call_impl = partial(_call, layer, compiled(layer._call_impl))
        # The mode of a training step, see set_mode.
        layer.training = layer.gradient_checkpointing
        if layer.gradient_checkpointing:
            again = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = partial(_checkpointed, again, compiled)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on gradients of hidden states, which dynamo looks for
            gap = _log_probs(model, n_vocab, bf16=bf16).sub(expected).abs()
    # A compiler that is missing or fails raises anything.
    except Exception as error:
        raise ModelError(
            f"torch_compile does not run here: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}",
            hint="leave torch_compile out, or install what the error names",
        ) from error
    found = (gap.mean() if bf16 else gap.max()).item()
    if not found <= TOLERANCE[torch.bfloat16 if bf16 else torch.float32]:
        raise ModelError(
            f"compiled layers give log-probs {found:.2g} nats off", hint="leave torch_compile out"
        )


def _call(layer: Any, compiled: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Return the output of a layer, compiled in passes with gradients: shapes of others vary."""
    checkpointed = layer.gradient_checkpointing and layer.training
    run = compiled if torch.is_grad_enabled() and not checkpointed else layer._call_impl
    return run(*inputs, **options)


def _checkpointed(
    again: Callable[..., Any], compiled: Callable[..., Any], forward: Any, *inputs: Any
) -> Any:
    """Return again(forward, *inputs), where what is computed again is compiled.

    forward: a partial of the class's forward pass, as transformers makes it.
    """
    return again(partial(compiled(forward.func), *forward.args, **forward.keywords), *inputs)


@torch.enable_grad()
def _log_probs(model: nn.Module, n_vocab: int, *, bf16: bool) -> Tensor:
    """Return the log-probs [P, n_vocab] of a small pack, from a pass with gradients."""
    device = next(model.parameters()).device
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).to(device)
    ids = (torch.arange(sum(LENGTHS), device=device) * 7 + 3) % n_vocab
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        states = hidden_states(model, ids[None], positions[None], LENGTHS)
        hidden, head = folded_head(model, states)
        logits = (hidden.detach() @ head.detach().T.to(hidden.dtype))[:, :n_vocab]
    transform = logit_transform_of(inner_model(model).config)
    return transform.apply(logits.float()).log_softmax(-1)
