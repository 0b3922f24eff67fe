"""Verification of all objects that the log names, and a list of those that it does not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.format.segment as segments
import logitcask.engine.store.log.bundles as bundles
import logitcask.engine.store.log.claims as claims
import logitcask.engine.store.log.record as record
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.log.lines import BROKEN
from logitcask.engine.store.log.snapshot import ScoreSegments
from logitcask.engine.store.retention import reached
from logitcask.engine.store.storage.base import STAGING
from logitcask.engine.store.store import Store
from logitcask.engine.types import Progress, no_progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The contents of a verified store."""

    segments: int
    positions: int
    """Response positions of the rollout segments."""
    files: int
    bytes: int
    """Of all committed objects: segments, log records, bundles."""
    decoded: bool
    """True if every array was decoded, in addition to the comparison of digests."""
    orphans: tuple[str, ...]
    """Paths relative to the store that no record names, such as those of a killed writer."""
    left_out: int
    """Deleted segments that are not here, as in a copy: no snapshot or tag of it reaches them."""


def verify(
    store: Store,
    *,
    deep: bool = False,
    on_damage: Callable[[IntegrityError], None] = lambda _: None,
    progress: Progress = no_progress,
) -> Report:
    """Compare every segment, deleted ones too, with its digest; deep: decode it too.

    Calls `on_damage` with every damage found, and raises the first IntegrityError in the end.
    """
    damaged: list[IntegrityError] = []
    snapshot = store.head()
    until: dict[tuple[str, str, str], ScoreSegments] = {}
    """(teacher, base, seg_id) -> the score segments up to this one."""
    every = store.log.present()
    present = {each.path: each for each in every}
    needed = reached(store.log, snapshot.number)
    left_out = 0
    for done, each in enumerate(every if deep else list(present.values())):
        progress("verify", done, len(every))
        try:
            before = until.get((each.name, each.base, each.extends), ())
            until[each.name, each.base, each.seg_id] = (*before, each)
            data, where = store.read_object(each), store.storage.where(each.path)
            segments.check_entries(where, data, each)
            if deep:
                store.check_arrays(each, segments.decode_object(where, data, each), before)
        except IntegrityError as error:
            if each.path not in needed and store.storage.read_part(each.path, 0, 1) is None:
                left_out += present.pop(each.path, None) is not None
                continue
            on_damage(error)
            damaged.append(error)
        except StoreError:
            if not store.is_removed(each):
                raise
            # gc runs at the same time.
            present.pop(each.path, None)
    progress("verify", len(every), len(every))
    if damaged:
        raise damaged[0]
    records = list(_records(store, snapshot.number + 1))
    return Report(
        segments=len(present),
        positions=sum(s.counts["P"] for s in present.values() if s.kind == schema.ROLLOUT),
        files=len(records) + len(present),
        bytes=sum(records) + sum(each.size for each in present.values()),
        decoded=deep,
        orphans=_orphans(store, present),
        left_out=left_out,
    )


def _records(store: Store, end: int) -> Iterator[int]:
    """Yield the bytes of each record and each bundle, and check both against the log."""
    storage = store.storage
    for number in range(end):
        name = f"log/{record.file_name(number)}"
        data = storage.read(name, schema.MAX_RECORD_BYTES)
        # Where it is absent, the log was read from a bundle.
        if data is not None:
            lines = [record.split(data, storage.where(name))]
            if not store.log.has(number, lines):
                raise IntegrityError(f"{storage.where(name)}: another record", hint=BROKEN)
            yield len(data)
        for each in store.log.added(number):
            _ = each.body
    for name in (each.name for each in storage.files("bundles")):
        level, first = bundles.parts_of(name) or (0, 0)
        if not level or first + level > end:
            continue
        data = storage.read(name, schema.MAX_BUNDLE_BYTES) or b""
        found = bundles.split(data, level, first)
        if found is None or not store.log.has(first, zip(*found, strict=True)):
            raise IntegrityError(
                f"{storage.where(name)}: other records than in log/",
                hint="remove this file if log/ or another bundle has its records; else restore it "
                "from a copy",
            )
        yield len(data)


def _orphans(store: Store, present: dict[str, Segment]) -> tuple[str, ...]:
    storage = store.storage
    found = [each.name for each in storage.files(STAGING)]
    found += claims.unknown_files(storage)
    found += [f"log/{name}" for name in storage.names("log") if record.number_of(name) is None]
    found += [each.name for each in storage.files("bundles") if not bundles.parts_of(each.name)]
    found += [each.name for each in storage.files("seg") if each.name not in present]
    return tuple(found)
