"""vLLM in this process: rollouts, and scores from returned top-k log-probs or hidden states.

vLLM samples with its own random numbers, one seed a sequence, and applies min-p before top-p, so
both together are rejected. Otherwise the distribution is that of backends.sampling, to rounding.

vLLM returns the K best ids of every row of a prompt and, with its V2 runner, log-probs at chosen
ids; tail and entropy are then bounds (backends.returned). With exact=True all scores are computed
from hidden states (backends.vllm.hidden), as a student's own scores require.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from logitcask.engine.backends.extra_ids import resolve_extra_ids
from logitcask.engine.backends.hf import pick_device, pick_dtype
from logitcask.engine.backends.returned import ResponseAssembler, ReturnedTopK
from logitcask.engine.backends.sampling import build_rollouts, check_room, sequence_seed
from logitcask.engine.backends.scoring import budget_batches, score_rollouts
from logitcask.engine.backends.vllm.engine import (
    NO_ID,
    Engine,
    Purpose,
    probe_ids,
)
from logitcask.engine.backends.vllm.hidden import Hidden
from logitcask.engine.backends.vllm.reload import (
    config_change,
    differs,
    is_compared,
    load_in_place,
)
from logitcask.engine.backends.vllm.sampling import check_supported, engine_params, response_of
from logitcask.engine.errors import ConfigError, LogitcaskError
from logitcask.engine.events import EventHandler
from logitcask.engine.models.identity import context_length, read_config
from logitcask.engine.types import (
    BATCH_TOKENS,
    Array,
    IdLists,
    ModelRef,
    Progress,
    Prompt,
    Rollouts,
    SamplingParams,
    ScoreParams,
    Scores,
    no_progress,
)

RETURNED = "told log-probs"
"""Scoring by returned log-probs, as written in the provenance of stored segments."""


class VLLM:
    """A causal model in vLLM as Sampler and Scorer. Not safe for use by several threads.

    Engines for sampling and scoring are opened at their first use and closed by close(). Each has a
    copy of the weights.
    """

    def __init__(
        self,
        model: ModelRef,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = BATCH_TOKENS,
        exact: bool = False,
        tokenizer_vocab: int | None = None,
        memory: float = 0.8,
    ) -> None:
        """Check the device and dtype; engines are opened later.

        batch_tokens: padded tokens of one scoring batch. tokenizer_vocab: as of HF.
        exact: score from hidden states, with all capabilities of hf except "logits" and "rows".
        memory: share of a GPU for the engines: with exact=True half of it for each, because a
        student samples and scores; otherwise all of it for the one engine.
        """
        self.device = pick_device(device)
        if self.device.index:
            raise ConfigError(
                f"device={device!r}, and vLLM takes the first visible GPU",
                hint="set CUDA_VISIBLE_DEVICES, and device to cuda",
            )
        self.dtype = pick_dtype(dtype, self.device)
        self.net: Hidden | None = None
        self._take(model, read_config(model.path))
        self.tokenizer_vocab = tokenizer_vocab
        self.batch_tokens, self.exact = batch_tokens, exact
        self.memory = memory / 2 if exact else memory
        self.engines: dict[Purpose, Engine] = {}
        self.at_ids: bool | None = None
        self.loads, self.distrust = 0, ""

    @property
    def capabilities(self) -> frozenset[str]:
        """Return those of `base.Scorer`; a first request shows if chosen ids are supported."""
        if self.exact:
            return frozenset({"top", "at_ids", "drawn", "entropy", "tail"})
        found = frozenset({"top", "entropy", "tail", "bounds"})
        if self.at_ids is None:
            self.at_ids = self.engine("score").answers_at_ids()
        return found | {"at_ids"} if self.at_ids else found

    def describe(self) -> dict[str, str]:
        """Return the same as `base.Sampler.describe`, with the runner of the scoring engine."""
        engine = self.engine("hidden" if self.exact else "score")
        return {
            "name": "vllm",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "vllm": engine.version,
            "torch": str(torch.__version__),
            "runner": engine.runner,
            "scoring": "hidden states" if self.exact else RETURNED,
        }

    def engine(self, purpose: Purpose) -> Engine:
        """Return the engine for a purpose, opened at its first use."""
        if purpose not in self.engines:
            self.engines[purpose] = Engine(
                self.path,
                purpose,
                dtype=self.dtype,
                on_cpu=self.device.type == "cpu",
                memory=self.memory,
            )
        return self.engines[purpose]

    def close(self) -> None:
        """Close all engines."""
        while self.engines:
            self.engines.popitem()[1].close()
        self.net = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        seed: int,
        version: int,
        progress: Progress = no_progress,
    ) -> Rollouts:
        """Sample as `base.Sampler.generate`; ConfigError for an unsupported distribution."""
        check_supported(sampling)
        check_room(prompts, sampling.max_new_tokens, self.context)
        engine = self.engine("sample")
        check_room(prompts, sampling.max_new_tokens, engine.context)
        of = [m for m in range(len(prompts)) for _ in range(sampling.n)]
        common = engine_params(sampling, self.config, self.n_vocab, self.stop_ids)
        params = [
            common
            | {
                "seed": sequence_seed(seed, prompts[m].id, i % sampling.n, version)
                & ((1 << 63) - 1)
            }
            for i, m in enumerate(of)
        ]
        progress("rollout", 0, len(of))
        outs = engine.sample(
            [prompts[m].token_ids for m in of],
            params,
            lambda finished: progress("rollout", finished, len(of)),
        )
        greedy = sampling.temperature == 0.0
        responses = [
            response_of(
                out.outputs[0], sampling, self.stop_ids, n_vocab=self.n_vocab, greedy=greedy
            )
            for out in outs
        ]
        return build_rollouts(prompts, of, responses, version)

    def score(
        self,
        rollouts: Rollouts,
        request: ScoreParams,
        extra_ids: IdLists | None = None,
        *,
        progress: Progress = no_progress,
    ) -> Scores:
        """Score as hf with exact=True; else with bounds.

        Raises as `resolve_extra_ids`, ConfigError for a request that this engine does not support,
        AnswerError for an invalid answer.
        """
        extra_ids = resolve_extra_ids(
            rollouts, request, extra_ids, n_vocab=self.n_vocab, context=self.context
        )
        if self.exact:
            return score_rollouts(
                self._network(),
                rollouts,
                request,
                extra_ids,
                batch_tokens=self.batch_tokens,
                progress=progress,
            )
        lacking = {"drawn"} if request.entry_kind == "sampled" else set()
        lacking |= {"at_ids"} - self.capabilities if extra_ids is not None else set()
        if lacking:
            raise ConfigError(
                f"vLLM {self.engine('score').version} with its {self.engine('score').runner} "
                f"runner does not support {', '.join(sorted(lacking))}",
                hint="score with exact=True or the backend hf, or request less (at_student=False)",
            )
        return self._score_returned(rollouts, request, extra_ids, progress)

    def _score_returned(
        self,
        rollouts: Rollouts,
        request: ScoreParams,
        extra_ids: IdLists | None,
        progress: Progress,
    ) -> Scores:
        """Score from returned top-k log-probs."""
        # vLLM samples one token more than it is sent.
        engine = self.engine("score")
        resolve_extra_ids(
            rollouts, request, extra_ids, n_vocab=self.n_vocab, context=engine.context - 1
        )
        assembler = ResponseAssembler(rollouts, request, extra_ids, n_vocab=self.n_vocab)
        lengths = rollouts.lengths()
        of_prompts = [rollouts.prompts[int(p)].token_ids for p in rollouts.seq_prompt]
        nonempty = [i for i in range(len(lengths)) if lengths[i] > 0]
        input_lengths = [len(of_prompts[i]) + int(lengths[i]) for i in nonempty]
        k, rows = min(request.k_max, self.n_vocab), 0
        for batch in budget_batches(input_lengths, self.batch_tokens):
            indices = [nonempty[b] for b in batch]
            sequences = [
                [*of_prompts[i], *rollouts.tokens[assembler.rows(i)].tolist()] for i in indices
            ]
            chosen = [assembler.extra_ids(i) for i in indices]
            returned = engine.prompt_logprobs(
                sequences, k, [None if x is None else to_matrix(x) for x in chosen]
            )
            for i, extra, (ids, lp, extra_lp) in zip(indices, chosen, returned, strict=True):
                own = slice(-int(lengths[i]), None)
                flat = None if extra is None or extra_lp is None else extra_lp[valid_mask(extra)]
                assembler.write(
                    i, ReturnedTopK(lp=lp[own, 0], ids=ids[own, 1:], top_lp=lp[own, 1:], at=flat)
                )
            rows += int(lengths[indices].sum())
            progress("score", rows, rollouts.positions)
        return assembler.scores()

    def _network(self) -> Hidden:
        """Return the network of hidden states, checked at opening against another engine."""
        if self.net is None:
            other: Purpose = "sample" if "sample" in self.engines else "score"
            keep = other in self.engines
            ids = probe_ids(self.n_vocab, self.context)
            returned = self._probe_logprobs(self.engine(other), ids)
            if not keep:
                self.engines.pop(other).close()
            net = Hidden(
                self.engine("hidden"),
                self.path,
                n_vocab=self.n_vocab,
                tokenizer_vocab=self.tokenizer_vocab,
                dtype=self.dtype,
                device=self.device,
            )
            net.check(ids, returned)
            self.net = net
        return self.net

    def _probe_logprobs(self, engine: Engine, ids: list[int]) -> tuple[Array, Array]:
        found, lp, _ = engine.prompt_logprobs([ids], engine.probe_best, [None])[0]
        return found, lp

    def reload(self, model: ModelRef, on_event: EventHandler = lambda line: None) -> None:
        """Take another version of this model, between two requests.

        Open engines load its weights in place where that is proved (backends.vllm.reload), else
        they close, and new ones open at their next use. on_event: called with the reason for that.
        """
        ids, config = probe_ids(self.n_vocab, self.context), read_config(model.path)
        why = self.distrust or config_change(self.config, config)
        loaded = {}
        if not why and model.digest != self.digest:
            try:
                for purpose, engine in self.engines.items():
                    loaded[purpose] = load_in_place(engine, model.path, ids)
            except LogitcaskError as error:
                why, loaded = error.cause, {}
            except BaseException:
                # An engine may hold weights of both.
                self.close()
                raise
        self._take(model, config)
        self.loads += bool(loaded)
        compared = bool(loaded) and is_compared(self.loads)
        if why or compared:
            self.close()
        if compared:
            faults = [differs(self.engine(each), ids, *loaded[each]) for each in loaded]
            why = self.distrust = next(filter(None, faults), "")
        if why:
            on_event(f"vLLM opens version {model.version} of {model.name} in a new engine: {why}")

    def _take(self, model: ModelRef, config: Mapping[str, Any]) -> None:
        self.path, self.n_vocab, self.stop_ids = model.path, model.n_vocab, model.stop_ids
        self.config, self.digest = config, model.digest
        self.context = context_length(model.path)
        self.net = None


def to_matrix(lists: IdLists) -> Array:
    """Return the ids as [R, A] int32, padded with NO_ID."""
    wide = np.full((len(lists.cnt), max(int(lists.cnt.max()), 1)), NO_ID, np.int32)
    wide[valid_mask(lists)] = lists.ids
    return wide


def valid_mask(lists: IdLists) -> Array:
    """Return [R, A] bool: True at the ids of `to_matrix`."""
    return np.arange(max(int(lists.cnt.max()), 1)) < lists.cnt[:, None]
