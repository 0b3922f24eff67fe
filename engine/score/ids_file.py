"""Read a file of ids to score: one JSONL line per sequence.

A line is {"prompt": id, "sample": n, "ids": [[...], ...]}: the n-th response to that prompt, from
0, in the order of the student's versions and then as sampled, and one list of distinct ids for each
of its tokens; a list may be empty. Every sequence of the rollouts has one line. Files are not
trusted: each error names file, line, field, value, rule and fix.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.engine.errors import PromptError
from logitcask.engine.prompts.prompts import Line, kind, read_lines, refuse
from logitcask.engine.store.format.rollouts import Extent
from logitcask.engine.types import Array, IdLists

MAX_IDS = 1024
"""Ids of a position at most."""
MAX_LINE_BYTES = 1 << 28
"""16k positions of 1024 ids are half of it."""
FORM = 'write one JSON object per line: {"prompt": "...", "sample": 0, "ids": [[...], ...]}'


@dataclass(frozen=True, slots=True)
class SequenceIds:
    line: int
    cnt: Array
    """[L] uint16, ids of each position."""
    ids: Array
    """uint32, flat."""


@dataclass(frozen=True, slots=True)
class IdsFile:
    """Ids of a file, by prompt and sample; `lists` matches them to stored rollouts."""

    file: Path
    digest: str
    """sha256 of the file's bytes."""
    sequences: Mapping[tuple[str, int], SequenceIds]
    """(id of the prompt, sample) -> ids of that response."""

    @property
    def label(self) -> str:
        """Return the label of the file in unit keys and lineage."""
        return f"ids:{self.digest}"

    def lists(self, extents: Mapping[str, Extent]) -> dict[str, IdLists]:
        """Return seg_id -> ids of its rows.

        extents: seg_id -> the lengths of a rollout segment, all of a set in its order.
        Raises PromptError unless sequences and lines are one to one.
        """
        seen: Counter[str] = Counter()
        found: dict[str, IdLists] = {}
        for segment, extent in extents.items():
            parts: list[SequenceIds] = []
            for index, length in zip(extent.seq_prompt, extent.response, strict=True):
                prompt = extent.prompt_ids[index]
                parts.append(self._of(prompt, seen[prompt], int(length)))
                seen[prompt] += 1
            found[segment] = IdLists(
                cnt=np.concatenate([np.zeros(0, np.uint16), *(each.cnt for each in parts)]),
                ids=np.concatenate([np.zeros(0, np.uint32), *(each.ids for each in parts)]),
            )
        for (prompt, sample), sequence in self.sequences.items():
            if sample >= seen[prompt]:
                refuse(
                    self.file,
                    sequence.line,
                    f'field "sample": {sample} of prompt {prompt!r}, of which the rollouts hold '
                    f"{seen[prompt]}",
                    "remove the line: samples are counted from 0",
                )
        return found

    def _of(self, prompt: str, sample: int, length: int) -> SequenceIds:
        sequence = self.sequences.get((prompt, sample))
        if sequence is None:
            raise PromptError(
                f"{self.file} has no line for sample {sample} of prompt {prompt!r}, which the "
                "rollouts hold",
                hint="give every sequence a line; its lists may be empty",
            )
        if len(sequence.cnt) != length:
            refuse(
                self.file,
                sequence.line,
                f'field "ids": {len(sequence.cnt)} lists, and sample {sample} of prompt {prompt!r} '
                f"has {length} tokens",
                "give one list for each token of the response, its stop token included",
            )
        return sequence


def read_ids_file(file: Path, n_vocab: int) -> IdsFile:
    """Read a file of ids in [0, n_vocab). Raises PromptError at the first wrong line."""
    sequences: dict[tuple[str, int], SequenceIds] = {}
    try:
        with file.open("rb") as stream:
            digest = "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            for number, text in read_lines(file, stream, MAX_LINE_BYTES):
                line = IdLine(file, number, text)
                key = (line.string("prompt", line.field("prompt")), line.sample())
                if (before := sequences.get(key)) is not None:
                    line.refuse(
                        f'field "sample": {key[1]} of prompt {key[0]!r} is already in line '
                        f"{before.line}",
                        "give every sequence one line",
                    )
                sequences[key] = line.sequence(n_vocab)
    except OSError as error:
        raise PromptError(
            f"{file} cannot be read: {error.strerror or error}",
            hint="give the path of a JSONL file of ids: --extra-ids FILE.jsonl",
        ) from error
    return IdsFile(file, digest, sequences)


class IdLine(Line):
    """One line of a file of ids."""

    FORM = FORM

    def field(self, name: str) -> Any:
        if name not in self.keys:
            self.refuse(f'field "{name}" is missing', FORM)
        return self.keys[name]

    def sample(self) -> int:
        value = self.field("sample")
        if type(value) is not int or value < 0:
            self.refuse(
                f'field "sample": {value!r:.80} is not a whole number of 0 or more',
                "give the place of the response among those of its prompt, from 0",
            )
        return value

    def sequence(self, n_vocab: int) -> SequenceIds:
        if unknown := sorted(self.keys.keys() - {"prompt", "sample", "ids"}):
            self.refuse(f'field "{unknown[0]}" is not known', FORM)
        rows = self.field("ids")
        if not isinstance(rows, list):
            self.refuse(f'field "ids": {rows!r:.80} is {kind(rows)}, not a list of lists', FORM)
        for position, row in enumerate(rows):
            self._check(f'field "ids[{position}]"', row, n_vocab)
        return SequenceIds(
            self.number,
            np.asarray([len(row) for row in rows], np.uint16),
            np.asarray([token for row in rows for token in row], np.uint32),
        )

    def _check(self, where: str, row: Any, n_vocab: int) -> None:
        if not isinstance(row, list):
            self.refuse(f"{where}: {row!r:.80} is {kind(row)}, not a list of ids", FORM)
        if len(row) > MAX_IDS:
            self.refuse(f"{where}: {len(row)} ids, at most {MAX_IDS} may be", "give fewer")
        for token in row:
            # bool is a subclass of int.
            if type(token) is not int or not 0 <= token < n_vocab:
                self.refuse(
                    f"{where}: {token!r:.80} is no id in [0, {n_vocab})",
                    "give ids of the student's tokenizer",
                )
        if len(set(row)) < len(row):
            twice = next(token for token, count in Counter(row).items() if count > 1)
            self.refuse(f"{where}: {twice} is there twice", "give every id of a position once")
