"""The upgrade of a store of format 1: a new store of format 2, record for record.

Log numbers, times, tags, deletions, removals, generations and unit keys stay. The encoded arrays
are copied under their new names, so every row is equal bit for bit. Each record is a function of
the old store alone: an interrupted upgrade finds its records and goes on after them. format.json,
by which a store begins to exist, is written last, when the new store is complete and verified.

A segment that gc has removed for good has no bytes to copy. It is left out of the records, with the
scores of it, its deletion and its removal: no snapshot could read it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import logitcask.engine.store.format.archive as archive
import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.format.segment as segments
import logitcask.engine.store.log.format_file as format_file
import logitcask.engine.store.log.record as record
import logitcask.engine.store.upgrade.format1 as format1
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.format.entry import Segment, sha256
from logitcask.engine.store.log.body import encode_body
from logitcask.engine.store.storage.base import Storage, open_storage
from logitcask.engine.store.store import Store
from logitcask.engine.store.upgrade.format1 import Added, Record
from logitcask.engine.store.verify import verify
from logitcask.engine.types import Progress, no_progress

_FREE = "give a free place for the new store"
_AGAIN = "remove the new store, then upgrade again; the old one is untouched"

Content = tuple[str, str]
"""(kind, seg_id) of the old store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpgradeReport:
    """The contents of the new store."""

    records: int
    segments: int
    positions: int
    """Response positions of the rollout segments."""
    bytes: int
    left_out: int
    """Segments that gc had removed from the old store."""
    there: int
    """Records that an earlier call had written."""


def upgrade(
    old_url: str | Path, new_url: str | Path, *, progress: Progress = no_progress
) -> UpgradeReport:
    """Make a store of format 2 from one of format 1, which stays as it is; a second call resumes.

    Raises StoreError where OLD is no store of format 1 or NEW holds something else, IntegrityError
    where OLD is damaged; there is no store at NEW then.
    """
    return upgrade_on(open_storage(old_url), open_storage(new_url), progress)


def upgrade_on(old: Storage, new: Storage, progress: Progress = no_progress) -> UpgradeReport:
    """Upgrade from one storage to another; as `upgrade`."""
    body, genesis = format1.read_identity(old)
    if f"{new.url}/".startswith(f"{old.url}/"):
        raise StoreError(
            f"{new.url} is or lies in the old store", hint="give a free place outside of it"
        )
    content = format_file.encode(body["store_uuid"], str(body.get("created", "")))
    if (identity := format_file.read_begun(new, content)) is None:
        raise StoreError(f"{new.url} is another store", hint=_FREE)
    last = format1.last_number(old)
    # Every record is checked before anything is written.
    removals = _Removals(format1.records(old, genesis, last))
    if not format_file.exists(new):
        format_file.prepare(new)
    store = Store(new, identity)
    copy = _Copy(old, store, removals)
    for each in format1.records(old, genesis, last):
        progress("upgrade", each.number, last + 1)
        copy.add(each)
    progress("upgrade", last + 1, last + 1)
    found = verify(store, deep=True, progress=progress)
    if copy.there <= last + 1 and found.segments != len(copy.present):
        raise IntegrityError(
            f"{new.url} has {found.segments} segments, not {len(copy.present)}", hint=_AGAIN
        )
    format_file.write(new, content)
    return UpgradeReport(
        records=last + 1,
        segments=found.segments,
        positions=found.positions,
        bytes=found.bytes,
        left_out=copy.left_out,
        there=min(copy.there, last + 1),
    )


class _Removals:
    """The removals by gc in all records of the old store."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._counts: dict[Content, int] = {}
        newest: dict[Content, int] = {}
        for each in records:
            for kind, seg_id, generation in each.removes:
                self._counts[kind, seg_id] = generation + 1
            newest |= {_content(added): added.segment.generation for added in each.adds}
        self._gone = {key for key, count in self._counts.items() if newest.get(key, -1) < count}

    def generation(self, content: Content) -> int:
        """Return the generation of a content that may be there, now."""
        return self._counts.get(content, 0)

    def is_gone(self, content: Content) -> bool:
        """Return whether no generation of a content is there."""
        return content in self._gone


class _Copy:
    """The records of the new store, made from those of the old one in their order."""

    def __init__(self, old: Storage, store: Store, removals: _Removals) -> None:
        self._old, self._store, self._removals = old, store, removals
        self._prev = store.log.prev()
        store.log.refresh()
        self.there = len(store.log)
        """Records of an earlier call."""
        self.left_out = 0
        self.present: set[str] = set()
        """Objects of the new store."""
        self._made: dict[Content, Segment] = {}
        """Content of the old store -> a segment of the new one with its object."""
        self._left: set[Content] = set()
        """Contents of the old store that the new one does not have."""
        self._counts: dict[Content, int] = {}
        """Content of the old store -> its removals so far, in the old one."""
        self._removed: dict[Content, int] = {}
        """Content of the old store -> its removals so far, in the new one."""
        self._visible: dict[str, bool] = {}
        """Visible unit_key of the old store -> whether the new one has it."""

    def add(self, each: Record) -> None:
        """Publish the record of the new store for one of the old store, or find it there."""
        self._check(each, all(key in self._visible for key in each.deletes), "a deletion")
        deletes = [key for key in each.deletes if self._visible.pop(key)]
        for kind, seg_id, generation in each.removes:
            self._check(each, generation == self._counts.get((kind, seg_id), 0), "a removal")
            self._counts[kind, seg_id] = generation + 1
        removes = [
            removal
            for kind, seg_id, _ in each.removes
            if (kind, seg_id) in self._made
            for removal in self._removed_once((kind, seg_id))
        ]
        adds = []
        there = list(self._store.log.added(each.number)) if each.number < self.there else []
        for i, added in enumerate(self._kept(each)):
            if each.number < self.there and i >= len(there):
                raise self._other(each)
            adds.append(self._segment(added, there[i] if there else None))
            while self._removed.get(_content(added), 0) < added.segment.generation:
                # gc removed this content before the first record that named it.
                removes += self._removed_once(_content(added))
        head = {
            "n": each.number,
            "prev": self._prev,
            "time": each.time,
            "adds": [record.encode_add(segment) for segment in adds],
            "deletes": deletes,
            "removes": removes,
            "tags": dict(each.tags),
        }
        body = {**each.kept, "adds": [encode_body(segment) for segment in adds]}
        data = record.encode_record(head, body)
        self._prev = sha256(record.split(data, "")[0])
        name = f"log/{record.file_name(each.number)}"
        if each.number < self.there:
            same = self._store.log.sha256(each.number) == self._prev
        else:
            new = self._store.storage
            same = new.create(name, data) or new.read(name, len(data)) == data
        if not same:
            raise self._other(each)
        if each.number >= self.there - 1:
            # The earlier call may have stopped before the bundle of its last record.
            self._store.log.write_bundles(each.number)

    def _other(self, each: Record) -> StoreError:
        where = self._store.storage.where(f"log/{record.file_name(each.number)}")
        return StoreError(f"{where} is not the record of {self._old.url}", hint=_FREE)

    def _kept(self, each: Record) -> Iterator[Added]:
        """Yield the segments that a record made visible and whose bytes exist."""
        for added in each.adds:
            which = added.segment
            if which.unit_key in self._visible:
                continue  # the first commit of a unit wins
            under = {(schema.ROLLOUT, which.base), (schema.SCORE, which.extends)}
            under = {content for content in under if content[1]}
            known = under <= self._made.keys() | self._left
            newest = which.generation == self._counts.get(_content(added), 0)
            self._check(each, known and newest, f"segment {which.seg_id}")
            kept = not (under & self._left or self._removals.is_gone(_content(added)))
            self._visible[which.unit_key] = kept
            if kept:
                yield added
            else:
                self._left.add(_content(added))
                self.left_out += 1

    def _check(self, each: Record, holds: bool, what: str) -> None:
        if not holds:
            where = self._old.where(f"log/{each.number:010d}.json")
            raise IntegrityError(
                f"{where}: {what} contradicts the records before it", hint=format1.HINT
            )

    def _segment(self, added: Added, there: Segment | None) -> Segment:
        """Return a segment of the new store; `there`: as an earlier call has published it."""
        content = _content(added)
        segment = replace(
            added.segment,
            base=self._id(schema.ROLLOUT, added.segment.base),
            extends=self._id(schema.SCORE, added.segment.extends),
        )
        newest = self._removals.generation(content)
        if content not in self._made:
            self._made[content] = there or self._written(added, replace(segment, generation=newest))
        made = self._made[content]
        segment = replace(
            segment,
            seg_id=made.seg_id,
            size=made.size,
            sha256=made.sha256,
            source=replace(segment.body, entries=made.entries),
        )
        if segment.generation == newest:
            self.present.add(segment.path)
        return segment

    def _id(self, kind: str, seg_id: str) -> str:
        return self._made[kind, seg_id].seg_id if seg_id else ""

    def _removed_once(self, content: Content) -> list[list[Any]]:
        generation = self._removed.get(content, 0)
        self._removed[content] = generation + 1
        return [[content[0], self._made[content].seg_id, generation]]

    def _written(self, added: Added, segment: Segment) -> Segment:
        """Write the object of a segment of the newest generation, and return the segment."""
        contents = format1.read_files(self._old, added, segment.generation)
        contents |= segments.metadata_files(
            segment.layout,
            codecs.profile(segment.profile),
            segment.counts,
            segments.attributes_of(segment),
        )
        data = archive.write(contents)
        segment = segments.with_object(segment, data, contents)
        self._store.storage.put(segment.path, data)
        return segment


def _content(added: Added) -> Content:
    return added.segment.kind, added.segment.seg_id
