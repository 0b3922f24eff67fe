"""Reads everything that the log names, and tells what it does not name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.claims as claims
import logitcask.engine.store.log.log as log
import logitcask.engine.store.log.record as record
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.format.segment import Segment
from logitcask.engine.store.log.snapshot import ScoreSegments
from logitcask.engine.store.storage.base import STAGING
from logitcask.engine.store.store import Store
from logitcask.engine.types import Progress, no_progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a verified store holds."""

    segments: int
    positions: int
    """Response positions of the rollout segments."""
    files: int
    bytes: int
    """Of all files that a commit made: segments, log records, bundles."""
    decoded: bool
    """Whether every array was decoded, beside being what was committed to the bit."""
    orphans: tuple[str, ...]
    """Paths relative to the store that no record names: left by a writer that died, or strange."""


def verify(
    store: Store,
    *,
    deep: bool = False,
    tell: Callable[[IntegrityError], None] = lambda _: None,
    progress: Progress = no_progress,
) -> Report:
    """Compares every file of every segment with its digest, deleted ones too; deep: decodes it too.

    `tell` hears of every damaged segment; the first is raised in the end. Raises IntegrityError.
    """
    damaged: list[IntegrityError] = []
    snapshot = store.head()
    all_score_segments: dict[tuple[str, str, str], ScoreSegments] = {}
    every = store.log.standing()
    standing = {each.folder: each for each in every}
    for done, each in enumerate(every if deep else list(standing.values())):
        progress("verify", done, len(every))
        try:
            if deep:
                before = (
                    all_score_segments[each.name, each.base, each.extends] if each.extends else ()
                )
                all_score_segments[each.name, each.base, each.seg_id] = (*before, each)
                store.check_arrays(each, store.read_arrays(each), before)
            else:
                store.read_files(each)
        except IntegrityError as error:
            tell(error)
            damaged.append(error)
        except StoreError:
            if not store.is_removed(each):
                raise
            # gc is at work meanwhile.
            standing.pop(each.folder, None)
    progress("verify", len(every), len(every))
    if damaged:
        raise damaged[0]
    records = list(_records(store, snapshot.number))
    return Report(
        segments=len(standing),
        positions=sum(s.counts["P"] for s in standing.values() if s.kind == schema.ROLLOUT),
        files=len(records) + sum(len(each.files) for each in standing.values()),
        bytes=sum(records) + sum(each.size for each in standing.values()),
        decoded=deep,
        orphans=_orphans(store, standing),
    )


def _records(store: Store, last: int) -> Iterator[int]:
    """Bytes of each record and each bundle, all read again: a log is folded from either."""
    together: list[bytes] = []
    for number in range(last + 1):
        name = f"log/{record.file_name(number)}"
        data = store.storage.read(name, schema.MAX_RECORD_BYTES)
        where = store.storage.where(name)
        if data is None or record.decode_record(data, where)[1] != store.log.sha256(number):
            raise IntegrityError(f"{where}: missing, or another record", hint=record.BROKEN)
        yield len(data)
        together.append(data)
        if len(together) == log.BUNDLE:
            yield _bundle(store, log.bundle_name(number + 1 - log.BUNDLE), b"".join(together))
            together.clear()


def _bundle(store: Store, name: str, records: bytes) -> int:
    """Bytes of a bundle that holds these records; 0 where it is not there, as it may be."""
    data = store.storage.read(name, schema.MAX_BUNDLE_BYTES)
    if data not in (None, records):
        raise IntegrityError(
            f"{store.storage.where(name)}: not the records that are in log/",
            hint="remove this file: the records in log/ hold all",
        )
    return len(data or b"")


def _orphans(store: Store, standing: dict[str, Segment]) -> tuple[str, ...]:
    storage = store.storage
    found = [f"{STAGING}/{name}" for name in storage.names(STAGING)]
    found += claims.unknown_files(storage)
    for name in storage.names("log"):
        number = record.number_of(name)
        if number is None:
            found.append(f"log/{name}")
    for kind in schema.KINDS:
        for name in storage.names(f"seg/{kind}"):
            folder = f"seg/{kind}/{name}"
            if folder not in standing:
                found.append(folder)
                continue
            inside = {f"{folder}/{file}" for file in standing[folder].files}
            found += [each.name for each in storage.files(folder) if each.name not in inside]
    return tuple(found)
