"""The runs and the store that a report is about, read once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from logitcask.engine.config.runner import LOGS, TIMELINE
from logitcask.engine.errors import ConfigError, IntegrityError, LogitcaskError
from logitcask.engine.models.digests import read_json
from logitcask.engine.models.identity import read_metadata
from logitcask.engine.store import Snapshot, Store, open_store
from logitcask.engine.store.store import holds_store
from logitcask.engine.training.run_dir.files import (
    EVALUATIONS,
    LEDGER,
    LOCK,
    METRICS,
    RUN,
    TEACHER,
)

ABLATION = "plan.json"
"""File of the folder of an ablation, whose runs are COMBINATION/seed-N."""
TEACHER_ACCURACY = "eval/teacher_accuracy"
"""The teacher's accuracy on the prompts of an evaluation, in lines of evaluations.jsonl."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """One run: its record, its lines, and the store that it read."""

    path: Path
    name: str
    """Distinct among the runs of a report."""
    record: Mapping[str, Any]
    """run.json; empty for a store alone."""
    metrics: tuple[Mapping[str, Any], ...]
    """Lines of metrics.jsonl that are whole: a run that goes on may be in the middle of one."""
    ledger: tuple[Mapping[str, Any], ...] = ()
    """Lines of ledger.jsonl, as whole."""
    evaluations: tuple[Mapping[str, Any], ...] = ()
    """Lines of evaluations.jsonl, as whole."""
    metadata: Mapping[str, Any] | None = None
    """logitcask.json, which is written last; None = the student is not saved."""
    locked: bool = False
    """The lock of a process that writes is there: the run goes on, or it was killed."""
    store: Store | None
    snapshot: Snapshot | None
    """The newest one of the store; None without a store."""
    store_missing: str = ""
    """Why there is no store."""

    @property
    def config(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the settings, section -> key -> value; empty for a run without commands."""
        found: Mapping[str, Mapping[str, Any]] = self.record.get("config") or {}
        return found

    @property
    def updates(self) -> tuple[Mapping[str, Any], ...]:
        """Return the lines of updates, in their order."""
        return tuple(line for line in self.metrics if "loss" in line)

    @property
    def evaluated(self) -> tuple[Mapping[str, Any], ...]:
        """Return the lines of evaluations, by update."""
        lines = [line for line in self.metrics if "loss" not in line]
        return tuple(sorted((*lines, *self.evaluations), key=step_of))

    @property
    def done(self) -> int:
        """Return the number of the newest update that has a line."""
        return max((step_of(line) for line in self.updates), default=0)

    @property
    def planned(self) -> int | None:
        """Return the number of updates of the whole run, None where run.json has none."""
        return self.record.get("updates")


def step_of(line: Mapping[str, Any]) -> int:
    """Return the number of updates before a line was written."""
    return int(line.get("progress/step") or 0)


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (path / RUN).is_file()


def find_runs(target: str | Path) -> tuple[Path, ...]:
    """Return the folders of the runs that a target names; () for a store.

    A run is itself, an ablation is all of its runs. Raises ConfigError for another folder, or none.
    """
    if "://" in str(target):
        return ()
    path = Path(target)
    if is_run(path):
        return (path,)
    if (path / ABLATION).is_file() and (found := sorted(path.glob(f"*/seed-*/{RUN}"))):
        return tuple(file.parent for file in found)
    if path.is_dir() and holds_store(path):
        return ()
    if not path.is_dir():
        raise ConfigError(
            f"{path} is no folder" if path.exists() else f"{path} is not there",
            hint="give the folder of a run (it holds run.json), of an ablation, or a store",
        )
    # Folders of a loop whose trainer has not begun, of a demo, or of a user's own.
    near = sorted({*path.glob(f"*/{RUN}"), *path.glob(f"*/*/{RUN}")})[:3]
    names = sorted(each.name for each in path.iterdir())
    content = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) or "nothing"
    hint = "give the folder of a run (it holds run.json), of an ablation, or a store"
    if near:
        hint = f"give a run: {' or '.join(str(each.parent) for each in near)}"
    elif {LOGS, TIMELINE, TEACHER} & {*names}:
        hint = f"the trainer of this loop has not begun; run this again when {RUN} is there"
    raise ConfigError(
        f"{path} holds {content} and neither {RUN} nor format.json: it is no run and no store",
        hint=hint,
    )


def open_runs(paths: Sequence[Path]) -> tuple[RunFacts, ...]:
    """Read several runs; their names are distinct. Raises as `open_run`."""
    names = distinct_names([path.resolve() for path in paths])
    return tuple(
        replace(open_run(path), name=name) for path, name in zip(paths, names, strict=True)
    )


def open_run(path: str | Path) -> RunFacts:
    """Read what a run has written; its store may be missing.

    Raises ConfigError for a folder that is no run, IntegrityError for a damaged file.
    """
    path = Path(path)
    if not is_run(path):
        raise ConfigError(f"{path} has no {RUN}: it is no run", hint="give the folder of a run")
    record = read_json(path / RUN, hint="restore it from a copy, or make the run again")
    store, snapshot, missing = _store_of(record)
    return RunFacts(
        path=path,
        name=path.resolve().name,
        record=record,
        metrics=read_lines(path / METRICS),
        ledger=read_lines(path / LEDGER),
        evaluations=read_lines(path / EVALUATIONS),
        metadata=read_metadata(path),
        locked=(path / LOCK).exists(),
        store=store,
        snapshot=snapshot,
        store_missing=missing,
    )


def store_alone(url: str | Path) -> RunFacts:
    """Return a store as a run without a record. Raises the errors of an opening of a store."""
    store = open_store(url)
    name = str(url).rstrip("/").rpartition("/")[2] or str(url)
    return RunFacts(
        path=Path(name), name=name, record={}, metrics=(), store=store, snapshot=store.head()
    )


def _store_of(record: Mapping[str, Any]) -> tuple[Store | None, Snapshot | None, str]:
    """Return store, newest snapshot, and the reason where there are none."""
    url = ((record.get("config") or {}).get("store") or {}).get("url")
    if not url:
        return None, None, f"{RUN} does not say where its store is"
    try:
        store = open_store(url)
        snapshot = store.head()
    except LogitcaskError as error:  # the page shows it: a run is more than its store
        return None, None, error.cause
    if store.uuid != record.get("store"):
        return None, None, f"{url} holds store {store.uuid}, and the run read {record.get('store')}"
    return store, snapshot, ""


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of different paths that are all different."""
    assert len({*paths}) == len(paths), "each path comes once"
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path.parts[-length:]).replace("//", "/") for path in paths]


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
