"""The request body for one sequence, and the checks of its answer.

vLLM's `/inference/v1/generate` takes chosen ids for every row and returns their log-probs as a
packed array. It and `/v1/completions` return the teacher's best ids as JSON, about 70 bytes a
log-prob, at all positions of prompt and response; the last R are the response rows. SGLang's
`/generate` is in `sglang.py`.
"""

import base64
import html
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from logitcask.engine.backends.returned import ReturnedTopK, reject_answer
from logitcask.engine.backends.server.prompt_logprobs import (
    MINUS_INFINITY,
    read_topk,
    reject_without_token,
)
from logitcask.engine.backends.server.sglang import (
    EXPECTED_BYTES,
    MOST_BYTES,
    SGLANG,
    build_body,
    count_entries,
    divide_rows,
    read_answer,
)
from logitcask.engine.store.format import ragged
from logitcask.engine.types import Array, IdLists

GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"

ENTRY_BYTES = 70
"""Of one log-prob in JSON, as measured ..."""
MOST_ENTRY_BYTES = 512
"""... and at most: some decoded tokens are long, with escapes."""
PACKED_BYTES = 8
"""Of one log-prob in the packed array, with base64."""
REST_BYTES = 1 << 16
MOST_SHOWN = 80
"""Characters of an answer in an error message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestBody:
    """One sequence to score: its last `rows` tokens, each given the tokens before it."""

    ids: list[int]
    """L tokens, prompt and response."""
    rows: int
    k: int
    """Best ids per row."""
    extra_ids: IdLists | None = None
    """Chosen ids of its rows."""
    server_order: bool = False
    """Keep the server's order of equally likely ids; else the lower id comes first."""

    def parts(self, path: str) -> Iterator[tuple[slice, "RequestBody"]]:
        """Return the requests that a server needs for these rows, each with its rows."""
        extra = self.extra_ids
        if path != SGLANG or extra is None:
            yield slice(0, self.rows), self
            return
        off, first = ragged.starts(extra.cnt), len(self.ids) - self.rows
        for rows in divide_rows(extra):
            flat = slice(int(off[rows.start]), int(off[rows.stop]))
            part = IdLists(cnt=extra.cnt[rows], ids=extra.ids[flat])
            count = rows.stop - rows.start
            yield rows, replace(self, ids=self.ids[: first + rows.stop], rows=count, extra_ids=part)

    def expected_bytes(self, path: str) -> int:
        """Return the approximate size of the answer."""
        if path == SGLANG:
            return count_entries(self.rows, self.k, self.extra_ids) * EXPECTED_BYTES
        packed = self.rows * self._width() * PACKED_BYTES
        return len(self.ids) * (self.k + 1) * ENTRY_BYTES + packed

    def most_bytes(self, path: str) -> int:
        """Return the maximum size of a valid answer."""
        if path == SGLANG:
            return count_entries(self.rows, self.k, self.extra_ids) * MOST_BYTES + REST_BYTES
        packed = self.rows * self._width() * PACKED_BYTES
        return len(self.ids) * (self.k + 1) * MOST_ENTRY_BYTES + packed + REST_BYTES

    def to_json(self, path: str, served: str) -> dict[str, Any]:
        """Return the JSON object. vLLM's prompt log-probs do not depend on the temperature."""
        if path == SGLANG:
            return build_body(self.ids, self.rows, self.k, self.extra_ids)
        if path == COMPLETIONS:
            assert self.extra_ids is None, "only GENERATE takes chosen ids"
            return {
                "model": served,
                "prompt": self.ids,
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": self.k,
            }
        sampling: dict[str, Any] = {
            "max_tokens": 1,
            "temperature": 0.0,
            "detokenize": False,
            "prompt_logprobs": self.k,
        }
        if self.extra_ids is not None:
            sampling["prompt_logprob_token_ids"] = self._padded_ids()
            sampling["prompt_logprob_start"] = len(self.ids) - self.rows - 1
        return {"model": served, "token_ids": self.ids, "sampling_params": sampling}

    def _width(self) -> int:
        return 0 if self.extra_ids is None else int(self.extra_ids.cnt.max(initial=0))

    def _mask(self) -> Array:
        """Return [R, A] bool: chosen ids, the rest is padding."""
        assert self.extra_ids is not None
        mask: Array = np.arange(self._width()) < self.extra_ids.cnt.astype(np.int64)[:, None]
        return mask

    def _padded_ids(self) -> list[list[int]]:
        assert self.extra_ids is not None
        lists, mask = np.full((self.rows, self._width()), -1, np.int64), self._mask()
        lists[mask] = self.extra_ids.ids
        padded: list[list[int]] = lists.tolist()
        return padded

    def read(self, path: str, names: Collection[str], data: bytes) -> ReturnedTopK:
        """Parse an answer; AnswerError unless it is a complete answer to this request by a model
        with one of these names.
        """
        found = parse(data)
        answered = "meta_info" if path == SGLANG else "choices"
        if answered not in found and (words := words_of(found)):
            reject_answer(f"with an error: {words}")
        if path == SGLANG:
            return read_answer(found, self.ids, self.rows, self.k, self.extra_ids)
        choices = found.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            reject_answer("without one choice")
        model = found.get("model")
        if model is not None and not (isinstance(model, str) and model in names):
            reject_answer(
                f"as model {_shown(model)}, and {' or '.join(map(repr, sorted(names)))} was "
                "requested"
            )
        if choices[0].get("finish_reason") == "abort":
            reject_answer("that the request was aborted")
        used = found.get("usage")
        counted = used.get("prompt_tokens") if isinstance(used, dict) else None
        if counted is not None and counted != len(self.ids):
            reject_answer(f"for {_shown(counted)} tokens, and {len(self.ids)} were sent")
        of_prompt = choices[0] if path == COMPLETIONS else found
        echoed = of_prompt.get("prompt_token_ids")
        if echoed is not None and echoed != self.ids:
            reject_answer("for other tokens than were sent")
        best = of_prompt.get("prompt_logprobs")
        packed = None if self.extra_ids is None else found.get("prompt_token_id_logprobs")
        return self._answer(best, packed)

    def _answer(self, best: Any, packed: Any) -> ReturnedTopK:
        if not isinstance(best, list):
            reject_answer("without log-probs")
        if len(best) != len(self.ids):
            reject_answer(f"{len(best)} positions, and {len(self.ids)} tokens were sent")
        if best[0]:
            reject_answer("log-probs of the first token, which has no context")
        for place in range(1, len(self.ids) - self.rows):
            # A server may leave out prompt positions; those that it returns show its input.
            if best[place] and not _holds(best[place], self.ids[place]):
                reject_without_token(place, self.ids[place])
        first = len(self.ids) - self.rows
        found = read_topk(
            best[first:], self.ids[first:], self.k, first, server_order=self.server_order
        )
        at = None if self.extra_ids is None else self._unpack(packed)
        return replace(found, at=at)

    def _unpack(self, packed: Any) -> Array:
        """Return [A] float32, flat, from a base64 .npy of [R, A]."""
        mask = self._mask()
        if not isinstance(packed, str):
            reject_answer("no log-probs at the chosen ids")
        if len(packed) > mask.size * PACKED_BYTES + 1024:
            reject_answer(f"{len(packed)} characters for {mask.size} log-probs")
        try:
            stream = io.BytesIO(base64.b64decode(packed, validate=True))
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("another version of .npy")
            shape, columns, dtype = np.lib.format.read_array_header_1_0(stream)
        except (ValueError, TypeError, MemoryError, RecursionError):
            # numpy and ast.literal_eval raise these for invalid headers.
            reject_answer("an invalid array of log-probs")
        if shape != mask.shape or dtype != np.dtype("<f4") or columns:
            reject_answer(f"log-probs of shape {shape} ({dtype}), and {mask.shape} was requested")
        data = stream.read()
        if len(data) != 4 * mask.size:
            reject_answer(f"{len(data)} bytes for {mask.size} log-probs")
        found: Array = np.frombuffer(data, "<f4").reshape(shape)[mask].astype(np.float32)
        return np.where(found <= MINUS_INFINITY, np.float32(-np.inf), found)


