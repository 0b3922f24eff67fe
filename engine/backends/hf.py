"""The embedded backend: one transformers model that samples and scores, with all logits.

Logits are computed here from hidden states, for the response rows only, in float32 and over
[0, n_vocab). `models.check` proves at loading that they equal the model's own logits, and before
sampling that a cache does too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from logitcask.engine.backends.extra_ids import resolve_extra_ids
from logitcask.engine.backends.sampling import (
    Response,
    build_rollouts,
    check_room,
    sample_batch,
    uniforms,
)
from logitcask.engine.backends.scoring import (
    budget_batches,
    pieces_of,
    restrict_to_shared,
    score_rollouts,
)
from logitcask.engine.errors import ConfigError
from logitcask.engine.models.forward import NEVER, new_cache, rope_switch, states
from logitcask.engine.models.identity import config_dtype
from logitcask.engine.models.load import load_model, paths_of, set_paths
from logitcask.engine.models.logit_transform import logit_transform_of
from logitcask.engine.types import (
    BATCH_TOKENS,
    Array,
    Detail,
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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class HF:
    """A causal model of transformers as Sampler and Scorer. Not safe for use by several threads."""

    capabilities = frozenset({"top", "at_ids", "drawn", "entropy", "tail", "logits", "rows"})

    def __init__(
        self,
        model: ModelRef | Path | str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = BATCH_TOKENS,
        n_vocab: int | None = None,
        stop_ids: Iterable[int] | None = None,
        tokenizer_vocab: int | None = None,
        network: Any = None,
    ) -> None:
        """Load the model, or take `network` as it is.

        n_vocab, stop_ids: required with a plain folder; a ModelRef has them.
        tokenizer_vocab: number of ids of the model's own tokenizer, where n_vocab is the smaller
        number that it shares with a student; a row with a likely id outside n_vocab is rejected
        (`scoring.restrict_to_shared`).
        network: a loaded model, for example one in training, used in place of the folder's
        weights. Its train or eval mode is restored after each call, and its device is used.
        device: auto, cpu, cuda, cuda:0 ...; auto takes a GPU if there is one.
        dtype: auto, float32, bfloat16; of auto see `pick_dtype`.
        batch_tokens: padded tokens of one batch, prompt and room for the response included.
        Raises ModelError for weights that do not fit, and for a model that cannot score.
        """
        if isinstance(model, ModelRef):
            n_vocab = model.n_vocab if n_vocab is None else n_vocab
            stop_ids = model.stop_ids if stop_ids is None else stop_ids
        if n_vocab is None or stop_ids is None:
            raise ConfigError(
                f"n_vocab={n_vocab} and stop_ids={stop_ids} of {model} are not known",
                hint="give both, or a ModelRef, which holds them",
            )
        self._ref = model if isinstance(model, ModelRef) else Path(model)
        path = model.path if isinstance(model, ModelRef) else Path(model)
        self.n_vocab, self.stop_ids = n_vocab, tuple(sorted(stop_ids))
        self.batch_tokens = batch_tokens
        self.device = pick_device(device) if network is None else network.device
        # A network needs no folder.
        folder = path if network is None or (path / "config.json").exists() else None
        self.dtype = pick_dtype(dtype, self.device, folder)
        if network is None:
            network = load_model(path, self.dtype, self.device).requires_grad_(False)
        self.model = network
        config = self.model.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or NEVER)
        """Maximum number of tokens; unlimited if the config does not give it."""
        self._proved_length = -1
        self.check()
        self.switch = rope_switch(self.model.config)
        head = self.model.get_output_embeddings()
        self.logit_transform = logit_transform_of(self.model.config)
        rows = n_vocab if tokenizer_vocab is None else tokenizer_vocab
        self.weight = head.weight.detach()[:rows]
        self.bias = None if head.bias is None else head.bias.detach()[:rows].float()
        if self.device.type != "cuda":
            self.weight = self.weight.float()  # only CUDA multiplies bfloat16 into float32

    def describe(self) -> dict[str, str]:
        """Return name, dtype, device and package versions."""
        return {
            "name": "hf",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }

    def check(self, *paths: str, length: int = 0) -> None:
        """Prove the paths of the model, see `models.check`, for sequences of `length` tokens.

        Raises ModelError if it cannot score, or if one of `paths` is not right.
        """
        if length > self._proved_length:
            set_paths(self.model, self._ref, self.n_vocab, length=length)
            self._proved_length = length
        paths_of(self.model).require(*paths, of=self._ref)

    # The protocol sampling.Network.

    def new_cache(self) -> Any:
        """Return an empty cache."""
        return new_cache(self.model)

    def hidden(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        """Return the last hidden states [B, L, D].

        ids, positions: [B, L]; mask: [B, past + L].
        """
        # A model in training has float32 weights, also when it computes in bfloat16.
        with torch.autocast(self.device.type, self.dtype, enabled=self.model.dtype != self.dtype):
            if cache is not None and paths_of(self.model).equal_prompts:
                mask = None  # nothing is padded, and layers of linear attention misread it
            return states(self.model, ids, mask=mask, positions=positions, cache=cache)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Set the model to eval mode for a with block, then restore its mode."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [R, n_vocab] of hidden states [R, D], in float32.

        In bfloat16 the logits near rank 16 of most rows would be equal.
        """
        logits: Tensor
        if self.weight.dtype == torch.float32:
            logits = hidden.float() @ self.weight.T
        else:
            logits = torch.mm(hidden, self.weight.T, out_dtype=torch.float32)
        logits = self.logit_transform.apply(logits if self.bias is None else logits + self.bias)
        return restrict_to_shared(logits, self.n_vocab)

    # The protocols base.Sampler and base.Scorer.

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        seed: int,
        version: int,
        progress: Progress = no_progress,
    ) -> Rollouts:
        """Sample responses as `base.Sampler.generate`."""
        new = sampling.max_new_tokens
        check_room(prompts, new, self.context)
        longest = max((len(p.token_ids) for p in prompts), default=0) + new
        self.check("sampling", length=longest)
        of = [m for m in range(len(prompts)) for _ in range(sampling.n)]
        done: dict[int, Response] = {}
        begun = positions = 0  # sequences, and response tokens of finished batches

        def on_step(steps: int, running: int, sampled: int) -> None:
            running = running if steps < new else 0
            detail = Detail(positions + sampled, share=running * steps / new)
            progress("rollout", begun - running, len(of), detail)

        room = [len(prompts[m].token_ids) + new for m in of]
        groups = room if paths_of(self.model).equal_prompts else None
        progress("rollout", 0, len(of))
        for batch in budget_batches(room, self.batch_tokens, groups):
            begun += len(batch)
            draws = torch.stack(
                [uniforms(seed, prompts[of[i]].id, i % sampling.n, version, new) for i in batch]
            )
            inputs = [prompts[of[i]].token_ids for i in batch]
            with self.evaluating():
                responses = sample_batch(self, inputs, draws, sampling, self.stop_ids, on_step)
            done.update(zip(batch, responses, strict=True))
            positions += sum(len(response.ids) for response in responses)
        return build_rollouts(prompts, of, [done[i] for i in range(len(of))], version)

    def score(
        self,
        rollouts: Rollouts,
        request: ScoreParams,
        extra_ids: IdLists | None = None,
        *,
        rows: Array | None = None,
        progress: Progress = no_progress,
    ) -> Scores:
        """Score rollouts as `base.RowScorer.score`.

        Without extra ids log_tail is the mass outside the kept entries. Raises IdentityError for
        ids that this model does not have, ModelError for sequences beyond its context, ConfigError
        if the request has at_student and the rollouts hold no ids of the student.
        """
        extra_ids = resolve_extra_ids(
            rollouts, request, extra_ids, n_vocab=self.n_vocab, context=self.context
        )
        longest = max((piece.length for piece in pieces_of(rollouts, NEVER)), default=0)
        self.check(length=longest)
        with self.evaluating():
            return score_rollouts(
                self,
                rollouts,
                request,
                extra_ids,
                batch_tokens=self.batch_tokens,
                rows=rows,
                progress=progress,
            )


def pick_device(device: str) -> torch.device:
    """Return the device of a name; auto is the GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device={device!r} is no device", hint="use auto, cpu, cuda or cuda:N"
        ) from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device={device!r}, and this machine has no CUDA device", hint="use auto or cpu"
        )
    return picked


def pick_dtype(dtype: str, device: torch.device, folder: Path | None = None) -> torch.dtype:
    """Return the compute type of a name.

    auto is bfloat16 on a GPU. On a CPU it is bfloat16 where the config of the model in `folder`
    names that type and the CPU multiplies it by itself (AMX or AVX512-BF16); else float32.
    """
    if dtype == "auto":
        half = device.type == "cuda" or (
            folder is not None and multiplies_bfloat16() and config_dtype(folder) == "bfloat16"
        )
        return torch.bfloat16 if half else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}", hint=f"use one of: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products in bfloat16.

    False where torch is too old to list them.
    """
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
