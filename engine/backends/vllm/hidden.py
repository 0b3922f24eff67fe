"""Everything exact from vLLM: its hidden states, times the head that stands in the model's folder.

The engine gives the states after the final norm and the rest is done here, in float32, as the hf
backend does it. That the two make the engine's own log-probs is proved on a probe.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from logitcask.engine.backends.scoring import of_shared
from logitcask.engine.backends.vllm.engine import TOLERANCE, Engine, best_gap
from logitcask.engine.errors import ModelError
from logitcask.engine.models.identity import from_config, read_config, weight_files
from logitcask.engine.models.logit_transform import logit_transform_of, named_extras
from logitcask.engine.types import Array

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""How tensors of a causal model end that are its head, or that a tied head is."""


class Hidden:
    """A network as backends.scoring asks for one: tokens -> hidden states -> logits."""

    def __init__(
        self,
        engine: Engine,
        path: Path,
        *,
        n_vocab: int,
        known: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """known: as of HF. Raises ModelError where the folder's head is not found."""
        self.engine, self.path, self.n_vocab = engine, path, n_vocab
        self.known = n_vocab if known is None else known
        self.dtype, self.device = dtype, device
        self.config = engine.llm.llm_engine.model_config.hf_config
        self.logit_transform = logit_transform_of(self.config)
        self.weight, self.bias = read_head(path)
        if self.weight.shape[0] < self.known:
            raise ModelError(
                f"the head of {path} has {self.weight.shape[0]} rows, and {self.known} ids are "
                "known",
                hint="Take weights and tokenizer from the same model.",
            )
        # Only CUDA multiplies bfloat16 into float32.
        kept = dtype if device.type == "cuda" else torch.float32
        # What the engine computes in rounds the head too.
        self.weight = self.weight.to(dtype).to(device, kept)

    def hidden(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: None) -> Tensor:
        """[B, L] tokens, [B, L] mask, padded on the right -> [B, L, D]."""
        lengths = mask.sum(1).tolist()
        told = self.engine.hidden([row[:n].tolist() for row, n in zip(ids, lengths, strict=True)])
        states = torch.zeros(*ids.shape, self.weight.shape[1], dtype=self.dtype)
        for row, state in zip(states, told, strict=True):
            row[: len(state)] = state
        return states.to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, D] -> [R, n_vocab] float32."""
        return of_shared(self._over(hidden, self.known), self.n_vocab)

    def _over(self, hidden: Tensor, ids: int) -> Tensor:
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
        """[L - 1, rows of the head] float32: over all that the engine's own logits are over."""
        (states,) = self.engine.hidden([ids[:-1]])
        rows = len(self.weight)
        told = self._over(states.to(self.device, self.dtype), rows).log_softmax(1)
        found: Array = told.cpu().numpy()
        return found

    def prove(self, ids: list[int], told: tuple[Array, Array]) -> None:
        """ModelError unless these are the log-probs that the engine tells of the probe `ids`."""
        gap = best_gap(told, self.log_probs(ids))
        if not gap <= TOLERANCE[self.dtype]:
            named = named_extras(self.config)
            why = f"; config.json says {', '.join(named)}" if named else ""
            raise ModelError(
                f"hidden states of {self.path} times its head differ by {gap:.1e} nats from what "
                f"vLLM tells{why}",
                hint="Score without exact=True, or with the backend hf.",
            )


def read_head(path: Path) -> tuple[Tensor, Tensor | None]:
    """(weight [V', D], bias [V'] or None) of a folder's head, whose embedding may be its head."""
    found: dict[str, Any] = {}
    for file in weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            for name in names:
                if name.endswith((*HEADS, *EMBEDDINGS, "lm_head.bias", "embed_out.bias")):
                    found[name] = (file, name)
    heads = [n for n in found if n.endswith(HEADS)]
    if not heads and from_config(read_config(path), "tie_word_embeddings") is not False:
        heads = [n for n in found if n.endswith(EMBEDDINGS)]
    if len(heads) != 1:
        raise ModelError(
            f"{path} holds {len(heads)} tensors that could be its head{named(heads)}",
            hint="Score without exact=True, or with the backend hf.",
        )
    biases = [n for n in found if n.endswith("bias")]
    return read(*found[heads[0]]), read(*found[biases[0]]) if biases else None


def named(heads: list[str]) -> str:
    return f": {', '.join(sorted(heads))}" if heads else ""


def read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor
