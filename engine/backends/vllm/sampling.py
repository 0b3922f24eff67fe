"""Sampling with vLLM: its parameters for ours, and the responses of its answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from logitcask.engine.backends.returned import reject_answer
from logitcask.engine.backends.sampling import Response
from logitcask.engine.errors import ConfigError
from logitcask.engine.models.identity import from_config
from logitcask.engine.types import SamplingParams

COLDEST = 0.01
"""The lowest temperature above 0 of vLLM; it raises lower ones to this."""
MOST_BANNED = 1024
"""Maximum number of ids that vLLM can exclude from sampling."""


def check_supported(sampling: SamplingParams) -> None:
    """Raise ConfigError for parameters that vLLM applies differently from SamplingParams."""
    if 0.0 < sampling.temperature < COLDEST:
        raise ConfigError(
            f"temperature={sampling.temperature}, and vLLM samples at {COLDEST} or more, or at 0",
            hint=f"set it to 0 or to at least {COLDEST}, or use the backend hf",
        )
    if sampling.temperature > 0.0 and sampling.min_p > 0.0 and sampling.top_p < 1.0:
        raise ConfigError(
            f"min_p={sampling.min_p} and top_p={sampling.top_p}: vLLM applies min-p first, and "
            "the other backends top-p",
            hint="set one of them, or use the backend hf",
        )


def engine_params(
    sampling: SamplingParams, config: Mapping[str, Any], n_vocab: int, stop_ids: Sequence[int]
) -> dict[str, Any]:
    """Return every sampling field explicitly, so that no default of vLLM applies.

    config: config.json of the model.
    Raises ConfigError for a head with more padded ids than vLLM can exclude.
    """
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": 0,
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,
    }
    # The ids of a padded head are excluded by a logit bias of -inf.
    rows = from_config(config, "vocab_size")
    banned = range(n_vocab, rows if isinstance(rows, int) else n_vocab)
    if len(banned) > MOST_BANNED:
        raise ConfigError(
            f"the head of the model has {len(banned)} ids that its tokenizer lacks, and vLLM can "
            f"exclude {MOST_BANNED}",
            hint="roll out with the backend hf, or cut the head to the tokenizer's ids",
        )
    return params | ({"logit_bias": dict.fromkeys(banned, float("-inf"))} if banned else {})


def response_of(
    out: Any, sampling: SamplingParams, stop_ids: Sequence[int], *, n_vocab: int, greedy: bool
) -> Response:
    """Return the response of one output; AnswerError for one that is not whole."""
    ids = list(out.token_ids)
    stopped = bool(ids) and ids[-1] in stop_ids
    complete = stopped or len(ids) == sampling.max_new_tokens
    if not complete or out.logprobs is None or list(out.logprobs.token_ids[: len(ids)]) != ids:
        reject_answer(
            f"{len(ids)} tokens with finish reason {out.finish_reason!r}, or no log-probs of them"
        )
    lp = [0.0] * len(ids) if greedy else list(out.logprobs.logprobs)
    if max(ids) >= n_vocab or not all(-np.inf < x <= 1e-3 for x in lp):
        reject_answer(f"a sampled id of {max(ids)} and log-probs from {min(lp)} to {max(lp)}")
    return Response(ids, [min(x, 0.0) for x in lp], stopped)
