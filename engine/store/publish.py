"""The moment of a commit: a record linked to the next free number, and what a name stands for."""

import os
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import logitcask.engine.store.files as files
import logitcask.engine.store.record as record
import logitcask.engine.store.root as root
import logitcask.engine.store.schema as schema
from logitcask.engine.errors import IdentityError, StoreError
from logitcask.engine.identity import canonical
from logitcask.engine.store.log import Log
from logitcask.engine.store.segment import Segment

_BINDINGS = {
    schema.ROLLOUT: (("set", "digest"), ("student", "root")),
    schema.SCORE: (("teacher", "weights"), ("request",)),
}
"""What a name stands for: paths into the lineage that every segment of the name shares."""


def publish(path: Path, log: Log, stage: Path, ticket: str, new: Segment) -> Segment:
    """Links a record to the next free number; the first record of a unit_key wins."""
    writer = {"host": socket.gethostname(), "pid": os.getpid(), "versions": _versions()}
    while True:
        log.refresh()
        winner = log.winner(new.unit_key)
        if winner is not None:
            # Our own, or another's; durable before it is acknowledged.
            files.fsync_dir(path / "log")
            return winner
        check_binding(log, new.kind, new.name, new.lineage)
        number = len(log)
        body = {
            "n": number,
            "prev": log.prev(),
            "commit_id": ticket,
            "time": root.now(),
            "writer": writer,
            "adds": [record.describe(new)],
        }
        try:
            data = record.seal(body)
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"unit or lineage of {new.name!r} is not JSON ({error})",
                remedy="use strings, finite numbers, lists and objects",
            ) from error
        if len(data) > schema.MAX_RECORD_BYTES:
            raise StoreError(
                f"a log record of {len(data)} bytes, at most {schema.MAX_RECORD_BYTES}",
                remedy="put less into the unit's lineage",
            )
        target = record.file_name(number)
        # What the reader would refuse is not published.
        record.parse(data, stage / target, number=number, prev=log.prev())
        files.write_new(stage / target, data)
        files.link(stage / target, path / "log" / target)


def check_binding(log: Log, kind: str, name: str, lineage: Mapping[str, Any]) -> None:
    """A name means one thing for ever. Raises IdentityError."""
    bound = log.first(kind, name)
    for path in _BINDINGS[kind]:
        ours = _look_up(lineage, path)
        if bound is not None and (theirs := _look_up(bound.lineage, path)) != ours:
            what = "rollouts" if kind == schema.ROLLOUT else "teacher"
            raise IdentityError(
                f"{what} name {name!r} stands for {'.'.join(path)} = {theirs}, not {ours}",
                remedy="use another name for this one, or a new store",
            )


def _look_up(lineage: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    found: Any = lineage
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            raise StoreError(
                f"lineage lacks {'.'.join(path)}", remedy="record what the segment was made from"
            )
        found = found[key]
    # Compared as JSON: a tuple and the list that it becomes in the log are one value.
    return canonical(found).decode()


def _versions() -> dict[str, str]:
    """Of what decides the bytes."""
    found = {}
    for name in ("logitcask", "zarr", "numcodecs", "pcodec", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # A source checkout on PYTHONPATH has no metadata of its own.
            found[name] = "unknown"
    return found
