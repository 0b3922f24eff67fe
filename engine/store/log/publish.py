"""The moment of a commit: a record under the next free number, and what a name stands for."""

import os
import socket
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.record as record
import logitcask.engine.store.log.root as root
from logitcask.engine.errors import IdentityError, IntegrityError, StoreError
from logitcask.engine.models.fingerprint import compare_records
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.format.segment import Segment
from logitcask.engine.store.log.log import Log
from logitcask.engine.store.storage.base import Storage

NAME_BINDINGS = {
    schema.ROLLOUT: (("set", "digest"), ("student", "root")),
    schema.SCORE: (("teacher", "weights"), ("role",), ("context",)),
}
"""What a name stands for: paths into the lineage that every segment of the name shares."""
_TRIES = 50
"""Refusals in a row by a medium that then shows nothing."""


def append(
    storage: Storage, log: Log, build_record: Callable[[], Mapping[str, Any] | None]
) -> int | None:
    """Publish the record that `build_record` makes for the newest log; return its number, or None.

    `build_record` returns the keys `adds`, `retires`, `sweeps` or `tags`, or None for no record.
    It is called again when another writer was faster, so every record is decided on the
    state that it follows. A record whose response was lost is recognised by its digest, and is not
    written twice.
    """
    writer = {"host": socket.gethostname(), "pid": os.getpid(), "versions": _versions()}
    ticket, refused = uuid.uuid4().hex, 0
    log.refresh()
    while (content := _build(log, build_record)) is not None:
        number = len(log)
        body = {
            "n": number,
            "prev": log.prev(),
            "commit_id": ticket,
            "time": root.now(),
            "writer": writer,
            **{"adds": [], "retires": [], "sweeps": [], "tags": {}},
            **content,
        }
        try:
            data = record.encode_record(body)
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"a record that is not JSON ({error})",
                hint="use strings, finite numbers, lists and objects in unit and lineage",
            ) from error
        if len(data) > schema.MAX_RECORD_BYTES:
            raise StoreError(
                f"a log record of {len(data)} bytes, at most {schema.MAX_RECORD_BYTES}",
                hint="put less into one record: into a unit's lineage, or delete in parts",
            )
        # What the reader would refuse is not published.
        ours = record.parse(data, log.where(number), number=number, prev=log.prev())
        storage.create(f"log/{record.file_name(number)}", data)
        log.refresh()
        if len(log) > number and log.sha256(number) == ours.sha256:
            break
        refused = refused + 1 if len(log) == number else 0
        if refused > _TRIES:
            raise StoreError(
                f"{log.where(number)} is refused as taken, and is not there",
                hint="check the file system or the object store, then run the same again",
            )
    # Our own record, or the one that left nothing to say; durable before it is acknowledged.
    storage.settle("log")
    log.write_bundles()
    return None if content is None else number


def _build(
    log: Log, build_record: Callable[[], Mapping[str, Any] | None]
) -> Mapping[str, Any] | None:
    """say(), once more where gc has removed meanwhile what it was just looking at."""
    number = len(log)
    try:
        return build_record()
    except IntegrityError:
        log.refresh()
        if len(log) == number:
            raise
        return build_record()


def check_name_identity(log: Log, new: Segment) -> None:
    """A name means one thing for ever. Raises IdentityError."""
    bound = log.first(new.kind, new.name)
    what = "rollouts" if new.kind == schema.ROLLOUT else "teacher"
    for path in NAME_BINDINGS[new.kind]:
        ours = _look_up(new.lineage, path)
        if bound is not None and (theirs := _look_up(bound.lineage, path)) != ours:
            raise IdentityError(
                f"{what} name {new.name!r} stands for {'.'.join(path)} = {theirs}, not {ours}",
                hint="use another name for this one, or a new store",
            )
    if bound is not None:
        _check_behaviour(bound, new)
    drawn = new.layout == schema.SAMPLED
    if bound is not None and (bound.layout == schema.SAMPLED) != drawn:
        kinds = ("drawn ids", "a teacher's best ids")
        raise IdentityError(
            f"{what} name {new.name!r} stands for {kinds[drawn]}, not {kinds[not drawn]}",
            hint="use another name for this one",
        )


def _check_behaviour(bound: Segment, new: Segment) -> None:
    """Weights that are elsewhere have no digest: what a served teacher said when its name was begun
    stands for them.
    """
    theirs, ours = (each.lineage.get("behaviour") for each in (bound, new))
    if not isinstance(theirs, Mapping) or not isinstance(ours, Mapping):
        return
    found, allowed = compare_records(theirs, ours)
    if found > allowed:
        raise IdentityError(
            f"the teacher is not the one that began the scores named {new.name!r}: log-probs of a "
            f"fixed probe differ by {found:.3g} nats, and {allowed:.3g} is what one model may "
            "differ by",
            hint="Other weights, another revision, an adapter, quantisation or a temperature is "
            "served: serve what was served; or score it under another --teacher name, with a "
            "--revision that tells it from the first.",
        )


def _look_up(lineage: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    found: Any = lineage
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            raise StoreError(
                f"lineage lacks {'.'.join(path)}", hint="record what the segment was made from"
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
