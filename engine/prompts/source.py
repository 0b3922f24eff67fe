"""Sources of prompts: JSONL, Parquet, Arrow, folders of `datasets` and the Hub -> lines.

A row of Parquet or Arrow becomes one line of JSON, so that the same reader checks both. None of
these is trusted, and no code of a data set is run. Nothing is held but the line that is read.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from logitcask.engine.config.prompts import Columns, is_hub
from logitcask.engine.errors import PromptError
from logitcask.engine.prompts import arrow
from logitcask.engine.prompts.hub import open_hub
from logitcask.engine.prompts.lines import MAX_LINE_BYTES, Line, Texts, refuse

OTHER_FORMATS = {
    b"\x1f\x8b": ("gzip", "gunzip -c {quoted} > new.jsonl"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd -dc {quoted} > new.jsonl"),
    b"\xfd7zXZ": ("xz", "xz -dc {quoted} > new.jsonl"),
    b"BZh": ("bzip2", "bzip2 -dc {quoted} > new.jsonl"),
    b"PK\x03\x04": ("zip", "unzip -p {quoted} > new.jsonl"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 {quoted} > new.jsonl"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 {quoted} > new.jsonl"),
    b"[": ("a JSON array", "jq -c '.[]' {quoted} > new.jsonl"),
}
"""First bytes of a file -> its format, and the command that makes a JSONL file of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file, folder or data set of prompts."""

    file: Path
    texts: Callable[[], Iterator[tuple[int, str]]]
    """Yields (number, JSON) of each line, from 1, or of each row, from 0 as in `datasets`."""
    unit: str = "line"
    """Name of one prompt in messages: line or row."""
    columns: Columns = field(default_factory=Columns)
    record: Mapping[str, Any] = field(default_factory=dict)
    """Provenance: what else than a path identifies the data; {} for JSONL with our keys."""

    def lines(self) -> Iterator[Line]:
        """Yield the lines; raises PromptError for one that is no JSON object, OSError."""
        for number, text in self.texts():
            yield Line(self.file, number, text, unit=self.unit, columns=self.columns)


def open_source(
    file: Path | str,
    columns: Columns | None = None,
    *,
    limit: int | None = None,
    most: int = MAX_LINE_BYTES,
) -> Source:
    """Find the format of a file, folder or data set of prompts.

    limit: prompts that will be read; with one, a data set on the Hub is not downloaded whole.
    most: bytes of a line of a file, at most.
    Raises PromptError for an unknown format, and for a split that is not there; ConfigError where
    the package that reads it is missing.
    """
    file, columns = Path(file), columns or Columns()
    if is_hub(file):
        texts, found = open_hub(file, columns, streaming=limit is not None)
        return _of_rows(file, columns, texts, found)
    if columns.subset:
        raise PromptError(
            f"subset = {columns.subset!r}: {file} has no subsets",
            hint="leave it out: only data sets on the Hub have them",
        )
    try:
        if file.is_dir():
            return _of_rows(file, columns, *arrow.open_folder(file, columns.split))
        # A pipe could not be read again from its beginning.
        first = b""
        if file.is_file():
            with file.open("rb") as stream:
                first = stream.read(8)
    except OSError as error:
        raise no_file(file, error) from error
    if columns.split:
        raise PromptError(
            f"split = {columns.split!r}: {file} is one file, which has no splits",
            hint="leave it out, or give the folder that holds the splits",
        )
    if first.startswith(arrow.MAGIC):
        return _of_rows(file, columns, lambda: arrow.texts(file, [file], most), {})
    names = columns.model_dump(exclude_defaults=True)
    return Source(
        file=file,
        texts=lambda: _texts(file, most),
        columns=columns,
        record={"file": file.name, **names} if names else {},
    )


def _of_rows(file: Path, columns: Columns, texts: Texts, found: Mapping[str, Any]) -> Source:
    record = {"file": str(file) if is_hub(file) else file.name}
    record |= columns.model_dump(exclude_defaults=True) | dict(found)
    return Source(file=file, texts=texts, unit="row", columns=columns, record=record)


def no_file(file: Path, error: OSError) -> PromptError:
    if isinstance(error, FileNotFoundError):
        return PromptError(
            f"there is no prompts file {file}",
            hint="give the path of a JSONL or Parquet file, or a data set as hub:ORG/NAME",
        )
    return PromptError(
        f"{file} cannot be read: {error.strerror or error}",
        hint="give the path of a file that this user may read",
    )


def _texts(file: Path, most: int) -> Iterator[tuple[int, str]]:
    with file.open("rb") as stream:
        yield from read_lines(file, stream, most)


def read_lines(
    file: Path, stream: BinaryIO, most: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of every line that is not blank.

    Raises PromptError for a line of more than `most` bytes, or of other text than UTF-8.
    """
    number = 0
    while raw := stream.readline(most + 1):
        number += 1
        if number == 1:
            _check_format(file, raw)
        if len(raw) > most:
            refuse(
                file,
                number,
                f"the line is longer than {most} bytes",
                "shorten it, or check that each line ends in a newline",
            )
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            refuse(file, number, f"byte {error.start} is not UTF-8", "save the file as UTF-8")
        if text.strip():
            yield number, text


def _check_format(file: Path, first: bytes) -> None:
    """Raise PromptError for a file of another format, by its first line."""
    for magic, (name, command) in OTHER_FORMATS.items():
        if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(magic):
            raise PromptError(
                f"{file} is {name}, and prompts are read from JSONL, Parquet and Arrow",
                hint="convert it: " + command.format(quoted=shlex.quote(file.name)),
            )
