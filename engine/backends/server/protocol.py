"""What a server is asked about one sequence, and its answer, believed only as far as it is checked.

`/inference/v1/generate` takes ids for every row and answers them as a packed array; the teacher's
own best ids come as JSON from it and from `/v1/completions`, some 70 bytes a log-prob. Both answer
all positions of prompt and response; the last R are ours.
"""

import base64
import io
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from logitcask.engine.backends.returned import Answer, wrong
from logitcask.engine.types import Array, IdLists

GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"

ENTRY_BYTES = 70
"""Of one log-prob in JSON, as measured ..."""
MOST_ENTRY_BYTES = 512
"""... and at most: some decoded tokens are long, and are escaped."""
PACKED_BYTES = 8
"""Of one log-prob in the packed array, base64 and all."""
REST_BYTES = 1 << 16
MOST_SHOWN = 80
"""Characters of what a server says in an error."""
MINUS_INFINITY = -9999.0
"""What vLLM writes in JSON for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestBody:
    """One sequence: its last `rows` tokens are predicted from what stands before each."""

    ids: list[int]
    """L tokens, prompt and response."""
    rows: int
    k: int
    """Best ids that are wanted a row."""
    at: IdLists | None = None
    """Ids that its rows are asked at."""

    def expected_bytes(self) -> int:
        """Of the answer, about."""
        asked = 0 if self.at is None else self.rows * self._width()
        return len(self.ids) * (self.k + 1) * ENTRY_BYTES + asked * PACKED_BYTES

    def most_bytes(self) -> int:
        """More than that is no answer to this."""
        asked = 0 if self.at is None else self.rows * self._width()
        return len(self.ids) * (self.k + 1) * MOST_ENTRY_BYTES + asked * PACKED_BYTES + REST_BYTES

    def body(self, path: str, served: str) -> dict[str, Any]:
        """What is posted. Temperature is said although vLLM's prompt log-probs do not know it."""
        if path == COMPLETIONS:
            assert self.at is None, "asked of GENERATE alone"
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
        if self.at is not None:
            sampling["prompt_logprob_token_ids"] = self._lists()
            sampling["prompt_logprob_start"] = len(self.ids) - self.rows - 1
        return {"model": served, "token_ids": self.ids, "sampling_params": sampling}

    def _width(self) -> int:
        return 0 if self.at is None else int(self.at.cnt.max(initial=0))

    def _mask(self) -> Array:
        """[R, A] bool: cells that are asked, the rest is padding."""
        assert self.at is not None
        asked: Array = np.arange(self._width()) < self.at.cnt.astype(np.int64)[:, None]
        return asked

    def _lists(self) -> list[list[int]]:
        assert self.at is not None
        lists, mask = np.full((self.rows, self._width()), -1, np.int64), self._mask()
        lists[mask] = self.at.ids
        found: list[list[int]] = lists.tolist()
        return found

    def read(self, path: str, names: Collection[str], data: bytes) -> Answer:
        """Raises AnswerError for anything but a whole answer to this question, of a model that has
        one of the names."""
        said = parse(data)
        choices = said.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            wrong("without one choice")
        model = said.get("model")
        if model is not None and not (isinstance(model, str) and model in names):
            wrong(
                f"as model {_shown(model)}, and {' or '.join(map(repr, sorted(names)))} was asked"
            )
        if choices[0].get("finish_reason") == "abort":
            wrong("that the request was aborted")
        used = said.get("usage")
        counted = used.get("prompt_tokens") if isinstance(used, dict) else None
        if counted is not None and counted != len(self.ids):
            wrong(f"for {_shown(counted)} tokens, and {len(self.ids)} were sent")
        of_prompt = choices[0] if path == COMPLETIONS else said
        echoed = of_prompt.get("prompt_token_ids")
        if echoed is not None and echoed != self.ids:
            wrong("for other tokens than were sent")
        best = of_prompt.get("prompt_logprobs")
        packed = None if self.at is None else said.get("prompt_token_id_logprobs")
        return self._answer(best, packed)

    def _answer(self, best: Any, packed: Any) -> Answer:
        if not isinstance(best, list):
            wrong("without log-probs")
        if len(best) != len(self.ids):
            wrong(f"{len(best)} positions, and {len(self.ids)} tokens were sent")
        if best[0]:
            wrong("log-probs of a first token, which nothing predicts")
        for place in range(1, len(self.ids) - self.rows):
            # A server may leave out what is not asked for; what it has says what it was given.
            if best[place] and not _holds(best[place], self.ids[place]):
                self._without(place)
        ids = np.empty((self.rows, self.k), np.int64)
        top_lp = np.empty((self.rows, self.k), np.float32)
        lp = np.empty(self.rows, np.float32)
        for row, place in enumerate(range(len(self.ids) - self.rows, len(self.ids))):
            lp[row], ids[row], top_lp[row] = self._row(best[place], place)
        at = None if self.at is None else self._unpack(packed)
        return Answer(lp=lp, ids=ids, top_lp=top_lp, at=at)

    def _row(self, entries: Any, place: int) -> tuple[float, Array, Array]:
        """(log-prob of the token at `place`, the best ids, theirs)."""
        if not isinstance(entries, dict) or not self.k <= len(entries) <= self.k + 1:
            said = len(entries) if isinstance(entries, dict) else "no"
            wrong(f"{said} log-probs at position {place}, and {self.k} or one more were asked for")
        try:
            ids = np.fromiter(map(int, entries), np.int64, len(entries))
            lp = np.fromiter((each["logprob"] for each in entries.values()), np.float64, len(ids))
        except (TypeError, ValueError, KeyError, OverflowError):
            wrong(f"what are no ids with log-probs at position {place}")
        lp = np.where(lp <= MINUS_INFINITY, -np.inf, lp)
        token = np.flatnonzero(ids == self.ids[place])
        if len(token) != 1:
            self._without(place)
        own = float(lp[token[0]])
        if len(ids) > self.k:  # the token is not among the best, and was added to them
            ids, lp = np.delete(ids, token[0]), np.delete(lp, token[0])
        order = np.lexsort((ids, -lp))
        return own, ids[order], lp[order].astype(np.float32)

    def _without(self, place: int) -> NoReturn:
        wrong(f"position {place} without the token {self.ids[place]} that stands there")

    def _unpack(self, packed: Any) -> Array:
        """[A] float32, flat, from a base64 .npy of [R, A]."""
        mask = self._mask()
        if not isinstance(packed, str):
            wrong("no log-probs at the ids that were asked")
        if len(packed) > mask.size * PACKED_BYTES + 1024:
            wrong(f"{len(packed)} characters for {mask.size} log-probs")
        try:
            stream = io.BytesIO(base64.b64decode(packed, validate=True))
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("another version of .npy")
            shape, columns, dtype = np.lib.format.read_array_header_1_0(stream)
        except (ValueError, TypeError, MemoryError, RecursionError):
            # What numpy and ast.literal_eval raise for headers that are none.
            wrong("what is no array of log-probs")
        if shape != mask.shape or dtype != np.dtype("<f4") or columns:
            wrong(f"log-probs of shape {shape} ({dtype}), and {mask.shape} were asked for")
        data = stream.read()
        if len(data) != 4 * mask.size:
            wrong(f"{len(data)} bytes for {mask.size} log-probs")
        found: Array = np.frombuffer(data, "<f4").reshape(shape)[mask].astype(np.float32)
        return np.where(found <= MINUS_INFINITY, np.float32(-np.inf), found)


def parse(data: bytes) -> Mapping[str, Any]:
    """A JSON object. Raises AnswerError."""
    said: Any = None
    try:
        said = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError):
        wrong(f"{len(data)} bytes that are no whole JSON")
    if not isinstance(said, dict):
        wrong("JSON that is no object")
    return said


def _holds(entries: Any, token: int) -> bool:
    return isinstance(entries, dict) and str(token) in entries


def _shown(value: Any) -> str:
    """Whole or not at all: a part of a key could not be told from other text."""
    if not isinstance(value, str | int | float):
        return f"of the type {type(value).__name__}"
    said = repr(value)
    return said if len(said) <= MOST_SHOWN else f"of {len(said)} characters"


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)
