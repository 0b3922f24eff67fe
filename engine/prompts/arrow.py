"""Rows of Parquet and Arrow files as lines of JSON; folders of Parquet and of `datasets`.

Only text has a JSON form: bytes, pictures and sounds are refused by row. Arrow fills the keys that
an object lacks with null, so a null inside an object is left out, and so is one in a column.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from logitcask.engine.config.parse.strict_json import parse_json
from logitcask.engine.errors import ConfigError, PromptError
from logitcask.engine.prompts.lines import MAX_LINE_BYTES, Texts, refuse

MAGIC = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
"""First bytes of Parquet, of Arrow's file format and of its stream, which `datasets` writes."""
ROWS = 64
"""Rows that are decoded at once."""
BUFFER = 1 << 20
"""Bytes of each column that are read at once."""
PART = re.compile(r"(.*?)[-_.]?\d+(-of-\d+)?([-.][0-9a-f]{8}.*)?")
"""Stem of one of many files, such as train-00000-of-00002: the name of the split comes first."""
MEDIA = {"bytes", "path"}
"""Keys of a picture, sound, video or document in `datasets`."""
NO_TEXT = "remove the column, or write what it says as text: models get text only"


def need(package: str) -> Any:
    """Import a package of the extra `data`; ConfigError where it is missing."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"prompts of this format need the package {package.split('.')[0]}",
            hint='pip install -e ".[data]"',
        ) from error


def open_folder(folder: Path, split: str) -> tuple[Texts, Mapping[str, Any]]:
    """Return the texts of a folder of Parquet, or of one that `datasets` saved, and its identity.

    Raises PromptError for any other folder, and for a split that is not there; OSError.
    """
    splits: dict[str, list[Path]] = {}
    found: dict[str, Any] = {}
    if (file := folder / "dataset_dict.json").is_file():
        names = [Path(str(name)).name for name in _listed(file, "splits")]
        folder = folder / choose_split(folder, names, split)
    if (state := folder / "state.json").is_file():
        files = _listed(state, "_data_files")
        parts = [each.get("filename") if isinstance(each, dict) else None for each in files]
        # No path is taken from data.
        if any(not isinstance(each, str) or Path(each).name != each for each in parts):
            raise PromptError(
                f"{state} names files outside of its folder",
                hint="save the data set again with save_to_disk",
            )
        paths = [folder / str(each) for each in parts]
        if (fingerprint := _read(state).get("_fingerprint")) is not None:
            found["fingerprint"] = str(fingerprint)[:80]
        return partial(texts, folder, paths), found
    for path in sorted(folder.glob("*.parquet")):
        part = PART.fullmatch(path.stem)
        splits.setdefault(part[1] if part else path.stem, []).append(path)
    if not splits:
        raise PromptError(
            f"{folder} holds neither Parquet files nor a data set of `datasets`",
            hint="give the folder that holds the .parquet files, or one of save_to_disk",
        )
    return partial(texts, folder, splits[choose_split(folder, list(splits), split)]), found


def choose_split(where: Path, names: Sequence[str], split: str) -> str:
    """Return the split; PromptError for an unknown one, and where none is named of several."""
    if split in names or (not split and len(names) == 1):
        return split or names[0]
    raise PromptError(
        f"split = {split!r}: {where} has the splits {', '.join(map(repr, names)) or 'none'}",
        hint="name one of them: --split (of [eval]: --eval-split)",
    )


def _listed(file: Path, key: str) -> list[Any]:
    values = _read(file).get(key)
    if not isinstance(values, list):
        raise PromptError(
            f"{file} lists no {key}", hint="save the data set again with save_to_disk"
        )
    return values


def _read(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        text = stream.read(MAX_LINE_BYTES)
    try:
        values = parse_json(text.decode())
    except ValueError as error:
        raise PromptError(
            f"{file} is not JSON: {error}", hint="save the data set again with save_to_disk"
        ) from error
    return values if isinstance(values, dict) else {}


def texts(
    where: Path, files: Iterable[Path], most: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, str]]:
    """Yield (row from 0, JSON) of Parquet and Arrow files; raises PromptError.

    most: characters of the JSON of a row, at most.
    """
    pyarrow = need("pyarrow")

    def batches() -> Iterator[Any]:
        for file in files:
            try:
                yield from _batches(file)
            except (pyarrow.ArrowException, OSError) as error:
                # Both are of many lines at times.
                cause = str(error).partition("\n")[0]
                raise PromptError(
                    f"{file} cannot be read: {cause:.300}",
                    hint="write the file again: it is damaged, or of another format",
                ) from error

    yield from rows(where, batches(), most)


def _batches(file: Path) -> Iterator[Any]:
    with file.open("rb") as stream, ExitStack() as stack:
        first = stream.read(8)
        if first.startswith(MAGIC[0]):
            # By default it reads all row groups ahead, which is the whole file.
            whole = need("pyarrow.parquet").ParquetFile(file, pre_buffer=False, buffer_size=BUFFER)
            yield from stack.enter_context(whole).iter_batches(batch_size=ROWS)
            return
        ipc = need("pyarrow.ipc")
        mapped = stack.enter_context(need("pyarrow").memory_map(str(file)))
        if first.startswith(MAGIC[1]):
            reader = stack.enter_context(ipc.open_file(mapped))
            yield from (reader.get_batch(each) for each in range(reader.num_record_batches))
        else:
            yield from stack.enter_context(ipc.open_stream(mapped))


def rows(
    where: Path, tables: Iterable[Any], most: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, str]]:
    """Yield (row from 0, JSON) of tables or batches of Arrow; raises PromptError by row."""
    number = 0
    for table in tables:
        names = table.schema.names
        if len(set(names)) < len(names):
            raise PromptError(f"{where} has two columns of one name", hint="rename one of them")
        for start in range(0, table.num_rows, ROWS):
            part = table.slice(start, ROWS)
            try:
                columns = [column.to_pylist() for column in part.columns]
            except (ValueError, ArithmeticError) as error:  # nanoseconds, which Python lacks
                refuse(
                    where, number, f"from it on: {error}", "write such values as text", unit="row"
                )
            for values in zip(*columns, strict=True):
                yield number, _text(where, number, table.schema, values, most)
                number += 1


def _text(where: Path, number: int, schema: Any, values: Sequence[Any], most: int) -> str:
    """Return the JSON of one row, columns without a value left out."""

    def stop(field: str, cause: str, hint: str) -> Any:
        refuse(where, number, f'field "{field}": {cause}', hint, unit="row")

    row = {
        each.name: plain(value, each.type, each.name, stop)
        for each, value in zip(schema, values, strict=True)
        if value is not None
    }
    text = json.dumps(row, ensure_ascii=False)
    if len(text) > most:
        cause = f"its text is longer than {most} characters"
        refuse(where, number, cause, "shorten it, or remove columns", unit="row")
    return text


def plain(value: Any, kind: Any, field: str, stop: Callable[[str, str, str], Any]) -> Any:
    """Return a value of an Arrow type as JSON has it; calls `stop` for what is not text."""
    types = need("pyarrow.types")
    if value is None:
        return None
    if types.is_dictionary(kind):
        return plain(value, kind.value_type, field, stop)
    if types.is_struct(kind):
        if {each.name for each in kind} == MEDIA:
            return stop(field, "it is a picture, a sound or another file, no text", NO_TEXT)
        inner = {e.name: plain(value[e.name], e.type, f"{field}.{e.name}", stop) for e in kind}
        return {name: each for name, each in inner.items() if each is not None}
    if types.is_map(kind):
        items = ((key, plain(each, kind.item_type, f"{field}.{key}", stop)) for key, each in value)
        return {str(key): each for key, each in items}
    if isinstance(value, list):
        inner_of = partial(plain, kind=kind.value_type, stop=stop)
        return [inner_of(each, field=f"{field}[{at}]") for at, each in enumerate(value)]
    if getattr(kind, "extension_name", "") == "arrow.json":
        try:
            return parse_json(value)
        except ValueError as error:
            return stop(field, f"not valid JSON: {error}", "write JSON, or text")
    if isinstance(value, bool | int | float | str):
        return value
    if types.is_temporal(kind) and hasattr(value, "isoformat"):
        return value.isoformat()
    if types.is_decimal(kind):
        return str(value)
    return stop(field, f"it is of type {kind}, no text", NO_TEXT)
