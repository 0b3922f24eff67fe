"""Segments from one store to another: as files for transport, or straight.

A packed segment is one zip file without compression: the files of its Zarr group, so that Zarr
reads it as it is, and logitcask.json, what a log record says of it. Names are content addresses, so
bringing the same in twice changes nothing. What comes in is decoded before it is named.
"""

import os
import uuid
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.format.segment as segments
import logitcask.engine.store.log.record as record
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.commit import find_committed, publish_segment
from logitcask.engine.store.format.segment import Segment
from logitcask.engine.store.log.snapshot import Snapshot
from logitcask.engine.store.store import Store
from logitcask.engine.types import Progress, no_progress

_TOLD = "logitcask.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What came into a store."""

    added: int
    there: int
    """Of units that the store held already ..."""
    repaired: int = 0
    """... of which so many were damaged there, and are whole now."""
    left_out: int
    """Scores of rollouts, or widenings of scores, that this store has not got, or with other
    bytes."""


def pack(
    store: Store,
    folder: Path,
    *,
    snapshot: Snapshot | None = None,
    progress: Progress = no_progress,
) -> list[Path]:
    """One file a segment into a folder, made if absent; those of a snapshot, or the newest."""
    visible = (store.head() if snapshot is None else snapshot).segments
    written = []
    for done, each in enumerate(visible):
        progress("pack", done, len(visible))
        contents = store.read_files(each)
        target = folder / f"{each.kind}-{each.seg_id}.zip"
        temporary = target.with_name(f".{uuid.uuid4().hex}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_zip(
                temporary, {_TOLD: record.encode_record(record.encode_segment(each)), **contents}
            )
            os.replace(temporary, target)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
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
    """Brings packed segments in, in whatever order the files are given; repair: as for `merge`.

    Raises IntegrityError for a file that is not what `pack` writes, IdentityError where a name
    stands for something else here.
    """
    waiting = [(_told(path), path) for path in sorted(files)]
    total, count = len(waiting), MergeReport(added=0, there=0, left_out=0)
    while waiting:
        progress("unpack", total - len(waiting), total)
        # Rollouts before their scores, and a teacher's first scores before what widens them.
        ready = [(fields, path) for fields, path in waiting if _fits(store, fields)]
        if not ready:
            break
        for fields, path in ready:
            count = _bring(store, fields, partial(_contents, fields, path), count, repair)
        done = {path for _, path in ready}
        waiting = [(fields, path) for fields, path in waiting if path not in done]
    progress("unpack", total, total)
    return replace(count, left_out=len(waiting))


def merge(
    store: Store, other: Store, *, repair: bool = False, progress: Progress = no_progress
) -> MergeReport:
    """Brings all that another store holds now into this one, what was deleted here among it.

    repair: also reads what this store holds already, and repairs from the other what is damaged.

    Raises IntegrityError for damage there, IdentityError where a name stands for something else.
    """
    visible = other.head().segments
    count = MergeReport(added=0, there=0, left_out=0)
    for done, each in enumerate(visible):
        progress("merge", done, len(visible))
        if not _fits(store, each):
            count = replace(count, left_out=count.left_out + 1)
        else:
            count = _bring(store, each, partial(other.read_files, each), count, repair)
    progress("merge", len(visible), len(visible))
    return count


def _fits(store: Store, fields: Segment) -> bool:
    """Whether the store holds what this segment builds on, or the segment's unit itself."""
    store.log.refresh()
    if fields.kind == schema.ROLLOUT or store.log.winner(fields.unit_key) is not None:
        return True
    score_segments = store.log.score_segments(fields.name, fields.base)
    last = score_segments[-1].seg_id if score_segments else ""
    return store.log.base(fields.base) is not None and fields.extends == last


def _bring(
    store: Store,
    fields: Segment,
    read: Callable[[], Mapping[str, bytes]],
    count: MergeReport,
    repair: bool,
) -> MergeReport:
    if (held := find_committed(store.log, fields)) is not None:
        repaired = repair and held.seg_id == fields.seg_id and _is_damaged(store, held)
        if repaired:
            store.storage.place(held.folder, read())
        return replace(count, there=count.there + 1, repaired=count.repaired + repaired)
    contents = read()
    arrays = segments.decode(
        store.storage.where(fields.folder),
        contents,
        layout=fields.layout,
        profile=codecs.profile(fields.profile),
        counts=fields.counts,
        names=list(schema.specs(fields.layout)),
    )
    before = store.log.score_segments(fields.name, fields.base) if fields.extends else ()
    store.check_arrays(fields, arrays, before)
    publish_segment(store.storage, store.log, contents, replace(fields, number=-1))
    return replace(count, added=count.added + 1)


def _is_damaged(store: Store, held: Segment) -> bool:
    try:
        store.read_files(held)
    except IntegrityError:
        return True
    return False


def _write_zip(path: Path, contents: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as packed:
        for name, data in sorted(contents.items()):
            # The same bytes make the same file.
            packed.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)


def _told(path: Path) -> Segment:
    data = _read_zip(path, {_TOLD: schema.MAX_RECORD_BYTES})[_TOLD]
    body, _ = record.decode_record(data, f"{path}:{_TOLD}")
    return record.decode_segment(body, f"{path}:{_TOLD}")


def _contents(fields: Segment, path: Path) -> dict[str, bytes]:
    contents = _read_zip(path, {name: size for name, (size, _) in fields.files.items()})
    if segments.manifest_of(contents) != dict(fields.files):
        raise IntegrityError(f"{path}: not the files that it says", hint="pack that segment again")
    return contents


def _read_zip(path: Path, limits: Mapping[str, int]) -> dict[str, bytes]:
    """The named members, none larger than its limit, none compressed."""
    try:
        with zipfile.ZipFile(path) as packed:
            contents = {}
            for name, limit in limits.items():
                member = packed.getinfo(name)
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > limit:
                    raise ValueError(f"{name} is compressed, or larger than it may be")
                contents[name] = packed.read(member)
            return contents
    except OSError as error:
        raise StoreError(
            f"cannot read {path}: {error.strerror or error}", hint="give files made by pack"
        ) from error
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, RuntimeError) as error:
        raise IntegrityError(
            f"{path}: not a packed segment ({error})",
            hint="give what `logitcask store pack` has made, or pack that segment again",
        ) from error
