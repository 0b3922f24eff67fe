"""The chosen responses as columns of integers, and the header that names what they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logitcask.engine.report.viewer.lists import Lists
from logitcask.engine.report.viewer.pack import STEPS, quantised
from logitcask.engine.report.viewer.rows import Rows
from logitcask.engine.report.viewer.sources import Response
from logitcask.engine.report.viewer.texts import PieceTexts, TokenTexts
from logitcask.engine.types import Array

MOST_PROMPT = 512
"""Tokens of a prompt that are shown, its last ones."""


@dataclass(slots=True)
class Columns:
    """Columns that grow by the responses of one part at a time."""

    coarse: int = 1
    """Numbers are rounded to so many times STEPS."""
    numbers: dict[str, list[Array]] = field(default_factory=dict)
    """Name -> pieces of uint8 or uint16."""
    ids: dict[str, list[Array]] = field(default_factory=dict)
    """Name -> pieces of uint64: the number of the tokenizer, then the id, 32 bits each."""
    tokenizers: dict[str, tuple[int, TokenTexts]] = field(default_factory=dict)
    """Digest -> its number and texts."""
    teachers: dict[str, set[int]] = field(default_factory=dict)
    """Name -> values of k of its overlaps."""
    prompts: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    """(source, id of the prompt) -> its entry in the header."""
    sequences: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        source: int,
        texts: TokenTexts,
        responses: Sequence[Response],
        prompts: Mapping[str, Sequence[int]],
        rows: Rows,
    ) -> None:
        """Add responses of a part and their rows; prompts: id of each prompt -> its tokens."""
        number = self._number_of(texts)
        for each in responses:
            if (source, each.prompt) not in self.prompts:
                self._add_prompt(source, each.prompt, prompts[each.prompt], number)
            self.sequences.append(
                {
                    "source": source,
                    "prompt": list(self.prompts).index((source, each.prompt)),
                    "number": each.number,
                    "length": each.end - each.start,
                    "reward": each.reward,
                    "finish": each.finish,
                    "versions": each.versions,
                    "mean_kl": each.mean_kl,
                    "teachers": list(rows.teachers),
                }
            )
        self._id("token", number, rows.tokens)
        self._number("flags", rows.flags)
        self._quantised("", rows.nats, rows.shares)
        self._lists("student", number, rows.student)
        for name, of in rows.teachers.items():
            self.teachers.setdefault(name, set()).add(of.k)
            at = list(self.teachers).index(name)
            self._number(f"{at}.flags", of.flags)
            self._quantised(f"{at}.", of.nats, of.shares)
            self._log_probs(f"{at}.at_student", of.at_student)
            own = number if of.texts is None else self._number_of(of.texts)
            self._lists(f"{at}.own", own, of.own)
            if of.span_tokens is not None:
                self._lists(f"{at}.span", own, of.span_tokens)
            self._log_probs(f"{at}.own_log_p", of.own_log_p)

    def _number_of(self, texts: TokenTexts) -> int:
        """Return the number of a tokenizer; the pieces of several parts are joined."""
        number, first = self.tokenizers.setdefault(texts.digest, (len(self.tokenizers), texts))
        if isinstance(texts, PieceTexts) and isinstance(first, PieceTexts):
            first.pieces |= texts.pieces
        return number

    def _add_prompt(self, source: int, name: str, tokens: Sequence[int], number: int) -> None:
        shown = tokens[-MOST_PROMPT:]
        self.prompts[source, name] = {
            "id": name,
            "length": len(shown),
            "left_out": len(tokens) - len(shown),
        }
        self._id("prompt_token", number, np.asarray(shown, np.uint32))

    def _number(self, name: str, values: Array) -> None:
        self.numbers.setdefault(name, []).append(values)

    def _id(self, name: str, number: int, ids: Array) -> None:
        keys = ids.astype(np.uint64) | np.uint64(number << 32)
        self.ids.setdefault(name, []).append(keys)

    def _quantised(
        self, prefix: str, nats: Mapping[str, Array], shares: Mapping[str, Array]
    ) -> None:
        for kind, columns in (("nats", nats), ("shares", shares)):
            for name, values in columns.items():
                self._number(prefix + name, quantised(values, self._steps[kind]))

    def _log_probs(self, name: str, values: Array) -> None:
        self._number(name, quantised(-values, self._steps["log_probs"]))

    @property
    def _steps(self) -> dict[str, float]:
        return {kind: self.coarse * step for kind, step in STEPS.items()}

    def _lists(self, name: str, number: int, lists: Lists) -> None:
        self._number(f"{name}_count", lists.counts.astype(np.uint8))
        self._id(f"{name}_id", number, lists.ids)
        self._log_probs(f"{name}_log_prob", lists.log_probs)

    def finished(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return (header, columns); ids are indices into the header's `texts`."""
        joined = {name: np.concatenate(each) for name, each in self.ids.items()}
        keys, index, counts = np.unique(
            np.concatenate(list(joined.values())), return_inverse=True, return_counts=True
        )
        # Frequent ids get small numbers, of which most bytes are 0.
        order = np.argsort(-counts, kind="stable")
        place = np.empty(len(order), np.uint16 if len(order) <= 0xFFFF else np.uint32)
        place[order] = np.arange(len(order))
        cuts = np.cumsum([len(each) for each in joined.values()])[:-1]
        indices = dict(zip(joined, np.split(place[index], cuts), strict=True))
        texts, raw = self._texts(keys[order])
        header = {
            "texts": texts,
            "bytes": raw,
            "prompts": list(self.prompts.values()),
            "sequences": self.sequences,
            "teachers": [
                {"name": name, "k": sorted(ks - {0})} for name, ks in self.teachers.items()
            ],
            "steps": self._steps,
        }
        numbers = {name: np.concatenate(each) for name, each in self.numbers.items()}
        ids = (keys[order] & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        return header, {**numbers, **indices, "text_id": ids}

    def _texts(self, keys: Array) -> tuple[list[str | None], dict[int, str]]:
        """Return the texts of all keys, and the bytes, as hex digits, of those without a text."""
        texts: list[str | None] = [None] * len(keys)
        raw: dict[int, str] = {}
        numbers, ids = keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)
        for number, of in self.tokenizers.values():
            places = np.flatnonzero(numbers == number)
            for at, (text, digits) in zip(
                places.tolist(), of.of(ids[places].tolist()), strict=True
            ):
                texts[at] = text
                if digits:
                    raw[at] = digits
        return texts, raw
