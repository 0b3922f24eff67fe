"""One vLLM engine for one purpose: sampling, prompt log-probs, or hidden states.

Purposes are never mixed in one engine: for prompt log-probs vLLM computes logits of all tokens of a
batch. A model's generation_config is not used; inputs and outputs are ids, and a tokenizer is
loaded only for pooling, which requires one. vllm is imported when an engine is opened.

An engine runs in its own process, the default of vLLM. With VLLM_ENABLE_V1_MULTIPROCESSING=0 it
runs in this one, and closing the first engine destroys torch's process groups for the others.
"""

import logging
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig

from logitcask.engine.backends.returned import reject_answer
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.events import running_step, silent_bar
from logitcask.engine.models.forward import NEVER, rope_switch
from logitcask.engine.types import Array

Purpose = Literal["sample", "score", "hidden"]

SCORED_AT_ONCE = 2048
"""Tokens of a batch: the V1 runner holds their logits in float32."""
CPU_CACHE = 1 << 30
"""Bytes of the KV cache on a CPU; by default vLLM takes most of the memory."""
PROBE_TOKENS = 32
PROBE_BEST = 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Nats, at the best ids of a probe: tolerance of two programs with the same weights."""
NO_ID = -1
"""Padding of rows with fewer chosen ids."""


class Engine:
    """A vLLM engine."""

    def __init__(
        self, path: Path, purpose: Purpose, *, dtype: torch.dtype, on_cpu: bool, memory: float
    ) -> None:
        """Open an engine; memory: its share of a GPU.

        Raises ConfigError without the package vllm, ModelError if it cannot start.
        """
        if find_spec("vllm") is None:
            raise ConfigError(
                "the backend vllm needs the package vllm",
                hint='install it in a separate environment: pip install -e ".[vllm]"',
            )
        # vLLM logs to standard output, which is for the results of the commands.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import vllm

        logging.getLogger("vllm").setLevel(logging.WARNING)
        # -1: as long as its memory allows. For longer contexts than LongRoPE's original length vLLM
        # takes the long factors everywhere, transformers only for longer sequences.
        switch = rope_switch(AutoConfig.from_pretrained(path, trust_remote_code=False))
        options: dict[str, Any] = {"max_model_len": -1 if switch == NEVER else switch}
        if on_cpu:
            options |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE}
        else:
            options |= {"gpu_memory_utilization": memory}
        if purpose == "sample":
            options |= {"logprobs_mode": "processed_logprobs"}
        elif purpose == "score":
            # Prompt log-probs need all tokens, so no cache; -1: no cap on log-probs.
            options |= {"max_num_batched_tokens": SCORED_AT_ONCE, "max_logprobs": -1}
            options |= {"enable_prefix_caching": False}
        else:
            from vllm.config import PoolerConfig  # pyright: ignore[reportMissingImports]

            pooler = PoolerConfig(task="token_embed", use_activation=False)
            options |= {"runner": "pooling", "convert": "embed", "pooler_config": pooler}
            options |= {"enable_prefix_caching": False}
        self.purpose, self.version = purpose, str(vllm.__version__)
        try:
            with running_step(f"start vLLM on {path.name}"):
                self.llm = vllm.LLM(
                    model=str(path),
                    dtype=str(dtype).removeprefix("torch."),
                    seed=0,
                    generation_config="vllm",
                    skip_tokenizer_init=purpose != "hidden",
                    trust_remote_code=False,
                    use_tqdm_on_load=False,
                    **options,
                )
        # vLLM raises ValueError, RuntimeError, OSError or an error of pydantic.
        except Exception as error:
            raise ModelError(
                f"vLLM cannot open {path} to {purpose}: {type(error).__name__}: {error}",
                hint="give a model that this vLLM supports, or less or more memory of the GPU "
                "(memory=), or use the backend hf",
            ) from error
        config = self.llm.llm_engine.vllm_config
        self.context = int(config.model_config.max_model_len)
        """Tokens of prompt and response together."""
        self.probe_best = min(PROBE_BEST, int(config.model_config.get_vocab_size()))
        self.runner = "V2" if config.use_v2_model_runner else "V1"

    def close(self) -> None:
        """End the engine's process."""
        self.llm.llm_engine.engine_core.shutdown()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[dict[str, Any]],
        on_finished: Callable[[int], None] = lambda count: None,
    ) -> Any:
        """Sample one response to each prompt; return vLLM's outputs in order.

        on_finished: called with the number of finished responses.
        """
        common = {"n": 1, "logprobs": 0, "skip_special_tokens": False}
        return self._generate(prompts, params, _counter(on_finished), **common)

    def prompt_logprobs(
        self, sequences: Sequence[Sequence[int]], k: int, extra_ids: Sequence[Array | None]
    ) -> list[tuple[Array, Array, Array | None]]:
        """Return for each sequence of L tokens (ids [L - 1, 1 + k], their log-probs, [R, A]).

        Row i is about token i + 1: the token itself, then the best k, best first. extra_ids: [R, A]
        chosen ids of the last R rows, padded with NO_ID; the third result is their log-probs.
        Raises AnswerError for an answer of another shape.
        """
        params: list[dict[str, Any]] = []
        for ids, extra in zip(sequences, extra_ids, strict=True):
            params.append({"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k})
            if extra is not None:
                start = len(ids) - 1 - len(extra)
                params[-1] |= {"prompt_logprob_token_ids": extra, "prompt_logprob_start": start}
        answers = []
        outputs = self._generate(sequences, params)
        for ids, extra, out in zip(sequences, extra_ids, outputs, strict=True):
            flat, shape = out.prompt_logprobs, (len(ids) - 1, 1 + k)
            count = 0 if flat is None else len(flat.token_ids)
            if count != shape[0] * shape[1]:
                reject_answer(
                    f"{count} log-probs for {shape[0]} tokens, each with its {k} best ids"
                )
            top = np.asarray(flat.token_ids, np.int64).reshape(shape)
            if (top[:, 0] != np.asarray(ids[1:])).any():
                reject_answer("log-probs of other tokens than those that were sent")
            lp = np.asarray(flat.logprobs, np.float32).reshape(shape)
            extra_lp = out.prompt_token_id_logprobs
            if extra is not None and (extra_lp is None or extra_lp.shape != extra.shape):
                found = None if extra_lp is None else extra_lp.shape
                reject_answer(f"{found} log-probs at chosen ids of the shape {extra.shape}")
            answers.append((top, lp, None if extra is None else np.asarray(extra_lp, np.float32)))
        return answers

    def answers_at_ids(self) -> bool:
        """Return True if it returns log-probs at chosen ids of each row: with vLLM 0.32 or newer,
        and its V2 runner.
        """
        from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

        try:
            self.prompt_logprobs([[0, 1, 2]], 1, [np.array([[0], [1]])])
        # vLLM 0.31 takes one list of ids for all rows, and cannot hash a row.
        except (VLLMValidationError, TypeError):
            return False
        return True

    def hidden(self, sequences: Sequence[Sequence[int]]) -> list[Any]:
        """Return the states [L, D] after the final norm, of every token."""
        inputs = [{"prompt_token_ids": list(ids)} for ids in sequences]
        outs = self.llm.encode(inputs, pooling_task="token_embed", use_tqdm=False)
        return [out.outputs.data for out in outs]

    def probe(self, ids: list[int]) -> Array:
        """Return the answers to a probe of L tokens, as its purpose gives them: log-probs [L - 1,
        1 + probe_best], or states [L, D].
        """
        if self.purpose == "hidden":
            states: Array = self.hidden([ids])[0].float().numpy()
            return states
        return self.prompt_logprobs([ids], self.probe_best, [None])[0][1]

    def reload(self, path: Path) -> None:
        """Load other weights of the same shapes in place, and clear the prefix cache.

        Raises ModelError if it cannot; the weights are undefined then.
        """
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            cleared = self.llm.reset_prefix_cache()
        # As at opening.
        except Exception as error:
            raise ModelError(
                f"vLLM {self.version} cannot load {path} in place: {type(error).__name__}: {error}",
                hint="open a new engine",
            ) from error
        if not cleared:
            raise ModelError(
                f"vLLM {self.version} did not clear its prefix cache, which old weights filled",
                hint="open a new engine",
            )

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[dict[str, Any]],
        bar: Any = False,
        **common: Any,
    ) -> Any:
        import vllm

        sampling = [
            vllm.SamplingParams(**each, **common, flat_logprobs=True, detokenize=False)
            for each in params
        ]
        inputs = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return self.llm.generate(inputs, sampling, use_tqdm=bar)


def _counter(on_finished: Callable[[int], None]) -> Any:
    """Return a progress bar that vLLM accepts, which counts finished requests and prints nothing.

    It is the only sign of a running batch that vLLM gives.
    """

    def count(bar: Any, more: int) -> None:
        if bar.iterable is None:  # not the bar of requests that are added
            on_finished(int(bar.n))

    return silent_bar(count)


def probe_ids(n_vocab: int, context: int) -> list[int]:
    """Return deterministic ids of a probe."""
    return [i * 7919 % n_vocab for i in range(min(PROBE_TOKENS, context - 1))]


def best_gap(returned: tuple[Array, Array], reference: Array) -> float:
    """Return the largest difference in nats at the best k ids; at unlikely ids rounding is large.

    returned: ids and log-probs [T, 1 + k] as of `Engine.prompt_logprobs`; reference: [T, V]
    log-probs.
    """
    ids, lp = returned[0][:, 1:], returned[1][:, 1:]
    return float(np.abs(np.take_along_axis(reference, ids, 1) - lp).max())
