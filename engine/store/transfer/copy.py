"""Copy of a store: the same log, the same objects, in another storage.

Objects come first, then the log in ascending order, so the copy is a store at each moment, or not
yet one. A copy that stopped is continued: objects have content addresses
and records have numbers, so both are skipped where they exist. A copy that was written to is no
longer a part of the original; `merge` joins two such stores.
"""

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.bundles as bundles
import logitcask.engine.store.log.format_file as format_file
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.log.log import Log
from logitcask.engine.store.log.record import file_name
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
    _copy_log(store, target, last, snapshot.number)
    if last_record(store, target, snapshot.number) < snapshot.number:
        raise _diverged(target.url, store)
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
    store.log.refresh()
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


def log_objects(
    store: Store, number: int, there: Collection[str] = ()
) -> Iterator[tuple[str, bytes | None]]:
    """Yield (name, bytes) of format.json and the fewest objects that hold records 0..number.

    Bundles come before format.json: until then there is no store to write to. there: names that
    the copy has already, yielded with None.
    """
    pieces = list(bundles.pieces(0, number + 1))
    for piece in pieces:
        if piece[0] > 1:
            yield from _bundles(store, *piece, there)
    name = format_file.NAME
    yield name, None if name in there else _format(store)
    for piece in pieces:
        if piece[0] == 1:
            yield from _bundles(store, *piece, there)


def _bundles(
    store: Store, level: int, first: int, there: Collection[str]
) -> Iterator[tuple[str, bytes | None]]:
    """Yield (name, bytes) of a bundle or a record, or of those below where it is too large."""
    name = f"log/{file_name(first)}" if level == 1 else bundles.name_of(level, first)
    if name in there:
        yield name, None
        return
    if level == 1:
        yield name, store.log.read_record(first)
        return
    heads, bodies = bundles.read_lines(store.storage, level, first)
    if not store.log.has(first, zip(heads, bodies, strict=True)):
        raise IntegrityError(
            f"{store.storage.where(name)}: other records than those of the log",
            hint="run `logitcask store verify`",
        )
    data = bundles.build(heads, bodies, first)
    if data is not None:
        yield name, data
        return
    for piece in bundles.below(level, first):
        yield from _bundles(store, *piece, there)


def _format(store: Store) -> bytes:
    data = store.storage.read(format_file.NAME, schema.MAX_FORMAT_BYTES)
    if data is None:
        where = store.storage.where(format_file.NAME)
        raise StoreError(
            f"{where} was removed during the copy", hint="check which process deletes files there"
        )
    return data


def _copy_log(store: Store, target: Storage, last: int, number: int) -> None:
    """Copy records last+1..number: a new copy gets bundles, another one each record in turn."""
    if last < 0:
        for name, data in log_objects(store, number):
            _create(store, target, name, data or b"")
        return
    for each in range(last + 1, number + 1):
        _create(store, target, f"log/{file_name(each)}", store.log.read_record(each))
        bundles.write(target, each + 1)


def _create(store: Store, target: Storage, name: str, data: bytes) -> None:
    if not target.create(name, data) and not holds(target, name, data):
        raise _diverged(target.where(name), store)