def parse(data: bytes) -> Mapping[str, Any]:
    """Parse a JSON object; AnswerError for anything else."""
    found: Any = None
    try:
        found = json.loads(data, parse_constant=_raise_constant)
    except (ValueError, RecursionError):
        reject_answer(f"{len(data)} bytes that are not complete JSON: {error_message(data)}")
    if not isinstance(found, dict):
        reject_answer("JSON that is not an object")
    return found


def error_message(data: bytes) -> str:
    """Return the message in an error's body: vLLM's object, a plain string, a page, or any text.

    It may hold the key, and have any length: see `ServerClient.one_line`.
    """
    text = data.decode("utf-8", "replace")
    try:
        return words_of(json.loads(text)) or text
    except (ValueError, RecursionError):
        is_page = text.lstrip()[:1] == "<"
        return html.unescape(re.sub("<[^<>]*>", " ", text)) if is_page else text


def words_of(found: Any) -> str:
    """Return the text of an error object; '' for anything else."""
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), None)
    return found if isinstance(found, str) else ""


def _holds(entries: Any, token: int) -> bool:
    return isinstance(entries, dict) and str(token) in entries


def _shown(value: Any) -> str:
    """Format a value completely or not at all: a part of a key could not be redacted."""
    if not isinstance(value, str | int | float):
        return f"of the type {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"of {len(text)} characters"


def _raise_constant(name: str) -> NoReturn:
    raise ValueError(name)
