"""Files of other programs -> their sequences, one after the other."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from logitcask.engine.errors import PromptError
from logitcask.engine.exchange.chat import TextReader
from logitcask.engine.exchange.formats import FORMATS, Reader, one_each
from logitcask.engine.exchange.imported import Imported
from logitcask.engine.exchange.scored.files import (
    AXOLOTL,
    DISTILLKIT,
    read_axolotl,
    read_distillkit,
)
from logitcask.engine.prompts.lines import Line
from logitcask.engine.prompts.source import no_file, open_source

TEXT = "text"
"""Format of conversations and texts, which have no ids yet."""
MAX_LINE_BYTES = 1 << 26
"""Of one line: prime-rl writes all turns of an episode, and 20 values of a token, into one."""


class Files:
    """The sequences of files and folders, read from the beginning by each call."""

    def __init__(
        self,
        paths: Sequence[Path],
        format: str,
        tokenizer: Any,
        stop_ids: Sequence[int],
        *,
        last: bool = False,
    ) -> None:
        """Find the files. format: a key of FORMATS, or one of the others; last: as TextReader.

        Raises PromptError for a path that is not there, and for a folder without files.
        """
        suffix = ".parquet" if format == DISTILLKIT else ".jsonl"
        self._files = [file for path in paths for file in files_in(path, suffix)]
        self._format, self._tokenizer, self._stops, self._last = format, tokenizer, stop_ids, last
        self.left_out = 0
        """Sequences of the newest call without a token that counts."""

    def __call__(self) -> Iterator[Imported]:
        """Yield the sequences; raises PromptError at the first invalid line."""
        self.left_out = 0
        if self._format == DISTILLKIT:
            yield from self._counted(each for file in self._files for each in read_distillkit(file))
            return
        if self._format == AXOLOTL:
            with closing(TextReader(self._tokenizer, self._stops, last=True)) as reader:
                yield from self._read(one_each(partial(read_axolotl, reader=reader)))
            return
        if self._format != TEXT:
            yield from self._read(FORMATS[self._format])
            return
        with closing(TextReader(self._tokenizer, self._stops, last=self._last)) as reader:
            yield from self._read(one_each(reader.read))

    def _read(self, reader: Reader) -> Iterator[Imported]:
        yield from self._counted(reader(self._lines()))

    def _lines(self) -> Iterator[Line]:
        for file in self._files:
            try:
                yield from open_source(file, most=MAX_LINE_BYTES).lines()
            except PromptError:
                raise
            except OSError as error:
                raise no_file(file, error) from error

    def _counted(self, found: Iterable[Imported | None]) -> Iterator[Imported]:
        """Yield the sequences, and count those left out."""
        for each in found:
            if each is None:
                self.left_out += 1
            else:
                yield each


def files_in(path: Path, suffix: str = ".jsonl") -> list[Path]:
    """Return a path, or the files below a folder that has some, by their numbers.

    suffix: .jsonl or .parquet.
    """
    if path.is_dir() and (found := [each for each in path.rglob(f"*{suffix}") if each.is_file()]):
        return sorted(found, key=lambda each: _numbered(str(each)))
    return [path]


def _numbered(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts step_2 before step_10."""
    parts = re.split(r"(\d+)", name)
    return [(int(each), "") if each.isdecimal() else (0, each) for each in parts]
