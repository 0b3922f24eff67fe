"""Ids of a tokenizer that spell given bytes exactly."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from logitcask.engine.alignment.token_bytes import TokenBytes, token_bytes
from logitcask.engine.errors import UnitError
from logitcask.engine.types import Array


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

    def encode(self, text: bytes, what: str = "the text") -> Encoded:
        """Return ids whose bytes are `lead` and then `text`.

        Whole characters are encoded by the tokenizer. Where its ids spell something else, because
        it normalises the text or has no token for a character, the run is halved until they do;
        single bytes are the last resort, and all that there is for bytes that are no characters.
        what: name of the text in messages. Raises UnitError for bytes that it cannot spell.
        """
        ids: list[int] = []
        patched: list[bool] = []
        lead = 0
        for whole, run in utf8_runs(text):
            usual = self._encode(run.decode()) if whole else []
            spelled = self.table.spell(usual)
            begin = self.table.lead if not ids else b""
            if whole and spelled in (run, begin + run):
                lead += len(spelled) - len(run)
                ids += usual
                patched += [False] * len(usual)
                continue
            found = self._halved(run.decode()) if whole else self._bytes(run)
            if found is None:
                raise UnitError(
                    f"{what}: no ids of this tokenizer spell {self._unknown(whole, run)!r}",
                    hint="leave this text out, or take a model whose tokenizer has all bytes",
                )
            ids += found
            patched += [True] * len(found)
        return Encoded(ids=np.array(ids, np.int64), patched=np.array(patched, bool), lead=lead)

    def encode_continuation(
        self, before: bytes, text: bytes, what: str = "the text"
    ) -> tuple[Encoded, int]:
        """Return the ids of `text` behind `before`, and the bytes at its begin that they lack.

        The two are encoded as one, so that the seam is as the model knows it. A token that has
        bytes of both is left out: its bytes of `text` are counted, and no span has them.
        """
        both = self.encode(before + text, what)
        ends = np.cumsum(np.maximum(self.table.lengths[both.ids], 0)) - both.lead
        first = int(np.searchsorted(ends, len(before), side="right"))
        begin = int(ends[first - 1]) if first else 0
        lost = 0
        if begin < len(before):  # the token at `first` has bytes of both
            lost = int(ends[first]) - len(before) if first < len(ends) else 0
            first += 1
        found = Encoded(
            ids=both.ids[first:], patched=both.patched[first:], lead=0 if first else both.lead
        )
        return found, lost

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def _halved(self, text: str) -> list[int] | None:
        found = self._encode(text)
        if self.table.spell(found) == text.encode():
            return found
        if len(text) == 1:
            return self._bytes(text.encode())
        left = self._halved(text[: len(text) // 2])
        right = self._halved(text[len(text) // 2 :])
        return None if left is None or right is None else left + right

    def _unknown(self, whole: bool, run: bytes) -> str | bytes:
        """Return the first character, or the first byte, that has no ids."""
        if whole:
            return next(char for char in run.decode() if self._halved(char) is None)
        return next(run[i : i + 1] for i, byte in enumerate(run) if byte not in self.table.single)

    def _bytes(self, run: bytes) -> list[int] | None:
        found = [self.table.single.get(byte) for byte in run]
        return None if None in found else [each for each in found if each is not None]


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
