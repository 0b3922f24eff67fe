"""Exact logits with vLLM: its hidden states times the head in the model's folder.

The engine returns the states after the final norm; logits are computed here in float32, as in the
hf backend. A probe checks that they give the engine's own log-probs.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from logitcask.engine.backends.scoring import restrict_to_shared
from logitcask.engine.backends.vllm.engine import TOLERANCE, Engine, best_gap
from logitcask.engine.errors import ModelError
from logitcask.engine.models.forward import NEVER
from logitcask.engine.models.identity import from_config, read_config
from logitcask.engine.models.logit_transform import logit_transform_of, named_extras
from logitcask.engine.models.weight_files import weight_files
from logitcask.engine.types import Array

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""Name endings of head tensors, and of embeddings that a tied head uses."""


class Hidden:
    """A network for backends.scoring: tokens -> hidden states -> logits."""

    switch = NEVER

    def __init__(
        self,
        engine: Engine,
        path: Path,
        *,
        n_vocab: int,
        tokenizer_vocab: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Read the head; ModelError if it is not found. tokenizer_vocab: as of HF."""
        self.engine, self.path, self.n_vocab = engine, path, n_vocab
        self.tokenizer_vocab = n_vocab if tokenizer_vocab is None else tokenizer_vocab
        self.dtype, self.device = dtype, device
        self.config = engine.llm.llm_engine.model_config.hf_config
        self.logit_transform = logit_transform_of(self.config)
        self.weight, self.bias = read_head(path)
        if self.weight.shape[0] < self.tokenizer_vocab:
            raise ModelError(
                f"the head of {path} has {self.weight.shape[0]} rows, and its tokenizer "
                f"{self.tokenizer_vocab} ids",
                hint="take weights and tokenizer from the same model",
            )
        # Only CUDA multiplies bfloat16 into float32.
        stored = dtype if device.type == "cuda" else torch.float32
        # The head is rounded to the dtype of the engine first.
        self.weight = self.weight.to(dtype).to(device, stored)

    def hidden(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: None) -> Tensor:
        """Return hidden states [B, L, D] of [B, L] tokens and mask, padded on the right."""
        lengths = mask.sum(1).tolist()
        found = self.engine.hidden([row[:n].tolist() for row, n in zip(ids, lengths, strict=True)])
        states = torch.zeros(*ids.shape, self.weight.shape[1], dtype=self.dtype)
        for row, state in zip(states, found, strict=True):
            row[: len(state)] = state
        return states.to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [R, n_vocab] float32 of hidden states [R, D]."""
        return restrict_to_shared(self._logits(hidden, self.tokenizer_vocab), self.n_vocab)

    def _logits(self, hidden: Tensor, ids: int) -> Tensor:
        weight = self.weight[:ids]
        logits: Tensor
        if weight.dtype == torch.float32:
            logits = hidden.float() @ weight.T
        else:
            logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        if self.bias is not None:
            logits = logits + self.bias[:ids].to(logits)
        return self.logit_transform.apply(logits)

    def log_probs(self, ids: list[int]) -> Array:
        """Return log-probs [L - 1, rows of the head] float32, over all rows of the head."""
        (states,) = self.engine.hidden([ids[:-1]])
        rows = len(self.weight)
        logits = self._logits(states.to(self.device, self.dtype), rows)
        found: Array = logits.log_softmax(1).cpu().numpy()
        return found

    def check(self, ids: list[int], returned: tuple[Array, Array]) -> None:
        """Compare with the log-probs that an engine returned for the probe; ModelError if other."""
        gap = best_gap(returned, self.log_probs(ids))
        if not gap <= TOLERANCE[self.dtype]:
            named = named_extras(self.config)
            why = f"; config.json has {', '.join(named)}" if named else ""
            raise ModelError(
                f"hidden states of {self.path} times its head differ by {gap:.1e} nats from the "
                f"log-probs of vLLM{why}",
                hint="score without exact=True, or with the backend hf",
            )


def read_head(path: Path) -> tuple[Tensor, Tensor | None]:
    """Return (weight [V', D], bias [V'] or None) of the head, which may be the tied embedding."""
    found: dict[str, Any] = {}
    for file in weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.endswith((*HEADS, *EMBEDDINGS, "lm_head.bias", "embed_out.bias")):
                    found[name] = (file, name)
    heads = [n for n in found if n.endswith(HEADS)]
    if not heads and from_config(read_config(path), "tie_word_embeddings") is not False:
        heads = [n for n in found if n.endswith(EMBEDDINGS)]
    if len(heads) != 1:
        raise ModelError(
            f"{path} holds {len(heads)} tensors that could be its head{list_names(heads)}",
            hint="score without exact=True, or with the backend hf",
        )
    biases = [n for n in found if n.endswith("bias")]
    return read_tensor(*found[heads[0]]), read_tensor(*found[biases[0]]) if biases else None


def list_names(heads: list[str]) -> str:
    """Format names for a message."""
    return f": {', '.join(sorted(heads))}" if heads else ""


def read_tensor(file: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file."""
    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor
