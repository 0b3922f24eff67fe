"""Parquet files of the positions of a store, for DuckDB, pandas and every reader of Parquet.

A file gets its name when it is complete. In a folder each segment has a file, whose name follows
from what is in it: the same call resumes, and makes nothing twice.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.engine.errors import ConfigError, IdentityError, StoreError
from logitcask.engine.exchange.positions import (
    COLUMNS,
    TEXT,
    Block,
    Column,
    Selection,
    blocks,
    select,
    token_texts,
)
from logitcask.engine.models.digests import flush
from logitcask.engine.models.identity import digest, resolve_model, tokenizer_digest
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.store import Segment, Snapshot, Store
from logitcask.engine.store.format.ragged import starts
from logitcask.engine.store.temporary import temporary_in
from logitcask.engine.types import Progress, no_progress

SUFFIX = ".parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """The counts of an export."""

    rollouts: str
    teacher: str
    """Empty without scores."""
    log_number: int
    files: int
    there: int
    """Files of an earlier call, which were not made again."""
    positions: int
    bytes: int


def export_parquet(
    store: Store,
    target: Path,
    *,
    snapshot: Snapshot | None = None,
    rollouts: str | None = None,
    teacher: str | None = None,
    tokenizer: str | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> ExportReport:
    """Write the positions of a snapshot into a file, or into a folder a file for each segment.

    A target that ends in .parquet is one file, which `force` replaces. tokenizer: folder or hub id,
    for a column of the tokens' texts. Raises ConfigError as `select`, without pyarrow, or where the
    target exists; IdentityError for another tokenizer than the student's; StoreError where the
    target cannot be written.
    """
    arrow = need("pyarrow")
    snapshot = store.head() if snapshot is None else snapshot
    selection = select(snapshot, rollouts=rollouts, teacher=teacher)
    loaded = None if tokenizer is None else _tokenizer(tokenizer, selection)
    with_text = loaded is not None
    names = [
        file_name(selection, index, list(COLUMNS), with_text)
        for index in range(len(selection.segments))
    ]
    schema = _schema(arrow, with_text)
    texts: dict[int, str] = {}

    def tables(index: int) -> Iterator[Any]:
        for block in blocks(store, selection, index):
            yield _table(arrow, schema, block, loaded, texts)

    written = write_files(target, names, schema, tables, force=force, progress=progress)
    return report_of(selection, snapshot, written)


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The files of an export."""

    paths: tuple[Path, ...]
    there: int
    """Files of an earlier call."""


def write_files(
    target: Path,
    names: Sequence[str],
    schema: Any,
    tables: Callable[[int], Iterator[Any]],
    *,
    force: bool,
    progress: Progress,
) -> Written:
    """Write the tables of segments into a file, or into a folder a file for each segment.

    names: file names of the segments; tables: index of a segment -> its Arrow tables of `schema`.
    Raises ConfigError where the target exists, StoreError where it cannot be written.
    """
    parquet = need("pyarrow.parquet")
    single = target.suffix == SUFFIX
    if single:
        _check_file(target, force)
        parts = {target: list(range(len(names)))}
    else:
        _check_folder(target, names)
        parts = {target / name: [i] for i, name in enumerate(names)}
    there, done = 0, 0
    for path, indices in parts.items():
        if not single and path.exists():
            there += 1
        else:
            temporary = None
            try:
                temporary = temporary_in(path.parent)
                with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
                    for index in indices:
                        progress("export", done + (index if single else 0), len(names))
                        for table in tables(index):
                            writer.write_table(table)
                flush(temporary)
                os.replace(temporary, path)
            except OSError as error:
                raise StoreError(
                    f"cannot write {path}: {error.strerror or error}",
                    hint="make room or give another target, then export again",
                ) from error
            finally:
                if temporary is not None:
                    temporary.unlink(missing_ok=True)
        done += len(indices)
    progress("export", len(names), len(names))
    return Written(paths=tuple(parts), there=there)


