"""The embedded backend: one model in transformers that both samples and scores, everything exact.

Logits are made by ourselves from hidden states, for the rows that are wanted, in float32 and over
[0, n_vocab). That this is what the model would say is proved on a probe when it is loaded; a head
that does more than a matrix product and a bias is refused.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from logitcask.engine.backends.sampling import Response, check_room, rolled, sample_batch, uniforms
from logitcask.engine.backends.scoring import asked_ids, budget_batches, of_shared, score_rollouts
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.models.logit_transform import logit_transform_of, named_extras
from logitcask.engine.types import (
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
PROBE_TOKENS = 32
PROBE_TOLERANCE = 1e-3
"""Of the largest logit; both sides of the probe are products in the model's own dtype."""


class HF:
    """A causal model of transformers as Sampler and Scorer. Not safe for use by several threads."""

    capabilities = frozenset({"top", "at_ids", "drawn", "entropy", "tail", "logits"})

    def __init__(
        self,
        model: ModelRef | Path | str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = 16384,
        n_vocab: int | None = None,
        stop_ids: Iterable[int] | None = None,
        known: int | None = None,
        network: Any = None,
    ) -> None:
        """n_vocab and stop_ids are a ModelRef's own; beside a plain folder they must be given.

        known: ids that its tokenizer has, where a student has fewer, n_vocab: a row that holds one
        of the others for likely is refused (`scoring.of_shared`).

        network: a loaded model, in training say, to be used as it is at each call, instead of the
        folder's weights; it goes back to the mode that it was in, and its device counts.

        device: auto, cpu, cuda, cuda:0 ...; auto takes a GPU where there is one.
        dtype: auto, float32, bfloat16; auto is float32 on a CPU and bfloat16 on a GPU.
        batch_tokens: padded tokens of one batch, prompt and room for the response included.
        Raises ModelError for weights that do not fit or a head that is more than a product.
        """
        if isinstance(model, ModelRef):
            n_vocab = model.n_vocab if n_vocab is None else n_vocab
            stop_ids = model.stop_ids if stop_ids is None else stop_ids
        if n_vocab is None or stop_ids is None:
            raise ConfigError(
                f"n_vocab={n_vocab} and stop_ids={stop_ids} of {model} are not known",
                hint="Give both, or a ModelRef, which holds them.",
            )
        path = model.path if isinstance(model, ModelRef) else Path(model)
        self.n_vocab, self.stop_ids = n_vocab, tuple(sorted(stop_ids))
        self.batch_tokens = batch_tokens
        self.device = pick_device(device) if network is None else network.device
        self.dtype = pick_dtype(dtype, self.device)
        self.model = load(path, self.dtype, self.device) if network is None else network
        config = self.model.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or 1 << 62)
        """Tokens that the model can attend to; unlimited where its config does not say."""
        head = self.model.get_output_embeddings()
        prove_head(self.model, head, path, n_vocab)
        self.logit_transform = logit_transform_of(self.model.config)
        rows = n_vocab if known is None else known
        self.weight = head.weight.detach()[:rows]
        self.bias = None if head.bias is None else head.bias.detach()[:rows].float()
        if self.device.type != "cuda":
            self.weight = self.weight.float()  # only CUDA multiplies bfloat16 into float32

    def describe(self) -> dict[str, str]:
        return {
            "name": "hf",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }

    # The network, as sampling and scoring see it.

    def new_cache(self) -> Any:
        return transformers.DynamicCache(config=self.model.config)

    def hidden(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """[B, L] tokens, [B, past + L] mask, [B, L] positions -> [B, L, D] last hidden states."""
        # A model in training has float32 weights, whatever it computes in.
        with torch.autocast(self.device.type, self.dtype, enabled=self.model.dtype != self.dtype):
            states: Tensor = self.model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        return states

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout and the like; a model in training is then put back to it."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, D] -> [R, n_vocab] float32: bfloat16 ones would tie near the 16th of most rows."""
        logits: Tensor
        if self.weight.dtype == torch.float32:
            logits = hidden.float() @ self.weight.T
        else:
            logits = torch.mm(hidden, self.weight.T, out_dtype=torch.float32)
        logits = self.logit_transform.apply(logits if self.bias is None else logits + self.bias)
        return of_shared(logits, self.n_vocab)

    # The backend.

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        seed: int,
        version: int,
        progress: Progress = no_progress,
    ) -> Rollouts:
        new = sampling.max_new_tokens
        check_room(prompts, new, self.context)
        of = [m for m in range(len(prompts)) for _ in range(sampling.n)]
        done: dict[int, Response] = {}
        room = [len(prompts[m].token_ids) + new for m in of]
        for batch in budget_batches(room, self.batch_tokens):
            progress("rollout", len(done), len(of))
            draws = torch.stack(
                [uniforms(seed, prompts[of[i]].id, i % sampling.n, version, new) for i in batch]
            )
            asked = [prompts[of[i]].token_ids for i in batch]
            with self.evaluating():
                answers = sample_batch(self, asked, draws, sampling, self.stop_ids)
            done.update(zip(batch, answers, strict=True))
        progress("rollout", len(of), len(of))
        return rolled(prompts, of, [done[i] for i in range(len(of))], version)

    def score(self, rollouts: Rollouts, request: ScoreParams, at: IdLists | None = None) -> Scores:
        """Asked at no ids, log_tail is what lies outside the kept entries alone.

        Raises IdentityError for ids that this model does not have, ModelError for sequences
        beyond its context, ConfigError if the student's ids are asked for and not there.
        """
        at = asked_ids(rollouts, request, at, n_vocab=self.n_vocab, context=self.context)
        with self.evaluating():
            return score_rollouts(self, rollouts, request, at, batch_tokens=self.batch_tokens)


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device={device!r} is no device", hint="Use auto, cpu, cuda or cuda:N."
        ) from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device={device!r}, and this machine has no CUDA device", hint="Use auto or cpu."
        )
    return picked


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}", hint=f"Use one of: auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def load(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in evaluation mode; ModelError where weights are missing or cannot be read."""
    log: Any = transformers.logging
    factory: Any = transformers.AutoModelForCausalLM
    bars = log.is_progress_bar_enabled()
    log.disable_progress_bar()  # the engine never prints
    try:
        model, report = factory.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    # transformers raises OSError, ValueError, KeyError, RuntimeError or safetensors' own.
    except Exception as error:
        raise ModelError(
            f"the model in {path} cannot be loaded: {type(error).__name__}: {error}",
            hint="Give a folder of a causal language model, made by save_pretrained.",
        ) from error
    finally:
        if bars:
            log.enable_progress_bar()
    missing = sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])})
    if missing:
        raise ModelError(
            f"the weights in {path} lack {len(missing)} tensors of its config: {missing[0]} ...",
            hint="Take weights and config.json from the same model.",
        )
    return model.requires_grad_(False).eval().to(device)


@torch.no_grad()  # inference tensors would stay behind in a model that trains
def prove_head(model: Any, head: Any, path: Path, n_vocab: int) -> None:
    """ModelError unless logits are hidden states times the head's weight, plus its bias, with the
    scale and the soft cap that its configuration names.
    """
    named = named_extras(model.config)
    why = f"; config.json says {', '.join(named)}" if named else ""
    if not isinstance(head, nn.Linear) or head.weight.shape[0] < n_vocab:
        raise ModelError(
            f"the head of {path} is {head}, not a linear map onto at least {n_vocab} ids",
            hint="Use a model with a plain language-model head.",
        )
    ids = (torch.arange(PROBE_TOKENS, device=model.device) * 7919 % n_vocab)[None]
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    product = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    ours = logit_transform_of(model.config).apply(product)
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
    if not gap <= PROBE_TOLERANCE:
        raise ModelError(
            f"the head of {path} does more than a product, a bias, a scale and a soft cap: its "
            f"logits differ from that by {gap:.1e} of the largest{why}",
            hint="Such heads are not supported; use a model with a plain language-model head.",
        )
