"""Sampling from a causal model: our own batched loop over its KV cache.

The distribution of a token is the model's softmax over [0, n_vocab) after the steps of
`SamplingParams`, in the order of transformers' generate: repetition penalty, temperature, top-k,
top-p, min-p. There are no other steps, and of a model's generation_config only its stop ids are
used. A token is drawn by the inverse of its cumulative distribution at a uniform number. Each
sequence has its own uniform numbers, so it does not depend on its batch (up to the rounding of the
forward pass).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from logitcask.engine.errors import ModelError, PromptError
from logitcask.engine.models.forward import select_rows
from logitcask.engine.models.identity import canonical
from logitcask.engine.types import LENGTH, STOP, Prompt, Rollouts, SamplingParams

BLOCK = 512
"""Ids of a block in the search for a drawn id."""


class Network(Protocol):
    """A loaded model, as sampling and scoring use it. B sequences, L tokens, R rows."""

    device: torch.device
    switch: int
    """Longest sequence with LongRoPE's short factors; beyond it a cache is computed again."""

    def new_cache(self) -> Any:
        """Return an empty KV cache."""

    def hidden(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Return hidden states [B, L, D]; ids, positions: [B, L]; mask: [B, past + L]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [R, n_vocab] float32 of [R, D]; the caller may overwrite them."""


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled sequence."""

    ids: list[int]
    """As sampled, the stop token included."""
    b_lp: list[float]
    """Log-probs under the distribution sampled from, nats; 0 for greedy decoding."""
    stopped: bool


def sequence_seed(seed: int, prompt: str, sample: int, version: int) -> int:
    """Return the seed of one sequence: 64 bits, signed, independent of other sequences."""
    key = hashlib.sha256(canonical([seed, prompt, sample, version])).digest()
    return int.from_bytes(key[:8], "little", signed=True)


def uniforms(seed: int, prompt: str, sample: int, version: int, count: int) -> Tensor:
    """Return [count] float64 in [0, 1): all random numbers of one sequence, on the CPU."""
    generator = torch.Generator().manual_seed(sequence_seed(seed, prompt, sample, version))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def distribution(sampling: SamplingParams) -> LogitsProcessorList:
    """Return the steps from logits to those that are sampled from, or maximised if greedy."""
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


def draw(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw by the inverse CDF: logits [B, V], u [B] in [0, 1) -> ids [B], log-probs [B].

    First a block of BLOCK ids by the masses of all blocks, then an id in it: sums in float64, and
    the whole vocabulary only in float32. Logits that are not finite give a log-prob that is not.
    """
    log_z = logits.logsumexp(-1, keepdim=True)
    p = (logits - log_z).exp_()
    blocks = nn.functional.pad(p, (0, -p.shape[1] % BLOCK)).view(len(p), -1, BLOCK)
    mass = blocks.sum(-1, dtype=torch.float64)
    target = u * mass.sum(-1)
    block, before = _first_beyond(mass, target)
    inside = blocks[torch.arange(len(p), device=p.device), block].double()
    place, _ = _first_beyond(inside, target - before)
    # Beyond the last id only for NaN, which the caller rejects.
    ids = (block * BLOCK + place)[:, None].clamp(max=logits.shape[1] - 1)
    return ids[:, 0], (logits.gather(1, ids) - log_z)[:, 0]


def _first_beyond(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first index [B] at which the sum of mass [B, N] exceeds target [B], and the sum
    before it; the last index with a mass where rounding leaves none.
    """
    total = mass.cumsum(-1)
    # A parallel prefix sum may rise by an ulp where the mass is zero; such an id must not be drawn.
    beyond = (total > target[:, None]) & (mass > 0)
    last = mass.shape[1] - 1 - (mass > 0).flip(-1).int().argmax(-1)
    index = torch.where(beyond.any(-1), beyond.int().argmax(-1), last)[:, None]
    return index[:, 0], (total - mass).gather(1, index)[:, 0]


@torch.no_grad()
def sample_batch(
    net: Network,
    prompts: Sequence[Sequence[int]],
    draws: Tensor,
    sampling: SamplingParams,
    stop_ids: Sequence[int],
    on_step: Callable[[int, int, int], None] = lambda step, running, sampled: None,
) -> list[Response]:
    """Sample one response to each prompt. draws: [B, max_new_tokens] uniform numbers.

    on_step: called after each step with (steps, running sequences, tokens of all sequences).
    Raises ModelError for logits that are not finite.
    """
    new = sampling.max_new_tokens
    length = max(map(len, prompts))
    # Padding on the left repeats the prompt's first token: the mask hides it from attention, and
    # a repetition penalty, which reads all ids, sees no id that is not in the prompt.
    ids = torch.tensor([[p[0]] * (length - len(p)) + list(p) for p in prompts])
    ids = torch.cat([ids, ids.new_zeros(len(prompts), new)], 1).to(net.device)  # [B, L + new]
    pad = torch.tensor([length - len(p) for p in prompts], device=net.device)
    column = torch.arange(length + new, device=net.device)
    mask = (column >= pad[:, None]).long()
    positions = (column - pad[:, None]).clamp(min=0)
    draws, stops = draws.to(net.device), torch.tensor(stop_ids, device=net.device)
    steps, greedy = distribution(sampling), sampling.temperature == 0.0

    b_lp = torch.zeros(len(prompts), new, device=net.device)
    tokens = torch.zeros(len(prompts), new, dtype=torch.int64, device=net.device)
    lengths = torch.full((len(prompts),), new, device=net.device)
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=net.device)
    # Per row of the running batch: the index of its sequence, and True if it has finished.
    row = torch.arange(len(prompts), device=net.device)
    done = torch.zeros_like(stopped)
    cache, past, sampled = net.new_cache(), 0, 0
    for t in range(new):
        end = length + t
        if past <= net.switch < end:
            cache, past = net.new_cache(), 0
        last = net.hidden(ids[:, past:end], mask[:, :end], positions[:, past:end], cache)[:, -1]
        logits = steps(cast(torch.LongTensor, ids[:, :end]), net.logits(last))
        if greedy:
            value, token = logits.max(-1)
            lp = value - value
        else:
            token, lp = draw(logits, draws[row, t])
        check_finite(lp)
        ids[:, end], past = token, end
        running = row[~done]
        tokens[running, t], b_lp[running, t] = token[~done], lp[~done].float()
        ended = torch.isin(token, stops) & ~done
        lengths[row[ended]], stopped[row[ended]] = t + 1, True
        done |= ended
        sampled += len(running)
        left = len(done) - int(done.sum())
        on_step(t + 1, left, sampled)
        if not left:
            break
        if 2 * left <= len(done):
            keep = (~done).nonzero()[:, 0]
            select_rows(cache, keep)
            ids, mask, positions = ids[keep], mask[keep], positions[keep]
            row, done = row[keep], done[keep]
    return [
        Response(i[:n], lp[:n], s)
        for i, lp, n, s in zip(
            tokens.tolist(), b_lp.tolist(), lengths.tolist(), stopped.tolist(), strict=True
        )
    ]


def check_room(prompts: Sequence[Prompt], new: int, context: int) -> None:
    """Raise PromptError for a prompt that leaves no room for `new` tokens."""
    for prompt in prompts:
        if len(prompt.token_ids) + new > context:
            raise PromptError(
                f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens, and with "
                f"max_new_tokens={new} this is more than the model's context of {context}",
                hint="lower max_new_tokens, or leave out the long prompts",
            )


def build_rollouts(
    prompts: Sequence[Prompt], of: Sequence[int], responses: Sequence[Response], version: int
) -> Rollouts:
    """Build rollouts of N responses; of: [N] index of each response's prompt."""
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


def check_finite(lp: Tensor) -> None:
    """Raise ModelError for log-probs [B] that are not finite, as those of logits that are not."""
    if not lp.isfinite().all():
        raise ModelError(
            "the model's logits hold NaN or infinity",
            hint="try float32, or load the weights again: they may be damaged",
        )