def report_of(selection: Selection, snapshot: Snapshot, written: Written) -> ExportReport:
    """Return the counts of an export."""
    return ExportReport(
        rollouts=selection.rollouts,
        teacher=selection.teacher or "",
        log_number=snapshot.number,
        files=len(written.paths),
        there=written.there,
        positions=sum(each.counts["P"] for each, _ in selection.segments),
        bytes=sum(path.stat().st_size for path in written.paths),
    )


def need(package: str) -> Any:
    """Import a package of the extra `data`; ConfigError where it is missing."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(
            "Parquet needs the package pyarrow", hint='pip install -e ".[data]"'
        ) from error


def file_name(selection: Selection, index: int, *form: Any) -> str:
    """Return the name of a segment's file: everything that its rows depend on is in it.

    form: the columns, and what else decides their values.
    """
    segment, scores = selection.segments[index]
    names = [selection.rollouts, selection.teacher or "", [each.seg_id for each in scores]]
    content = digest([*names, selection.first[index], segment.unit_key, *form])
    return f"{segment.seg_id}-{content.removeprefix('sha256:')[:16]}{SUFFIX}"


def _check_file(target: Path, force: bool) -> None:
    if target.is_dir() or (target.exists() and not force):
        raise ConfigError(
            f"{target} exists already", hint="give another file, or --force to replace this one"
        )


def _check_folder(folder: Path, names: Sequence[str]) -> None:
    """Raise ConfigError where a folder has Parquet files of another export."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder", hint=f"give a folder, or a file *{SUFFIX}")
    found = sorted(path.name for path in folder.glob(f"*{SUFFIX}")) if folder.exists() else []
    if others := sorted(set(found) - set(names)):
        raise ConfigError(
            f"{folder} holds {others[0]}, which is not of this export",
            hint="give another folder: a query of this one would read both",
        )


def _tokenizer(name: str, selection: Selection) -> Any:
    """Load a tokenizer. Raises IdentityError unless its digest is that of all rollouts."""
    path = resolve_model(name, weights=False)
    tokenizer = load_tokenizer(path)
    ours = tokenizer_digest(tokenizer)
    for segment, _ in selection.segments:
        if (theirs := _recorded(segment)) != ours:
            raise IdentityError(
                f"the tokenizer of {path} is not that of these rollouts, {theirs}",
                hint="give the student's, a folder or hub id, with --tokenizer",
            )
    return tokenizer


def _recorded(segment: Segment) -> str:
    student = dict(segment.provenance).get("student")
    return str(student.get("tokenizer", "")) if isinstance(student, dict) else ""


def _schema(arrow: Any, text: bool) -> Any:
    """Return the Arrow schema of COLUMNS."""

    def kind(name: str) -> Any:
        if name.startswith("list<"):
            return arrow.list_(kind(name[5:-1]))
        return arrow.bool_() if name == "bool" else getattr(arrow, name)()

    return arrow.schema([(name, kind(of)) for name, of in _columns(text)])


def _columns(text: bool) -> Iterator[tuple[str, str]]:
    for name, of in COLUMNS.items():
        yield name, of
        if text and name == "token":
            yield TEXT, "string"


def _table(arrow: Any, schema: Any, block: Block, tokenizer: Any, texts: dict[int, str]) -> Any:
    """Return the Arrow table of a block."""
    tokens = block["token"]
    assert tokens is not None, "every position has a token"
    count = len(tokens.values)
    columns = dict(block)
    if tokenizer is not None:
        columns[TEXT] = Column(token_texts(tokenizer, tokens.values, texts))
    arrays = [_array(arrow, field.type, columns[field.name], count) for field in schema]
    return arrow.Table.from_arrays(arrays, schema=schema)


def _array(arrow: Any, kind: Any, column: Column | None, count: int) -> Any:
    if column is None:
        return arrow.nulls(count, kind)
    null = None if column.valid is None else ~column.valid
    if column.counts is None:
        return arrow.array(column.values, kind, mask=null, from_pandas=False)
    offsets = arrow.array(starts(column.counts).astype(np.int32))
    values = arrow.array(column.values, kind.value_type)
    mask = None if null is None else arrow.array(null)
    return arrow.ListArray.from_arrays(offsets, values, type=kind, mask=mask)
