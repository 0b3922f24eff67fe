"""Data sets on the Hub through the library `datasets`: hub:ORG/NAME or hub:ORG/NAME@REVISION."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from logitcask.engine.config.prompts import HUB, Columns
from logitcask.engine.errors import PromptError
from logitcask.engine.events import running_step
from logitcask.engine.prompts.arrow import ROWS, choose_split, need, rows
from logitcask.engine.prompts.lines import Texts

FORM = re.compile(rf"{HUB}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


def open_hub(file: Path, columns: Columns, *, streaming: bool) -> tuple[Texts, Mapping[str, Any]]:
    """Return the texts of a data set on the Hub, or of its copy in the cache, and its revision.

    streaming: read only the rows that are taken, and keep none; else download it once. Raises
    PromptError for one that cannot be found or read, or is of another revision.
    """
    parts = FORM.fullmatch(str(file))
    if parts is None:
        raise PromptError(
            f"{file} names no data set", hint="write hub:ORG/NAME or hub:ORG/NAME@REVISION"
        )
    name, revision = parts.groups()
    if Path(name).exists():
        raise PromptError(
            f"{file}: {name} is a folder here, and `datasets` would read it in place of the Hub",
            hint=f"give its path, --prompts ./{name}, or run the command in another folder",
        )
    datasets = need("datasets")
    try:
        # Without code of the data set: `datasets` 4 and later run none.
        builder = datasets.load_dataset_builder(
            name, columns.subset or None, revision=revision or None
        )
        if streaming:
            splits = builder.as_streaming_dataset()
        else:
            # One progress is enough.
            shown = not datasets.utils.are_progress_bars_disabled()
            datasets.utils.disable_progress_bars()
            try:
                with running_step(f"download {name}"):
                    builder.download_and_prepare()
            finally:
                if shown:
                    datasets.utils.enable_progress_bars()
            splits = builder.as_dataset()
    # The Hub, its files and their readers raise anything from OSError to bare Exception.
    except Exception as error:
        raise _unreadable(file, error) from error
    commit = str(builder.hash)
    # Without a connection `datasets` takes the newest copy in its cache, of whatever revision.
    cached = type(builder).__module__.endswith(".cache")
    if revision and not commit.startswith(revision) and (cached or COMMIT.fullmatch(revision)):
        raise PromptError(
            f"{file}: the copy in the cache of `datasets` is of revision {commit}",
            hint="connect to the Hub, or leave the revision out",
        )
    split = choose_split(file, list(splits), columns.split)
    chosen = splits[split].with_format("arrow")

    def tables() -> Iterator[Any]:
        try:
            yield from chosen.iter(batch_size=ROWS)
        except Exception as error:
            raise _unreadable(file, error) from error

    return lambda: rows(file, tables()), {"split": split, "revision": commit}


def _unreadable(file: Path, error: Exception) -> PromptError:
    cause = " ".join(str(error).split())
    return PromptError(
        f"{file} cannot be read: {type(error).__name__}: {cause:.300}",
        hint="check name, --subset, revision and connection; a private or gated data set needs "
        "HF_TOKEN in the environment",
    )
