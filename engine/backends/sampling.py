"""Sampling from a causal model: our own batched loop over its KV cache.

The law of a token is the model's softmax over [0, n_vocab) after the steps that `SamplingParams`
names, in the order of transformers' generate: repetition penalty, temperature, top-k, top-p, min-p.
Nothing else takes part; a model's generation_config is not read. A token is the inverse of that
law's distribution function at a uniform number of the sequence's own, so a sequence does not depend
on who shares its batch (up to the rounding of the forward pass).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from logitcask.engine.errors import ModelError, PromptError
from logitcask.engine.models.identity import canonical
from logitcask.engine.types import LENGTH, STOP, Prompt, Rollouts, SamplingParams


class Network(Protocol):
    """What sampling needs of a loaded model. Shapes: B sequences, L tokens, R rows."""

    device: torch.device

    def new_cache(self) -> Any: ...

    def hidden(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """[B, L] tokens, [B, past + L] mask, [B, L] positions -> [B, L, D]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, D] -> [R, n_vocab] float32, a tensor of the caller's own."""


@dataclass(frozen=True, slots=True)
class Response:
    ids: list[int]
    """As sampled, the stop token included."""
    b_lp: list[float]
    """Log-probs under the law sampled from, nats; 0 where decoding is greedy."""
    stopped: bool


def own_seed(seed: int, prompt: str, sample: int, version: int) -> int:
    """64 bits, signed, of one sequence's own: whatever else is sampled beside it."""
    key = hashlib.sha256(canonical([seed, prompt, sample, version])).digest()
    return int.from_bytes(key[:8], "little", signed=True)


def uniforms(seed: int, prompt: str, sample: int, version: int, count: int) -> Tensor:
    """[count] float64 in [0, 1): all the randomness of one sequence, on the CPU."""
    generator = torch.Generator().manual_seed(own_seed(seed, prompt, sample, version))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def law(sampling: SamplingParams) -> LogitsProcessorList:
    """Logits -> logits of the law that is sampled from; of greedy decoding: that is maximised."""
    steps: list[Any] = []
    if sampling.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0.0:
        if sampling.temperature != 1.0:
            steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            steps.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            steps.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0.0:
            steps.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList(steps)


def draw(scores: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling. scores [B, V], u [B] in [0, 1) -> ids [B], log-probs [B] float64."""
    log_p = scores.double().log_softmax(-1)
    p = log_p.exp()
    # A parallel prefix sum may rise by an ulp where p is zero; such an id must never be drawn.
    cdf = torch.where(p > 0, p.cumsum(-1), 0.0).cummax(-1).values
    ids = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)
    ids = ids.clamp(max=scores.shape[1] - 1)  # only NaN gets there; the caller finds it
    return ids[:, 0], log_p.gather(1, ids)[:, 0]


@torch.no_grad()
def sample_batch(
    net: Network,
    prompts: Sequence[Sequence[int]],
    draws: Tensor,
    sampling: SamplingParams,
    stop_ids: Sequence[int],
) -> list[Response]:
    """One response to each prompt. draws: [B, max_new_tokens] uniform numbers.

    Raises ModelError where the model's logits are not numbers.
    """
    new = sampling.max_new_tokens
    length = max(map(len, prompts))
    # Padding on the left repeats the prompt's first token: attention does not see it, and a
    # repetition penalty, which looks at ids alone, meets no id that the prompt does not hold.
    ids = torch.tensor([[p[0]] * (length - len(p)) + list(p) for p in prompts])
    ids = torch.cat([ids, ids.new_zeros(len(prompts), new)], 1).to(net.device)  # [B, L + new]
    pad = torch.tensor([length - len(p) for p in prompts], device=net.device)
    column = torch.arange(length + new, device=net.device)
    mask = (column >= pad[:, None]).long()
    positions = (column - pad[:, None]).clamp(min=0)
    draws, stops = draws.to(net.device), torch.tensor(stop_ids, device=net.device)
    steps, greedy = law(sampling), sampling.temperature == 0.0

    b_lp = torch.zeros(len(prompts), new, device=net.device)
    tokens = torch.zeros(len(prompts), new, dtype=torch.int64, device=net.device)
    lengths = torch.full((len(prompts),), new, device=net.device)
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=net.device)
    # Rows of the running batch: which sequence each is, and whether it has finished.
    row = torch.arange(len(prompts), device=net.device)
    done = torch.zeros_like(stopped)
    cache, past = net.new_cache(), 0
    for t in range(new):
        end = length + t
        last = net.hidden(ids[:, past:end], mask[:, :end], positions[:, past:end], cache)[:, -1]
        scores = net.logits(last)
        check(scores)
        scores = steps(cast(torch.LongTensor, ids[:, :end]), scores)
        if greedy:
            token, lp = scores.argmax(-1), torch.zeros(len(row), device=net.device)
        else:
            token, lp = draw(scores, draws[row, t])
        ids[:, end], past = token, end
        live = row[~done]
        tokens[live, t], b_lp[live, t] = token[~done], lp[~done].float()
        ended = torch.isin(token, stops) & ~done
        lengths[row[ended]], stopped[row[ended]] = t + 1, True
        done |= ended
        if done.all():
            break
        if 2 * int(done.sum()) >= len(done):
            keep = (~done).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            ids, mask, positions = ids[keep], mask[keep], positions[keep]
            row, done = row[keep], done[keep]
    return [
        Response(i[:n], lp[:n], s)
        for i, lp, n, s in zip(
            tokens.tolist(), b_lp.tolist(), lengths.tolist(), stopped.tolist(), strict=True
        )
    ]


def check_room(prompts: Sequence[Prompt], new: int, context: int) -> None:
    """Raises PromptError for a prompt that leaves no room for `new` tokens."""
    for prompt in prompts:
        if len(prompt.token_ids) + new > context:
            raise PromptError(
                f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens, and with "
                f"max_new_tokens={new} that is more than the model's context of {context}",
                hint="Lower max_new_tokens, or leave out the long prompts.",
            )


def rolled(
    prompts: Sequence[Prompt], of: Sequence[int], responses: Sequence[Response], version: int
) -> Rollouts:
    """of: [N] which prompt each of the N responses answers."""
    lengths = [len(r.ids) for r in responses]
    positions = sum(lengths)
    return Rollouts(
        prompts=tuple(prompts),
        seq_prompt=np.array(of, np.uint32),
        seq_off=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tokens=np.fromiter((t for r in responses for t in r.ids), np.uint32, positions),
        loss_mask=np.ones(positions, np.uint16),
        b_lp=np.fromiter((x for r in responses for x in r.b_lp), np.float32, positions),
        finish=np.array([STOP if r.stopped else LENGTH for r in responses], np.uint16),
        version_start=np.full(len(of), version, np.int64),
        version_end=np.full(len(of), version, np.int64),
    )


def check(logits: Tensor) -> None:
    """Raises ModelError where a row of logits has no finite maximum."""
    if not logits.amax(-1).isfinite().all():
        raise ModelError(
            "the model's logits hold NaN or infinity",
            hint="Its weights are damaged, or its dtype is too narrow for it: try float32.",
        )
