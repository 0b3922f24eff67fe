"""One engine of vLLM, for one purpose: to sample, to tell log-probs, or to give hidden states.

Purposes are never mixed in one engine: where log-probs of prompts are wanted, vLLM makes logits of
everybody's tokens. Nothing is left to a model's generation_config; ids go in and ids come out, and
a tokenizer is loaded only where vLLM insists, to pool. vllm is imported when an engine is opened.

An engine is a process of its own, as vLLM has it by default. With VLLM_ENABLE_V1_MULTIPROCESSING=0
it is in this one, and the first that is closed takes torch's process groups from the others.
"""

import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from logitcask.engine.backends.returned import wrong
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.types import Array

Purpose = Literal["sample", "score", "hidden"]

SCORED_AT_ONCE = 2048
"""Tokens: an engine of the older runner holds logits of all of them in float32."""
CPU_CACHE = 1 << 30
"""Bytes of keys and values on a CPU, where vLLM would take most of the machine."""
PROBE_TOKENS = 32
PROBE_BEST = 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Nats, at the best ids of a probe: how far two programs are apart that run the same weights."""
NO_ID = -1
"""Fills the rows that are asked at fewer ids than others."""


class Engine:
    def __init__(
        self, path: Path, purpose: Purpose, *, dtype: torch.dtype, on_cpu: bool, memory: float
    ) -> None:
        """memory: share of a GPU that it may fill.

        Raises ConfigError where there is no vLLM, ModelError where it cannot start.
        """
        if find_spec("vllm") is None:
            raise ConfigError(
                "the backend vllm needs the package vllm",
                hint='Install it in an environment of its own: pip install -e ".[vllm]".',
            )
        # vLLM logs to standard output, where our callers' answers go.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import vllm

        logging.getLogger("vllm").setLevel(logging.WARNING)
        wanted: dict[str, Any] = {"max_model_len": -1}  # as long as its memory allows
        if on_cpu:
            wanted |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE}
        else:
            wanted |= {"gpu_memory_utilization": memory}
        if purpose == "sample":
            wanted |= {"logprobs_mode": "processed_logprobs"}
        elif purpose == "score":
            # No prompt's log-probs are read from a cache; -1: as many ids as are asked for.
            wanted |= {"max_num_batched_tokens": SCORED_AT_ONCE, "max_logprobs": -1}
            wanted |= {"enable_prefix_caching": False}
        else:
            from vllm.config import PoolerConfig  # pyright: ignore[reportMissingImports]

            pooler = PoolerConfig(task="token_embed", use_activation=False)
            wanted |= {"runner": "pooling", "convert": "embed", "pooler_config": pooler}
            wanted |= {"enable_prefix_caching": False}
        self.purpose, self.version = purpose, str(vllm.__version__)
        try:
            self.llm = vllm.LLM(
                model=str(path),
                dtype=str(dtype).removeprefix("torch."),
                seed=0,
                generation_config="vllm",
                skip_tokenizer_init=purpose != "hidden",
                trust_remote_code=False,
                use_tqdm_on_load=False,
                **wanted,
            )
        # vLLM raises ValueError, RuntimeError, OSError or pydantic's own.
        except Exception as error:
            raise ModelError(
                f"vLLM cannot open {path} to {purpose}: {type(error).__name__}: {error}",
                hint="Give a model that this vLLM runs, or less or more memory of the GPU "
                "(memory=), or use the backend hf.",
            ) from error
        config = self.llm.llm_engine.vllm_config
        self.context = int(config.model_config.max_model_len)
        """Tokens of prompt and response together."""
        self.runner = "V2" if config.use_v2_model_runner else "V1"

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def sample(self, prompts: Sequence[Sequence[int]], wanted: Sequence[dict[str, Any]]) -> Any:
        """One request each -> vLLM's outputs, in order."""
        return self._ask(prompts, wanted, n=1, logprobs=0, skip_special_tokens=False)

    def tell(
        self, sequences: Sequence[Sequence[int]], k: int, at: Sequence[Array | None]
    ) -> list[tuple[Array, Array, Array | None]]:
        """Of every sequence of L tokens: (ids [L - 1, 1 + k], log-probs of them, at [R, A]).

        Row i is about token i + 1: the token itself, then the best k, best first. at: [R, A] ids
        that the last R rows are asked at, NO_ID where a row has fewer.
        Raises AnswerError for an answer of another shape.
        """
        wanted: list[dict[str, Any]] = []
        for ids, asked in zip(sequences, at, strict=True):
            wanted.append({"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k})
            if asked is not None:
                start = len(ids) - 1 - len(asked)
                wanted[-1] |= {"prompt_logprob_token_ids": asked, "prompt_logprob_start": start}
        answers = []
        for ids, asked, out in zip(sequences, at, self._ask(sequences, wanted), strict=True):
            flat, shape = out.prompt_logprobs, (len(ids) - 1, 1 + k)
            count = 0 if flat is None else len(flat.token_ids)
            if count != shape[0] * shape[1]:
                wrong(f"{count} log-probs for {shape[0]} tokens, each with its {k} best ids")
            told = np.asarray(flat.token_ids, np.int64).reshape(shape)
            if (told[:, 0] != np.asarray(ids[1:])).any():
                wrong("log-probs of other tokens than those that it was given")
            lp = np.asarray(flat.logprobs, np.float32).reshape(shape)
            at_lp = out.prompt_token_id_logprobs
            if asked is not None and (at_lp is None or at_lp.shape != asked.shape):
                said = None if at_lp is None else at_lp.shape
                wrong(f"{said} log-probs where it was asked at ids of the shape {asked.shape}")
            answers.append((told, lp, None if asked is None else np.asarray(at_lp, np.float32)))
        return answers

    def answers_at_ids(self) -> bool:
        """Whether it can be asked at ids of every row's own: only vLLM's second runner can."""
        from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

        try:
            self.tell([[0, 1, 2]], 1, [np.array([[0], [1]])])
        except VLLMValidationError:
            return False
        return True

    def hidden(self, sequences: Sequence[Sequence[int]]) -> list[Any]:
        """[L, D] states after the final norm, of every token."""
        asked = [{"prompt_token_ids": list(ids)} for ids in sequences]
        outs = self.llm.encode(asked, pooling_task="token_embed", use_tqdm=False)
        return [out.outputs.data for out in outs]

    def reload(self, path: Path) -> None:
        """Other weights of the same shapes, in place; what it remembers of the old is dropped."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        self.llm.reset_prefix_cache()

    def _ask(
        self, prompts: Sequence[Sequence[int]], wanted: Sequence[dict[str, Any]], **same: Any
    ) -> Any:
        import vllm

        params = [
            vllm.SamplingParams(**each, **same, flat_logprobs=True, detokenize=False)
            for each in wanted
        ]
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return self.llm.generate(asked, params, use_tqdm=False)


def probe_ids(n_vocab: int, context: int) -> list[int]:
    return [i * 7919 % n_vocab for i in range(min(PROBE_TOKENS, context - 1))]


def best_gap(told: tuple[Array, Array], reference: Array) -> float:
    """told: ids and log-probs [T, 1 + k] as of `Engine.tell`; reference: [T, V] log-probs.

    -> nats, the most that they differ by at the best k ids: at unlikely ones, rounding is large.
    """
    ids, lp = told[0][:, 1:], told[1][:, 1:]
    return float(np.abs(np.take_along_axis(reference, ids, 1) - lp).max())
