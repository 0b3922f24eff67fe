"""The runs and the store that a report is about, read once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcask.engine.errors import IntegrityError
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.training.run_dir.files import METRICS


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """One run: its record, its lines, and the store that it read."""

    path: Path
    name: str
    record: Mapping[str, Any]
    """run.json."""
    metrics: tuple[Mapping[str, Any], ...]
    """Lines of metrics.jsonl that are whole: a run that goes on may be in the middle of one."""
    store: Store | None
    snapshot: Snapshot | None
    """The newest one of the store; None without a store."""
    store_missing: str = ""
    """Why there is no store."""


def read_lines(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Read a file of JSON lines; one that is not there has none, an unfinished last line is left.

    Raises IntegrityError for a line that is no JSON object.
    """
    if not path.is_file():
        return ()
    found = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise IntegrityError(
                f"{path}: line {number} is no JSON object",
                hint="restore the file from a copy; the run itself reads it no more",
            )
        found.append(row)
    return tuple(found)


def metrics_of(run: Path) -> tuple[Mapping[str, Any], ...]:
    """Return the whole lines of metrics.jsonl of the folder of a run."""
    return read_lines(run / METRICS)
