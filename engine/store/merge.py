"""Transfer of segments from one store to another, as files or directly.

A packed segment is the archive of its object, so that Zarr reads it directly, with one more file:
logitcask.json, its entry in a log record. Names are content addresses, so adding the same segment
twice changes nothing. Segments are decoded and checked before they are published.
"""

import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import logitcask.engine.store.format.archive as archive
import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.format.segment as segments
import logitcask.engine.store.log.record as record
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.models.digests import flush
from logitcask.engine.store.commit import find_committed, publish_segment
from logitcask.engine.store.format.entry import Segment, sha256
from logitcask.engine.store.log.lines import decode_sealed, encode_sealed
from logitcask.engine.store.log.snapshot import Snapshot
from logitcask.engine.store.store import Store
from logitcask.engine.store.temporary import temporary_in
from logitcask.engine.types import Progress, no_progress

_ENTRY = "logitcask.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """The counts of a merge."""

    added: int
    there: int
    """Units that the store had already."""
    repaired: int = 0
    """Those of them that were damaged and are repaired now."""
    left_out: int
    """Scores or extensions whose base this store lacks, or has with other bytes."""


def pack(
    store: Store,
    folder: Path,
    *,
    snapshot: Snapshot | None = None,
    progress: Progress = no_progress,
) -> list[Path]:
    """Write one zip file per segment of a snapshot, by default the newest, into a folder."""
    visible = (store.head() if snapshot is None else snapshot).segments
    written = []
    for done, each in enumerate(visible):
        progress("pack", done, len(visible))
        files = segments.split(store.storage.where(each.path), store.read_object(each), each)
        entry = encode_sealed(record.encode_segment(each))
        packed = archive.write({**files, _ENTRY: entry})
        target = folder / f"{each.kind}-{each.seg_id}.zip"
        temporary = None
        try:
            temporary = temporary_in(folder)
            temporary.write_bytes(packed)
            flush(temporary)
            os.replace(temporary, target)
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            raise StoreError(
                f"cannot write {target}: {error.strerror or error}",
                hint="make room or give another folder, then pack again",
            ) from error
        written.append(target)
    progress("pack", len(visible), len(visible))
    return written


def unpack(
    store: Store, files: Iterable[Path], *, repair: bool = False, progress: Progress = no_progress
) -> MergeReport:
    """Add packed segments, in any order of the files; repair: as for `merge`.

    Raises IntegrityError for a file that `pack` has not written, IdentityError where a name has
    another identity in this store.
    """
    waiting = [(_entry(path), path) for path in sorted(files)]
    total, count = len(waiting), MergeReport(added=0, there=0, left_out=0)
    while waiting:
        progress("unpack", total - len(waiting), total)
        # Rollouts before their scores, and a teacher's first scores before their extensions.
        ready = [(new, path) for new, path in waiting if _fits(store, new)]
        if not ready:
            break
        for new, path in ready:
            count = _add(store, new, partial(_object, new, path), count, repair)
        done = {path for _, path in ready}
        waiting = [(new, path) for new, path in waiting if path not in done]
    progress("unpack", total, total)
    return replace(count, left_out=len(waiting))


def merge(
    store: Store, other: Store, *, repair: bool = False, progress: Progress = no_progress
) -> MergeReport:
    """Add all visible segments of another store, including those that were deleted here.

    repair: also read the segments that this store has, and repair damaged ones from the other.

    Raises IntegrityError for damage there, IdentityError where a name has another identity.
    """
    visible = other.head().segments
    count = MergeReport(added=0, there=0, left_out=0)
    for done, each in enumerate(visible):
        progress("merge", done, len(visible))
        if not _fits(store, each):
            count = replace(count, left_out=count.left_out + 1)
        else:
            count = _add(store, each, partial(other.read_object, each), count, repair)
    progress("merge", len(visible), len(visible))
    return count


def _fits(store: Store, new: Segment) -> bool:
    """Return whether the store has the segment's unit, or the segments that it builds on."""
    store.log.refresh()
    if new.kind == schema.ROLLOUT or store.log.winner(new.unit_key) is not None:
        return True
    before = store.log.score_segments(new.name, new.base)
    last = before[-1].seg_id if before else ""
    return store.log.base(new.base) is not None and new.extends == last


def _add(
    store: Store,
    new: Segment,
    read: Callable[[], bytes],
    count: MergeReport,
    repair: bool,
) -> MergeReport:
    if (committed := find_committed(store.log, new)) is not None:
        repaired = False
        if repair and committed.seg_id == new.seg_id:
            try:
                store.read_object(committed)
            except IntegrityError:
                store.storage.put(committed.path, read())
                repaired = True
        return replace(count, there=count.there + 1, repaired=count.repaired + repaired)
    data, where = read(), store.storage.where(new.path)
    segments.check_entries(where, data, new)
    before = store.log.score_segments(new.name, new.base) if new.extends else ()
    store.check_arrays(new, segments.decode_object(where, data, new), before)
    publish_segment(store.storage, store.log, data, new)
    return replace(count, added=count.added + 1)


def _entry(path: Path) -> Segment:
    data = _read_zip(path, {_ENTRY: schema.MAX_RECORD_BYTES})[_ENTRY]
    body, _ = decode_sealed(data, f"{path}:{_ENTRY}")
    return record.decode_segment(body, f"{path}:{_ENTRY}")


def _object(new: Segment, path: Path) -> bytes:
    profile = codecs.profile(new.profile)
    limits = segments.file_limits(new.layout, profile, new.counts)
    data = archive.write(_read_zip(path, limits))
    if (len(data), sha256(data)) != (new.size, new.sha256):
        raise IntegrityError(
            f"{path}: its files do not match its entry", hint="pack that segment again"
        )
    return data


def _read_zip(path: Path, limits: Mapping[str, int]) -> dict[str, bytes]:
    """Read members, none of them larger than its limit or compressed."""
    try:
        with zipfile.ZipFile(path) as packed:
            contents = {}
            for name, limit in limits.items():
                member = packed.getinfo(name)
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > limit:
                    raise ValueError(f"{name} is compressed or too large")
                contents[name] = packed.read(member)
            return contents
    except OSError as error:
        raise StoreError(
            f"cannot read {path}: {error.strerror or error}",
            hint="give files of `logitcask store pack`",
        ) from error
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, RuntimeError) as error:
        raise IntegrityError(
            f"{path}: not a packed segment ({error})",
            hint="give files of `logitcask store pack`, or pack that segment again",
        ) from error
