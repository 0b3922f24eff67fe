"""The log: numbered, hash-chained records, the only source of truth, and their fold.

At most one writer can create record n. The state of a store is the fold of records 0..n. The first
commit of a unit_key wins; a deleted unit is not visible from its record on, and its key is free
again. A refresh lists one folder and reads only the new records, in bundles where there are many,
several at a time. The heads of all records are read and their chain is verified; a body is read
when it is used.
"""

import bisect
import gc
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.bundles as bundles
import logitcask.engine.store.log.record as record
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.format.entry import Segment, sha256
from logitcask.engine.store.log.body import Bodies
from logitcask.engine.store.log.lines import BROKEN, validated
from logitcask.engine.store.log.record import Record
from logitcask.engine.store.log.snapshot import ScoreSegments, Snapshot
from logitcask.engine.store.storage.base import Storage, map_concurrently

_AT_ONCE = 64
"""Bundles and records that a refresh reads before it folds them."""


class Log:
    """The records of one store, up to the last refresh."""

    def __init__(self, storage: Storage, genesis: str) -> None:
        self._storage = storage
        self._sums = [genesis]
        """sha256 of format.json, then of each record: entry n is the `prev` of record n."""
        self._times: list[str] = []
        self._segments: list[Segment] = []
        self._ends = [0]
        """Entry n: how many segments records 0..n-1 hold."""
        self._deleted: dict[int, int] = {}
        """Index of a segment -> number of the record that deleted it."""
        self._by_key: dict[str, int] = {}
        """unit_key -> index of its visible segment."""
        self._rollouts: dict[str, Segment] = {}
        """seg_id -> the newest rollout segment with this content, visible or deleted."""
        self._bases: dict[str, list[int]] = {}
        """seg_id -> indices of the visible rollout segments with this content."""
        self._score_segments: dict[tuple[str, str], list[int]] = {}
        """(teacher, base) -> indices of its visible score segments."""
        self._names: dict[tuple[str, str], Segment] = {}
        """(kind, name) -> its first segment."""
        self._removals: dict[tuple[str, str], int] = {}
        """(kind, seg_id) -> how often gc has removed this content."""
        self._tags: dict[str, int] = {}
        self._bodies = Bodies(storage, bundles.body_line)
        self._opened = False
        self._snapshot: Snapshot | None = None

    def __len__(self) -> int:
        return len(self._sums) - 1

    def where(self, number: int) -> str:
        """Return the path or URL of a record."""
        return self._storage.where(f"log/{record.file_name(number)}")

    def refresh(self) -> None:
        """Read and fold the new records. Raises IntegrityError for a gap or an invalid record."""
        # Bundles may have the first records alone; they are listed once, and not all of log/ is.
        start = len(self) if self._opened else bundles.covered(self._storage)
        # Listed before reading: a record published meanwhile is not mistaken for one beyond a gap.
        second_last = record.file_name(start - 2) if start > 1 else ""
        names = self._storage.names("log", after=second_last)
        numbers = [number for name in names if (number := record.number_of(name)) is not None]
        end = max((number + 1 for number in numbers), default=0)
        if end < start:
            # The newest record is in a bundle only, or lost.
            end = max(end, bundles.covered(self._storage) if self._opened else start)
        if end < len(self):
            raise self._missing(max(end, len(self) - 1))
        with _collector_off(end - len(self) > bundles.LEVELS[0]):
            while len(self) < end:
                self._catch_up(end)
        self._opened = True

    def _catch_up(self, end: int) -> None:
        """Read some of the records before `end`, several at a time, and fold them."""
        todo = list(islice(bundles.pieces(len(self), end), _AT_ONCE))
        names = [f"log/{record.file_name(first)}" for level, first in todo if level == 1]
        single = self._storage.read_all(dict.fromkeys(names, schema.MAX_RECORD_BYTES))
        large = [(self._storage, *piece) for piece in todo if piece[0] > 1]
        heads = iter(map_concurrently(bundles.read_heads, large))
        for level, first in todo:
            if level == 1:
                self._fold_single(first, single[f"log/{record.file_name(first)}"])
            elif not self._fold_heads(next(heads)):
                self._fold_below(level, first)

    def _fold_single(self, number: int, data: bytes | None) -> None:
        where = self.where(number)
        if data is None:
            lines = bundles.read_record(self._storage, number)
            if lines is None:
                raise self._missing(number)
            data = record.join(*lines)
        self._fold(record.parse(data, where, number=number, prev=self.prev(), bodies=self._bodies))

    def _fold_heads(self, found: bundles.Heads | None) -> bool:
        """Fold the records of a bundle; return False where there is no valid one."""
        if found is None:
            return False
        where, prev, start = self._storage.where(found.name), self.prev(), found.start
        records: list[Record] = []
        try:
            for number, line in enumerate(found.lines, found.first):
                new = record.parse_head(
                    line, where, number=number, prev=prev, bodies=self._bodies, name=found.name
                )
                new.body.start = start
                start, prev = start + new.body.size + 1, new.sha256
                records.append(new)
        except IntegrityError:
            # Only a copy of the records in log/; `verify` reports it.
            return False
        for each in records:
            self._fold(each)
        return True

    def _fold_below(self, level: int, first: int) -> None:
        """Fold the records of a damaged or absent bundle from those of the level below."""
        for less, number in bundles.below(level, first):
            if less == 1:
                name = f"log/{record.file_name(number)}"
                self._fold_single(number, self._storage.read(name, schema.MAX_RECORD_BYTES))
            elif not self._fold_heads(bundles.read_heads(self._storage, less, number)):
                self._fold_below(less, number)

    def parse_next(self, data: bytes) -> Record:
        """Decode and check a whole record that would be the next. Raises IntegrityError."""
        number, bodies = len(self), Bodies(self._storage, bundles.body_line)
        where = self.where(number)
        new = record.parse(data, where, number=number, prev=self.prev(), bodies=bodies)
        for each in new.adds:
            new.body.of(each)
        return new

    def write_bundles(self, number: int) -> None:
        """Write the bundles that end with a record that this process has published."""
        bundles.write(self._storage, number + 1)

    def read_record(self, number: int) -> bytes:
        """Return the bytes of a record's file, also where only a bundle has it."""
        lines = bundles.read_record(self._storage, number)
        if lines is None or sha256(lines[0]) != self.sha256(number):
            raise self._missing(number)
        return record.join(*lines)

    def has(self, first: int, lines: Iterable[tuple[bytes, bytes]]) -> bool:
        """Return whether (head, body) are those of the records from `first` on."""
        for number, (head, body) in enumerate(lines, first):
            if sha256(head) != self.sha256(number):
                return False
            if [len(body), sha256(body)] != json.loads(head)["body"]:
                return False
        return True

    def _missing(self, number: int) -> IntegrityError:
        return IntegrityError(
            f"{self.where(number)}: this published log record is missing", hint=BROKEN
        )

    def _fold(self, new: Record) -> None:
        message = f"{self.where(new.number)}: contradicts the records before it"
        validated(lambda: self._apply(new), message)
        self._sums.append(new.sha256)
        self._times.append(new.time)
        self._ends.append(len(self._segments))
        self._snapshot = None

    def _apply(self, new: Record) -> None:
        """Apply a record to the state. Raises KeyError or ValueError where it contradicts it."""
        for segment in [self._delete(unit_key, new.number) for unit_key in new.deletes]:
            # An extension is meaningless without the segment that it extends.
            before = ""
            for each in self.score_segments(segment.name, segment.base):
                if each.extends != before:
                    raise ValueError(f"deletes {each.extends}, which {each.seg_id} extends")
                before = each.seg_id
        for kind, seg_id, generation in new.removes:
            if generation != self.generation(kind, seg_id):
                raise ValueError(f"removes {seg_id} of generation {generation}")
            self._removals[kind, seg_id] = generation + 1
        for segment in new.adds:
            if segment.unit_key not in self._by_key:
                self._add(segment)
        for name, marked in new.tags.items():
            if marked is None:
                del self._tags[name]
            else:
                self._tags[name] = marked

    def _add(self, segment: Segment) -> None:
        if segment.generation != self.generation(segment.kind, segment.seg_id):
            raise ValueError(f"{segment.path} has another generation than the newest")
        index = len(self._segments)
        if segment.kind == schema.ROLLOUT:
            self._bases.setdefault(segment.seg_id, []).append(index)
            self._rollouts[segment.seg_id] = segment
        else:
            base = self.base(segment.base)
            before = self.score_segments(segment.name, segment.base)
            if base is None or base.tokens_sha256 != segment.tokens_sha256:
                raise ValueError(f"scores of other rollouts than {segment.base}")
            if segment.extends != (before[-1].seg_id if before else ""):
                raise ValueError(f"extends {segment.extends!r} of {len(before)} segments")
            self._score_segments.setdefault((segment.name, segment.base), []).append(index)
        self._segments.append(segment)
        self._by_key[segment.unit_key] = index
        self._names.setdefault((segment.kind, segment.name), segment)

    def _delete(self, unit_key: str, number: int) -> Segment:
        index = self._by_key.pop(unit_key)
        segment = self._segments[index]
        self._deleted[index] = number
        if segment.kind == schema.ROLLOUT:
            self._bases[segment.seg_id].remove(index)
        else:
            self._score_segments[segment.name, segment.base].remove(index)
        return segment

    # Queries, on the records up to the last refresh.

    def prev(self) -> str:
        """Return the `prev` of the next record."""
        return self._sums[-1]

    def sha256(self, number: int) -> str:
        """Return the sha256 of a record."""
        return self._sums[number + 1]

    def added(self, number: int) -> list[Segment]:
        """Return the segments that a record made visible."""
        return self._segments[self._ends[number] : self._ends[number + 1]]

    def time(self, number: int) -> str:
        """Return the time of a record by its writer's clock; ISO 8601."""
        return self._times[number]

    def winner(self, unit_key: str) -> Segment | None:
        """Return the visible segment of a unit."""
        index = self._by_key.get(unit_key)
        return None if index is None else self._segments[index]

    def base(self, seg_id: str) -> Segment | None:
        """Return a visible rollout segment by its id."""
        found = self._bases.get(seg_id)
        return self._segments[found[0]] if found else None

    def rollouts(self, seg_id: str) -> Segment | None:
        """Return a rollout segment by its id, deleted or not, as an old snapshot needs it."""
        return self._rollouts.get(seg_id)

    def present(self) -> list[Segment]:
        """Return every segment that gc has not removed, deleted ones too."""
        return [s for s in self._segments if s.generation == self.generation(s.kind, s.seg_id)]

    def score_segments(self, name: str, base: str) -> ScoreSegments:
        """Return the visible scores of one teacher on one rollout segment."""
        return tuple(self._segments[index] for index in self._score_segments.get((name, base), ()))

    def first_of_name(self, kind: str, name: str) -> Segment | None:
        """Return the first segment of a name, which fixes its identity."""
        return self._names.get((kind, name))

    def generation(self, kind: str, seg_id: str) -> int:
        """Return how often gc has removed this content."""
        return self._removals.get((kind, seg_id), 0)

    def tags(self) -> dict[str, int]:
        """Return tag -> snapshot id."""
        return dict(self._tags)

    def deleted_after(self, number: int) -> list[Segment]:
        """Return deleted segments that were visible at record `number` or added later."""
        return [self._segments[i] for i, by in self._deleted.items() if by > number]

    def at_time(self, time: str) -> int:
        """Return the newest record written at `time` (ISO 8601, UTC) or before; -1 = none.

        Writers' clocks differ: no record counts as older than one before it.
        """
        latest: list[str] = []
        for each in self._times:
            latest.append(max(each, latest[-1]) if latest else each)
        return bisect.bisect_right(latest, time) - 1

    def snapshot(self, number: int) -> Snapshot:
        """Return the fold of records 0..number. Raises StoreError where there are fewer."""
        if not -1 <= number < len(self):
            raise StoreError(
                f"{self._storage.url} has no log record {number}: its last is {len(self) - 1}",
                hint="open the store of the snapshot, or give an existing number",
            )
        if self._snapshot is None or self._snapshot.number != number:
            visible = tuple(
                segment
                for index, segment in enumerate(self._segments[: self._ends[number + 1]])
                if self._deleted.get(index, len(self)) > number
            )
            self._snapshot = Snapshot(number=number, sha256=self.sha256(number), segments=visible)
        return self._snapshot


@contextmanager
def _collector_off(off: bool) -> Iterator[None]:
    """Pause the garbage collector, which searches a growing log in vain again and again."""
    off = off and gc.isenabled()
    if off:
        gc.disable()
    try:
        yield
    finally:
        if off:
            gc.enable()
