"""Requests that trainers send to a teacher server, and the answers in the same form.

    /v1/completions           vLLM: TRL, axolotl, AReaL
    /inference/v1/generate    vLLM: prime-rl
    /generate                 SGLang: axolotl, AReaL, slime, miles

A request is answered from a record only if each of its fields is known to leave the log-probs of
the prompt as they are: the fields are listed, and one that is not makes the request pass unchanged.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from logitcask.engine.backends.server.protocol import COMPLETIONS, GENERATE
from logitcask.engine.backends.server.sglang import SGLANG
from logitcask.engine.exchange.beginnings import after
from logitcask.engine.tap import render
from logitcask.engine.tap.record import MOST_K, MOST_TOKENS, Record
from logitcask.engine.types import Array

START = "X-Logitcask-Start"
"""Header: tokens of the prompt, one number or one for each sequence of the body."""
AFTER = re.compile(r"/after=([0-9]{1,10}(?:,[0-9]{1,10}){0,63})(?=/)")
"""Beginning of a path: the response begins after the last occurrence of these ids."""

_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "seed", "detokenize", "skip_special_tokens"}
"""Fields that shape the one sampled token alone; the temperature is compared elsewhere."""
_VLLM = {"model", "user", "stream", "n", "max_tokens", "prompt_logprobs", *_SAMPLING}
_SGLANG = {"input_ids", "sampling_params", "return_logprob", "logprob_start_len", "stream"}
_SGLANG |= {"top_logprobs_num", "return_text_in_logprobs"}
_SGLANG_SAMPLING = {"max_new_tokens", "n", *_SAMPLING} - {"seed"}
LENIENT = {"echo", "logprobs", "top_logprobs", "add_special_tokens", "max_tokens", "max_new_tokens"}
"""Fields whose part of the answer axolotl and AReaL send for and do not read."""


class Passed(Exception):
    """A request that is not answered from records, with the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringRequest:
    """Sequences whose log-probs a client requests."""

    sequences: list[Array]
    """[L] uint32 each."""
    k: int
    is_batch: bool
    """The body is a list of sequences, even of one."""
    model: str | None
    temperature: float
    start: int = 0
    """SGLang: first position of the answer."""


def parse(path: str, body: Any, lenient: bool) -> ScoringRequest:
    """Read a client's body. Raises Passed for one that no record can answer."""
    if not isinstance(body, dict):
        raise Passed("no JSON object")
    return (_parse_sglang if path == SGLANG else _parse_vllm)(path, body, lenient)


def _parse_vllm(path: str, body: dict[str, Any], lenient: bool) -> ScoringRequest:
    key = "prompt" if path == COMPLETIONS else "token_ids"
    params = body if path == COMPLETIONS else body.get("sampling_params")
    if not isinstance(params, dict):
        raise Passed("no sampling_params")
    if params.get("prompt_logprobs") is None:
        raise Passed("no prompt_logprobs")
    own = {"prompt"} if path == COMPLETIONS else {"token_ids", "sampling_params"}
    _check_fields({**params, **body}, _VLLM | own | (LENIENT if lenient else set()))
    if params is not body and (wrong := sorted(set(body) - own - {"model", "stream"})):
        raise Passed(f"field {wrong[0]}")
    _check_values(params, body, "max_tokens", (1,), 16, lenient)
    sequences, is_batch = _sequences(body.get(key))
    if is_batch and path == GENERATE:
        raise Passed("a list of sequences")
    return ScoringRequest(
        sequences=sequences,
        k=_count(params["prompt_logprobs"], "prompt_logprobs"),
        is_batch=is_batch,
        model=_text(body.get("model")),
        temperature=_temperature(params),
    )


def _parse_sglang(path: str, body: dict[str, Any], lenient: bool) -> ScoringRequest:
    if body.get("return_logprob") is not True:
        raise Passed("no return_logprob")
    _check_fields(body, _SGLANG | (LENIENT if lenient else set()))
    params = body.get("sampling_params") or {}
    if not isinstance(params, dict):
        raise Passed("no sampling_params")
    _check_fields(params, _SGLANG_SAMPLING)
    _check_values(params, body, "max_new_tokens", (0, 1), 128, lenient)
    if body.get("return_text_in_logprobs") and not lenient:
        raise Passed("field return_text_in_logprobs")  # texts of tokens are not recorded
    sequences, is_batch = _sequences(body.get("input_ids"))
    start = body.get("logprob_start_len", -1)
    if type(start) is not int or not 0 <= start < min(map(len, sequences)):
        raise Passed(f"logprob_start_len of {start!r:.20}")
    return ScoringRequest(
        sequences=sequences,
        k=_count(body.get("top_logprobs_num", 0), "top_logprobs_num"),
        is_batch=is_batch,
        model=None,
        temperature=_temperature(params),
        start=start,
    )


