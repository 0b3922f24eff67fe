"""Ids of a tokenizer that spell given bytes exactly."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from logitcask.engine.alignment.token_bytes import TokenBytes, token_bytes
from logitcask.engine.errors import UnitError
from logitcask.engine.types import Array

SEAM_BYTES = 1024
"""Bytes before a continuation that are encoded with it. No token reaches so far back, so that the
ids behind the seam are those of the whole text, and a long prompt is not encoded once a response.
"""
_ANCHORS = ("\n", ".", "x")
"""Texts before a piece of a text, for tokenizers that write a space before all that they encode."""
_WORD = re.compile(r"(?<=\S)(?=\s)")
"""Between two words: most tokenizers have no token over it."""
_Spelled = tuple[list[int], list[bool]]
"""Ids, and whether each is patched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A text as ids."""

    ids: Array
    """[n] int64."""
    patched: Array
    """[n] bool: ids that the tokenizer itself would not have chosen. They spell the text, but the
    model has seldom seen them in such a place."""
    lead: int
    """Bytes at the begin of the ids that are not in the text."""


class ByteEncoder:
    """A tokenizer that encodes bytes, and its table.

    Special tokens that are written out in a text stay text: a response cannot end a turn.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Build the table. Raises as token_bytes."""
        self.table: TokenBytes = token_bytes(tokenizer)
        # A copy: truncation and the handling of special tokens are states of a tokenizer.
        copied = Tokenizer.from_str(json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())))
        copied.no_truncation()
        copied.no_padding()
        copied.encode_special_tokens = True
        self._tokenizer = copied
        self._anchors = [
            (anchor, ids)
            for anchor in (_ANCHORS if self.table.lead else ())
            if self.table.spell(ids := self._encode(anchor)).endswith(anchor.encode())
        ]

    def encode(self, text: bytes, what: str = "the text") -> Encoded:
        """Return ids whose bytes are `lead` and then `text`.

        Whole characters are encoded by the tokenizer. Where its ids spell something else, because
        it normalises the text or has no token for a character, the run is divided, between words
        as long as there are some, until they do; single bytes are the last resort, and all that
        there is for bytes that are no characters. The ids of divided words are patched.
        what: name of the text in messages. Raises UnitError for bytes that it cannot spell.
        """
        found = self._spelled(text, begins=True)
        return self._refuse(text, what) if found is None else found

    def encode_continuation(self, before: bytes, text: bytes, what: str = "the text") -> Encoded:
        """Return the ids of `text` behind `before`, without a lead: no byte is lost.

        The two are encoded as one, so that the ids are as the model knows them. Where a token
        would have bytes of both, or more of these ids would be patched, `text` is encoded alone,
        and its first id is patched. Raises as `encode`.
        """
        if not text:
            return Encoded(ids=np.zeros(0, np.int64), patched=np.zeros(0, bool), lead=0)
        seam = _whole_characters(before[-SEAM_BYTES:])
        both, found = self._spelled(seam + text, begins=True), []
        if both is not None:
            ends = np.cumsum(np.maximum(self.table.lengths[both.ids], 0)) - both.lead
            first = int(np.searchsorted(ends, len(seam), side="right"))
            # Not the lead of a text without anything before it: the model has begun before.
            if (int(ends[first - 1]) == len(seam)) if first else not (seam or both.lead):
                found = [Encoded(ids=both.ids[first:], patched=both.patched[first:], lead=0)]
        if not found or found[0].patched.any():
            alone = self._spelled(text, begins=False)
            if alone is not None:
                alone.patched[0] = True
                found.append(alone)
        if not found:
            return self._refuse(text, what)
        return min(found, key=lambda each: int(each.patched.sum()))

    def _spelled(self, text: bytes, *, begins: bool) -> Encoded | None:
        """Return the ids of a text, None where it has none. begins: it may have a lead."""
        ids: list[int] = []
        patched: list[bool] = []
        lead = 0
        for whole, run in utf8_runs(text):
            if begins and whole and not ids:
                usual = self._encode(run.decode())
                spelled = self.table.spell(usual)
                if spelled in (run, self.table.lead + run):
                    lead = len(spelled) - len(run)
                    ids, patched = usual, [False] * len(usual)
                    continue
            found = self._divided(run.decode()) if whole else self._bytes(run)
            if found is None:
                return None
            ids = ids + found[0]
            patched = patched + found[1]
        return Encoded(ids=np.array(ids, np.int64), patched=np.array(patched, bool), lead=lead)

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def _exact(self, text: str) -> list[int] | None:
        """Return the ids of a piece inside a text that spell it, as the tokenizer chooses them."""
        spelled = text.encode()
        found = self._encode(text)
        if self.table.spell(found) == spelled:
            return found
        for anchor, ids in self._anchors:
            found = self._encode(anchor + text)
            if found[: len(ids)] == ids and self.table.spell(found[len(ids) :]) == spelled:
                return found[len(ids) :]
        return None

    def _divided(self, text: str, *, words: bool = True) -> _Spelled | None:
        """Return the ids of a piece, divided where the tokenizer spells it otherwise.

        words: it was not divided inside a word.
        """
        found = self._exact(text)
        if found is not None:
            return found, [not words] * len(found)
        if len(text) == 1:
            return self._bytes(text.encode())
        middle = len(text) // 2
        cuts = [each.start() for each in _WORD.finditer(text)]
        cut = min(cuts, key=lambda each: abs(each - middle), default=middle)
        left = self._divided(text[:cut], words=words and bool(cuts))
        right = None if left is None else self._divided(text[cut:], words=words and bool(cuts))
        if left is None or right is None:
            return None
        return left[0] + right[0], left[1] + right[1]

    def _bytes(self, run: bytes) -> _Spelled | None:
        found = [self.table.single.get(byte) for byte in run]
        known = [each for each in found if each is not None]
        return (known, [True] * len(known)) if len(known) == len(run) else None

    def _refuse(self, text: bytes, what: str) -> Encoded:
        """Raise UnitError with the first character, or the first byte, that has no ids."""
        unknown: str | bytes = b""
        for whole, run in utf8_runs(text):
            parts = [*run.decode()] if whole else [run[i : i + 1] for i in range(len(run))]
            for part in parts:
                spelled = self._divided(part) if isinstance(part, str) else self._bytes(part)
                if spelled is None and not unknown:
                    unknown = part
        raise UnitError(
            f"{what}: no ids of this tokenizer spell {unknown!r}",
            hint="leave this text out, or take a model whose tokenizer has all bytes",
        )


def _whole_characters(text: bytes) -> bytes:
    """Return a cut text without the rest of a character at its begin."""
    start = 0
    while start < min(3, len(text)) and text[start] & 0xC0 == 0x80:
        start += 1
    return text[start:]


def utf8_runs(text: bytes) -> Iterator[tuple[bool, bytes]]:
    """Yield (is whole characters, bytes) of a text in its order."""
    start = 0
    while start < len(text):
        try:
            text[start:].decode()
        except UnicodeDecodeError as error:
            if error.start:
                yield True, text[start : start + error.start]
            yield False, text[start + error.start : start + error.end]
            start += error.end
        else:
            yield True, text[start:]
            return
