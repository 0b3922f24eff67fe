"""vLLM in this process: rollouts, and scores from the log-probs that it tells or, exactly, from its
hidden states.

vLLM samples by its own random numbers, of one seed a sequence, and takes min-p before top-p, so
both at once are refused: everywhere else the law is that of backends.sampling, to rounding.

What it tells of a prompt is the K best ids of every row and, by its second runner, the log-probs at
ids that it was asked at: tail and entropy are then bounds (backends.answers). With exact=True
everything comes from hidden states (backends.vllm_hidden): what a student's own scores need.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcask.engine.backends.hf import load, pick_device, pick_dtype
from logitcask.engine.backends.returned import Answer, ResponseAssembler, wrong
from logitcask.engine.backends.sampling import Response, check_room, own_seed, rolled
from logitcask.engine.backends.scoring import asked_ids, budget_batches, score_rollouts
from logitcask.engine.backends.vllm.engine import (
    NO_ID,
    PROBE_BEST,
    TOLERANCE,
    Engine,
    Purpose,
    best_gap,
    probe_ids,
)
from logitcask.engine.backends.vllm.hidden import Hidden
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.models.identity import context_length, from_config, read_config
from logitcask.engine.types import (
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

COLDEST = 0.01
"""The least temperature above 0 that vLLM samples at; it raises lower ones to this."""
MOST_BANNED = 1024
"""Ids of a padded head that vLLM can keep a request from sampling."""


class VLLM:
    """A causal model in vLLM as Sampler and Scorer. Not safe for use by several threads.

    An engine to sample and one to score are opened when they are first needed, and closed by
    close(). Each is a copy of the weights.
    """

    def __init__(
        self,
        model: ModelRef,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = 16384,
        exact: bool = False,
        known: int | None = None,
        memory: float = 0.8,
    ) -> None:
        """batch_tokens: padded tokens that the scoring engine is handed at once. known: as of HF.
        exact: score from hidden states, and say everything that hf says.
        memory: share of a GPU that the engines may fill: with exact=True half of it each, as a
        student's do that rolls out and scores; otherwise all of it the one that is opened.
        """
        self.device = pick_device(device)
        if self.device.index:
            raise ConfigError(
                f"device={device!r}, and vLLM takes the first GPU that it sees",
                hint="Set CUDA_VISIBLE_DEVICES, and device to cuda.",
            )
        self.dtype = pick_dtype(dtype, self.device)
        self.path, self.n_vocab, self.stop_ids = model.path, model.n_vocab, model.stop_ids
        self.known = known
        self.batch_tokens, self.exact = batch_tokens, exact
        self.memory = memory / 2 if exact else memory
        self.engines: dict[Purpose, Engine] = {}
        self.net: Hidden | None = None
        self.at_ids: bool | None = None

    @property
    def capabilities(self) -> frozenset[str]:
        """As of a Scorer; whether it can be asked at ids is found out by asking."""
        if self.exact:
            return frozenset({"top", "at_ids", "drawn", "entropy", "tail"})
        told = frozenset({"top", "entropy", "tail", "bounds"})
        if self.at_ids is None:
            self.at_ids = self.engine("score").answers_at_ids()
        return told | {"at_ids"} if self.at_ids else told

    def describe(self) -> dict[str, str]:
        """As of a Sampler; opens the engine that scores, whose runner it names."""
        engine = self.engine("hidden" if self.exact else "score")
        return {
            "name": "vllm",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "vllm": engine.version,
            "torch": str(torch.__version__),
            "runner": engine.runner,
            "scoring": "hidden states" if self.exact else "told log-probs",
        }

    def engine(self, purpose: Purpose) -> Engine:
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
        """Raises ConfigError for a law that vLLM does not sample from."""
        check_law(sampling)
        check_room(prompts, sampling.max_new_tokens, context_length(self.path))
        engine = self.engine("sample")
        check_room(prompts, sampling.max_new_tokens, engine.context)
        of = [m for m in range(len(prompts)) for _ in range(sampling.n)]
        same = self._sampling(sampling)
        wanted = [
            same
            | {"seed": own_seed(seed, prompts[m].id, i % sampling.n, version) & ((1 << 63) - 1)}
            for i, m in enumerate(of)
        ]
        progress("rollout", 0, len(of))
        outs = engine.sample([prompts[m].token_ids for m in of], wanted)
        progress("rollout", len(of), len(of))
        greedy = sampling.temperature == 0.0
        responses = [self._response(out.outputs[0], sampling, greedy) for out in outs]
        return rolled(prompts, of, responses, version)

    def _sampling(self, sampling: SamplingParams) -> dict[str, Any]:
        """Every field that has a say in the law; none is left to a default."""
        wanted: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": 0,
            "stop_token_ids": list(self.stop_ids),
            "ignore_eos": True,
        }
        # A padded head knows ids that nobody has; a bias a padded id is what keeping them away
        # costs, one addition of them all a step.
        rows = from_config(read_config(self.path), "vocab_size")
        banned = range(self.n_vocab, rows if isinstance(rows, int) else self.n_vocab)
        if len(banned) > MOST_BANNED:
            raise ConfigError(
                f"the head of {self.path} has {len(banned)} ids that its tokenizer has not, and "
                f"vLLM can keep away {MOST_BANNED}",
                hint="Roll out with the backend hf, or cut the head to the tokenizer's ids.",
            )
        return wanted | ({"logit_bias": dict.fromkeys(banned, float("-inf"))} if banned else {})

    def _response(self, out: Any, sampling: SamplingParams, greedy: bool) -> Response:
        ids = list(out.token_ids)
        stopped = bool(ids) and ids[-1] in self.stop_ids
        whole = stopped or len(ids) == sampling.max_new_tokens
        if not whole or out.logprobs is None or list(out.logprobs.token_ids[: len(ids)]) != ids:
            wrong(f"{len(ids)} tokens that end by {out.finish_reason!r}, or no log-probs of them")
        lp = [0.0] * len(ids) if greedy else list(out.logprobs.logprobs)
        if max(ids) >= self.n_vocab or not all(-np.inf < x <= 1e-3 for x in lp):
            wrong(f"a sampled id of {max(ids)} and log-probs from {min(lp)} to {max(lp)}")
        return Response(ids, [min(x, 0.0) for x in lp], stopped)

    def score(self, rollouts: Rollouts, request: ScoreParams, at: IdLists | None = None) -> Scores:
        """As hf scores, with exact=True; else with bounds. Raises what `asked_ids` does,
        ConfigError for what this engine cannot be asked, AnswerError for what it cannot mean."""
        context = context_length(self.path)
        at = asked_ids(rollouts, request, at, n_vocab=self.n_vocab, context=context)
        if self.exact:
            net = self._network()
            return score_rollouts(net, rollouts, request, at, batch_tokens=self.batch_tokens)
        lacking = {"drawn"} if request.entry_kind == "sampled" else set()
        lacking |= {"at_ids"} - self.capabilities if at is not None else set()
        if lacking:
            raise ConfigError(
                f"vLLM {self.engine('score').version} with its {self.engine('score').runner} "
                f"runner gives no {', '.join(sorted(lacking))}",
                hint="Score with exact=True or the backend hf, or ask for less (at_student=False).",
            )
        return self._told(rollouts, request, at)

    def _told(self, rollouts: Rollouts, request: ScoreParams, at: IdLists | None) -> Scores:
        # vLLM scores no sequence without making one token more.
        engine = self.engine("score")
        asked_ids(rollouts, request, at, n_vocab=self.n_vocab, context=engine.context - 1)
        sheet = ResponseAssembler(rollouts, request, at, n_vocab=self.n_vocab)
        lengths = rollouts.lengths()
        of_prompts = [rollouts.prompts[int(p)].token_ids for p in rollouts.seq_prompt]
        answered = [i for i in range(len(lengths)) if lengths[i] > 0]
        fed = [len(of_prompts[i]) + int(lengths[i]) for i in answered]
        k = min(request.k_max, self.n_vocab)
        for batch in budget_batches(fed, self.batch_tokens):
            which = [answered[b] for b in batch]
            sequences = [[*of_prompts[i], *rollouts.tokens[sheet.rows(i)].tolist()] for i in which]
            lists = [sheet.asked(i) for i in which]
            told = engine.tell(sequences, k, [None if x is None else rectangle(x) for x in lists])
            for i, asked, (ids, lp, at_lp) in zip(which, lists, told, strict=True):
                own = slice(-int(lengths[i]), None)
                flat = None if asked is None or at_lp is None else at_lp[inside(asked)]
                sheet.write(i, Answer(lp=lp[own, 0], ids=ids[own, 1:], top_lp=lp[own, 1:], at=flat))
        return sheet.scores()

    def _network(self) -> Hidden:
        """Proved when it is opened: by the sampling engine, or by one that is there for the proof
        alone."""
        if self.net is None:
            other: Purpose = "sample" if "sample" in self.engines else "score"
            kept = other in self.engines
            ids = self._probe()
            told = self._tell(self.engine(other), ids)
            if not kept:
                self.engines.pop(other).close()
            net = Hidden(
                self.engine("hidden"),
                self.path,
                n_vocab=self.n_vocab,
                known=self.known,
                dtype=self.dtype,
                device=self.device,
            )
            net.prove(ids, told)
            self.net = net
        return self.net

    def _probe(self) -> list[int]:
        return probe_ids(self.n_vocab, context_length(self.path))

    def _tell(self, engine: Engine, ids: list[int]) -> tuple[Array, Array]:
        told, lp, _ = engine.tell([ids], min(PROBE_BEST, self.n_vocab), [None])[0]
        return told, lp

    def update_weights(self, folder: Path) -> None:
        """Other weights of the same model, a student's after a round, for all that is open.

        Raises IdentityError where an engine does not say of a probe what the folder's model says.
        """
        purposes = list(self.engines)
        self.path = folder
        if reloads_in_place(self.device):
            for engine in self.engines.values():
                engine.reload(folder)
        else:
            self.close()
        self.net = None
        ids = self._probe()
        with torch.no_grad():
            model = load(folder, self.dtype, torch.device("cpu"))
            logits = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        reference = logits.float().log_softmax(1).numpy()
        for purpose in purposes:
            if purpose == "hidden":
                exact = self._network().log_probs(ids)
                told = np.argsort(-exact, axis=1)[:, : PROBE_BEST + 1]
                gap = best_gap((told, np.take_along_axis(exact, told, 1)), reference)
            else:
                gap = best_gap(self._tell(self.engine(purpose), ids), reference)
            if not gap <= TOLERANCE[self.dtype]:
                raise IdentityError(
                    f"after an update of its weights vLLM differs from {folder} by {gap:.1e} nats "
                    f"on a probe, {TOLERANCE[self.dtype]:.1e} are allowed",
                    hint="Open the backend anew from the folder, or use the backend hf.",
                )


def reloads_in_place(device: torch.device) -> bool:
    """Not on a CPU: there vLLM keeps a packed copy of the head, and of a tied one only the
    embedding would be new. A new engine takes two seconds."""
    return device.type != "cpu"


def check_law(sampling: SamplingParams) -> None:
    """Raises ConfigError for what vLLM would do otherwise than it is written in SamplingParams."""
    if 0.0 < sampling.temperature < COLDEST:
        raise ConfigError(
            f"temperature={sampling.temperature}, and vLLM samples at {COLDEST} or more, or at 0",
            hint=f"Set it to 0 or to at least {COLDEST}, or use the backend hf.",
        )
    if sampling.temperature > 0.0 and sampling.min_p > 0.0 and sampling.top_p < 1.0:
        raise ConfigError(
            f"min_p={sampling.min_p} and top_p={sampling.top_p}: vLLM takes min-p first, and we "
            "top-p",
            hint="Set one of them, or use the backend hf.",
        )


def rectangle(lists: IdLists) -> Array:
    """[R, A] int32, the ids of R rows, NO_ID behind those of shorter rows."""
    wide = np.full((len(lists.cnt), max(int(lists.cnt.max()), 1)), NO_ID, np.int32)
    wide[inside(lists)] = lists.ids
    return wide


def inside(lists: IdLists) -> Array:
    """[R, A] bool: where `rectangle` holds ids."""
    return np.arange(max(int(lists.cnt.max()), 1)) < lists.cnt[:, None]