def _check_fields(fields: Mapping[str, Any], known: set[str]) -> None:
    # A field without a value is as good as absent.
    if unknown := sorted(key for key in set(fields) - known if fields[key] is not None):
        raise Passed(f"field {unknown[0]}"[:80])


def _check_values(
    params: Mapping[str, Any],
    body: Mapping[str, Any],
    length: str,
    lengths: Sequence[int],
    absent: int,
    lenient: bool,
) -> None:
    count = absent if params.get(length) is None else params[length]
    if not lenient and (type(count) is not int or count not in lengths):
        raise Passed(f"{length} of {count!r:.20}")
    if params.get("stream") or body.get("stream"):
        raise Passed("stream")
    if params.get("n", 1) not in (1, None):
        raise Passed("n")


def _sequences(ids: Any) -> tuple[list[Array], bool]:
    if not isinstance(ids, list) or not ids:
        raise Passed("no list of token ids")
    is_batch = isinstance(ids[0], list)
    lists = ids if is_batch else [ids]
    found = []
    for each in lists:
        if not isinstance(each, list) or not 2 <= len(each) <= MOST_TOKENS:
            raise Passed("a sequence without a position")
        if set(map(type, each)) != {int} or not 0 <= min(each) <= max(each) < 1 << 32:
            raise Passed("ids that are no token ids")
        found.append(np.array(each, np.uint32))
    return found, is_batch


def _count(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value <= MOST_K:
        raise Passed(f"{name} of {value!r:.20}")
    return value


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise Passed("model that is no text")
    return value


def _temperature(params: Mapping[str, Any]) -> float:
    value = params.get("temperature")
    if value is None:
        return 1.0
    if type(value) not in (int, float) or not 0 <= value < 1e6:
        raise Passed("temperature that is no number")
    return float(value)


def boundaries(request: ScoringRequest, marker: Sequence[int], header: str) -> list[int]:
    """Return the prompt's tokens of each sequence; 0 = unknown.

    marker: ids after which the response begins; header: one number for all sequences, or one each.
    """
    count = len(request.sequences)
    if re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", header):
        given = [int(each) for each in header.split(",")]
        given = given * count if len(given) == 1 else given
        if len(given) == count:
            pairs = zip(given, request.sequences, strict=True)
            return [start if 0 < start < len(ids) else 0 for start, ids in pairs]
    return [after(ids, marker) for ids in request.sequences]


def parts(
    path: str, request: ScoringRequest, records: Sequence[Record], model: str, fingerprint: str
) -> list[Callable[[], bytes]]:
    """Return functions that render the parts of the answer, in order: one for each record, with a
    small one before them and one after.
    """
    begin, end = b"", b""
    if path == COMPLETIONS:
        head = {"id": "cmpl-tap", "object": "text_completion", "created": 0, "model": model}
        tokens = sum(len(each.ids) for each in records)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        foot = {"system_fingerprint": fingerprint or None, "usage": usage}
        begin = json.dumps(head)[:-1].encode() + b',"choices":['
        end = b"]," + json.dumps(foot)[1:].encode()
        render_one = partial(_choice, request)
    elif path == GENERATE:
        render_one = partial(_generated, request)
    else:
        begin, end = (b"[", b"]") if request.is_batch else (b"", b"")
        render_one = partial(_sglang, request)
    middle = [partial(render_one, number, record) for number, record in enumerate(records)]
    divided = [partial(_after_comma, part) for part in middle[1:]]
    return [partial(bytes, begin), *middle[:1], *divided, partial(bytes, end)]


def _after_comma(part: Callable[[], bytes]) -> bytes:
    return b"," + part()


def _choice(request: ScoringRequest, number: int, record: Record) -> bytes:
    head = {"index": number, "text": "", "logprobs": None, "finish_reason": "length"}
    return _with(head, prompt_logprobs=render.prompt_logprobs(record, request.k))


def _generated(request: ScoringRequest, number: int, record: Record) -> bytes:
    choice = {"index": 0, "logprobs": None, "finish_reason": "length", "token_ids": list[int]()}
    head = {"request_id": "tap", "choices": [choice]}
    return _with(head, prompt_logprobs=render.prompt_logprobs(record, request.k))


def _sglang(request: ScoringRequest, number: int, record: Record) -> bytes:
    end = {"type": "length", "length": 0}
    meta = {"prompt_tokens": len(record.ids), "completion_tokens": 0, "finish_reason": end}
    found = {"input_token_logprobs": render.sglang_own(record, request.start)}
    if request.k:
        found["input_top_logprobs"] = render.sglang_top(record, request.start, request.k)
    return _with({"text": ""}, meta_info=_with(meta, **found))


def _with(head: Mapping[str, Any], **rendered: bytes) -> bytes:
    """Return an object of JSON with more keys, whose values are JSON already."""
    more = b"".join(b',"%s":%s' % (key.encode(), value) for key, value in rendered.items())
    return json.dumps(head)[:-1].encode() + more + b"}"
