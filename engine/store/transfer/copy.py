"""Copy of a store: the same log, the same objects, in another storage.

Objects come first, then the log in ascending order, so the copy is a store at each moment, at an
older snapshot while the copy runs. A copy that stopped is continued: objects have content addresses
and records have numbers, so both are skipped where they exist. A copy that was written to is no
longer a part of the original; `merge` joins two such stores.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.format_file as format_file
import logitcask.engine.store.log.record as record
from logitcask.engine.errors import StoreError
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.log.log import Log
from logitcask.engine.store.log.snapshot import Snapshot
from logitcask.engine.store.retention import reached
from logitcask.engine.store.storage.base import Storage, holds
from logitcask.engine.store.store import Store
from logitcask.engine.types import Progress, no_progress

CONCURRENT_OBJECTS = 4
"""Segments in memory at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyReport:
    """The state of a copy, and what was copied to it."""

    store: str
    """Path or URL of the copy."""
    snapshot: int
    sha256: str
    """Of the snapshot; equal in the original and in the copy."""
    newest: int
    """The newest snapshot of the copy, which may have been ahead."""
    segments: int
    """Copied now."""
    there: int
    """Segments that the copy had already."""
    records: int
    """Log records copied now."""
    bytes: int
    """Of the copied segments."""


def copy_store(
    store: Store, target: Storage, *, snapshot: Snapshot, progress: Progress = no_progress
) -> CopyReport:
    """Copy a store as of a snapshot to a storage, or continue such a copy.

    Segments that were deleted before it, and that no tag reaches, are left out. Raises StoreError
    where the target holds another store or records of its own, IntegrityError for damage.
    """
    last = last_record(store, target, snapshot.number)
    if format_file.read(target) is None:
        format_file.prepare(target)
    missing, there = absent_objects(store, sizes(target, "seg"), snapshot)
    with ThreadPoolExecutor(CONCURRENT_OBJECTS) as pool:
        copies = pool.map(lambda each: target.put(each.path, store.read_object(each)), missing)
        for done, _ in enumerate(copies):
            progress("copy", done, len(missing))
    progress("copy", len(missing), len(missing))
    new = dict(log_objects(store, last, snapshot.number))
    for name, data in new.items():
        if not target.create(name, data) and not holds(target, name, data):
            raise _diverged(target.where(name), store)
    return CopyReport(
        store=target.url,
        snapshot=snapshot.number,
        sha256=snapshot.sha256,
        newest=max(last, snapshot.number),
        segments=len(missing),
        there=there,
        records=max(0, snapshot.number - last),
        bytes=sum(each.size for each in missing),
    )


def last_record(store: Store, target: Storage, number: int) -> int:
    """Return the number of the last log record of a copy of `store`; -1 = none.

    Raises StoreError where it holds another store, or other records than the store up to `number`.
    """
    identity = format_file.read(target)
    if identity is None:
        return -1
    if identity.sha256 != store.log.sha256(-1):
        raise StoreError(
            f"{target.url} holds another store than {store.url}",
            hint="give another place, or join the two with `logitcask store merge`",
        )
    log = Log(target, identity.sha256)
    log.refresh()
    last = len(log) - 1
    both = min(last, number)
    if log.sha256(both) != store.log.sha256(both):
        raise _diverged(target.url, store)
    return last


def _diverged(where: str, store: Store) -> StoreError:
    return StoreError(
        f"{where} has log records that {store.url} does not have",
        hint="both were written to since the copy: join them with `logitcask store merge`",
    )


def sizes(storage: Storage, folder: str) -> dict[str, int]:
    """Return name -> bytes of all files below a folder."""
    return {each.name: each.size for each in storage.files(folder)}


def absent_objects(
    store: Store, found: Mapping[str, int], snapshot: Snapshot
) -> tuple[list[Segment], int]:
    """Return (segments whose objects a copy lacks, number of those that it has).

    found: name -> bytes of what the copy has.

    Raises StoreError where gc has removed a segment of the snapshot.
    """
    needed = reached(store.log, snapshot.number)
    removed = [each for each in snapshot.segments if store.is_removed(each)]
    if removed:
        raise StoreError(
            f"gc has removed {len(removed)} segments of snapshot {snapshot.number}",
            hint="copy a newer snapshot",
        )
    missing = [each for each in needed.values() if found.get(each.path) != each.size]
    return missing, len(needed) - len(missing)


def log_objects(store: Store, last: int, number: int) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of format.json and the log for a copy that ends at record `last`."""
    if last < 0:
        yield _read(store, format_file.NAME, schema.MAX_FORMAT_BYTES)
    for each in range(last + 1, number + 1):
        yield _read(store, f"log/{record.file_name(each)}", schema.MAX_RECORD_BYTES)


def _read(store: Store, name: str, limit: int) -> tuple[str, bytes]:
    data = store.storage.read(name, limit)
    if data is None:
        raise StoreError(
            f"{store.storage.where(name)} was removed during the copy", hint="run it again"
        )
    return name, data
