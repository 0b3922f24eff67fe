"""The log: numbered, hash-chained records, the only source of truth, and their fold.

Record n is made by a create that at most one writer can win. A store's state is the fold of records
0..n. The first commit of a unit_key wins; a deleted unit is not visible from its record on, and its
key is free again. What was read once is kept, so a refresh reads the records that are new and lists
one folder.

Every BUNDLE records are also kept together in one file, so that a store of many thousands opens in
few reads. A bundle says nothing of its own: its records are checked like any other.
"""

import bisect

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.record as record
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.format.segment import Segment
from logitcask.engine.store.log.record import Content, Record
from logitcask.engine.store.log.snapshot import ScoreSegments, Snapshot
from logitcask.engine.store.storage.base import Storage

BUNDLE = 256
"""Records of a bundle."""


class Log:
    """The records of one store, read as far as they have been asked for."""

    def __init__(self, storage: Storage, genesis: str) -> None:
        self._storage = storage
        self._sums = [genesis]
        """sha256 of format.json, then of each record: entry n is the `prev` of record n."""
        self._times: list[str] = []
        self._segments: list[Segment] = []
        self._ends = [0]
        """Entry n: how many segments records 0..n-1 hold."""
        self._deleted: dict[int, int] = {}
        """Index of a segment -> the record that deleted it."""
        self._by_key: dict[str, int] = {}
        """unit_key -> index of the segment that is visible."""
        self._rollouts: dict[str, Segment] = {}
        """seg_id -> the newest rollout segment with this content, visible or deleted."""
        self._bases: dict[str, list[int]] = {}
        """seg_id -> indices of the visible rollout segments with this content."""
        self._score_segments: dict[tuple[str, str], list[int]] = {}
        """(teacher, base) -> indices of its visible score segments."""
        self._names: dict[tuple[str, str], Segment] = {}
        self._removals: dict[tuple[str, str], int] = {}
        """(kind, seg_id) -> how often gc has removed this content."""
        self._tags: dict[str, int] = {}
        self._single: list[bytes] = []
        """The newest records that no bundle holds yet, as far as they follow a full one."""
        self._snapshot: Snapshot | None = None

    def __len__(self) -> int:
        return len(self._sums) - 1

    def where(self, number: int) -> str:
        """Path or URL of a record."""
        return self._storage.where(f"log/{record.file_name(number)}")

    # Reading.

    def refresh(self) -> None:
        """Folds the records published since. Raises IntegrityError: a gap, a bad record."""
        # Listed before reading: a record published meanwhile is not mistaken for one beyond a gap.
        cached = record.file_name(len(self) - 2) if len(self) > 1 else ""
        names = self._storage.names("log", after=cached)
        numbers = [number for name in names if (number := record.number_of(name)) is not None]
        last = max(numbers, default=max(-1, len(self) - 2))
        if last + 1 < len(self):
            raise self._gone(last + 1)
        while True:
            number = len(self)
            if number % BUNDLE == 0 and last >= number + BUNDLE - 1 and self._read_bundle(number):
                continue
            name = f"log/{record.file_name(number)}"
            data = self._storage.read(name, schema.MAX_RECORD_BYTES)
            if data is None:
                # A listing may miss a name that is being added, but opening it cannot.
                if number <= last:
                    raise self._gone(number)
                return
            self._fold(record.parse(data, self.where(number), number=number, prev=self.prev()))
            self._single.append(data)

    def _read_bundle(self, first: int) -> bool:
        """Folds the records of a bundle, if there is a sound one; log/ holds the same."""
        name = bundle_name(first)
        records: list[Record] = []
        try:
            data = self._storage.read(name, schema.MAX_BUNDLE_BYTES)
            lines = (data or b"").splitlines(keepends=True)
            if len(lines) != 2 * BUNDLE:
                return False
            prev = self.prev()
            for i in range(BUNDLE):
                line, where = b"".join(lines[2 * i : 2 * i + 2]), self._storage.where(name)
                records.append(record.parse(line, where, number=first + i, prev=prev))
                prev = records[-1].sha256
        except IntegrityError:
            # Only a copy: `verify` tells of it.
            return False
        for each in records:
            self._fold(each)
        self._single.clear()
        return True

    def write_bundles(self) -> None:
        """Makes the bundles that the records read one by one would fill."""
        start = len(self) - len(self._single)
        while start % BUNDLE == 0 and len(self._single) >= BUNDLE:
            together = b"".join(self._single[:BUNDLE])
            if len(together) <= schema.MAX_BUNDLE_BYTES:
                self._storage.create(bundle_name(start), together)
            del self._single[:BUNDLE]
            start += BUNDLE

    def _gone(self, number: int) -> IntegrityError:
        return IntegrityError(
            f"{self.where(number)}: this log record was published, and is missing",
            hint=record.BROKEN,
        )

    # Folding.

    def _fold(self, new: Record) -> None:
        where = self.where(new.number)
        record.valid(lambda: self._apply(new), f"{where}: does not follow from those before it")
        self._sums.append(new.sha256)
        self._times.append(new.time)
        self._ends.append(len(self._segments))
        self._snapshot = None

    def _apply(self, new: Record) -> None:
        """Raises KeyError or ValueError for what no writer publishes."""
        touched = [self._delete(unit_key, new.number) for unit_key in new.deletes]
        for segment in touched:
            self._check_extensions(segment.name, segment.base)
        for kind, seg_id, generation in new.removes:
            if generation != self.generation(kind, seg_id):
                raise ValueError(f"sweeps {seg_id} of generation {generation}")
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
            raise ValueError(f"{segment.folder} was removed, or is not there yet")
        index = len(self._segments)
        if segment.kind == schema.ROLLOUT:
            self._bases.setdefault(segment.seg_id, []).append(index)
            self._rollouts[segment.seg_id] = segment
        else:
            base, score_segments = (
                self.base(segment.base),
                self.score_segments(segment.name, segment.base),
            )
            if base is None or base.tokens_sha256 != segment.tokens_sha256:
                raise ValueError(f"scores of other rollouts than {segment.base}")
            if segment.extends != (score_segments[-1].seg_id if score_segments else ""):
                raise ValueError(f"widens {segment.extends!r} of {len(score_segments)} segments")
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

    def _check_extensions(self, name: str, base: str) -> None:
        """What widens a segment says nothing without it."""
        before = ""
        for segment in self.score_segments(name, base):
            if segment.extends != before:
                raise ValueError(f"deletes {segment.extends}, and {segment.seg_id} widens it")
            before = segment.seg_id

    # Asking. All answers are as far as the log has been read.

    def prev(self) -> str:
        """sha256 that the next record has to follow."""
        return self._sums[-1]

    def sha256(self, number: int) -> str:
        """Of a record that has been read."""
        return self._sums[number + 1]

    def added(self, number: int) -> list[Segment]:
        """The segments that a record added: first of their units, so visible then."""
        return self._segments[self._ends[number] : self._ends[number + 1]]

    def time(self, number: int) -> str:
        """When a record was written, by its writer's clock; ISO 8601."""
        return self._times[number]

    def winner(self, unit_key: str) -> Segment | None:
        """The segment that holds a unit."""
        index = self._by_key.get(unit_key)
        return None if index is None else self._segments[index]

    def base(self, seg_id: str) -> Segment | None:
        """A visible rollout segment by its id."""
        found = self._bases.get(seg_id)
        return self._segments[found[0]] if found else None

    def rollouts(self, seg_id: str) -> Segment | None:
        """A rollout segment by its id, deleted or not: what an old snapshot reads."""
        return self._rollouts.get(seg_id)

    def standing(self) -> list[Segment]:
        """Every segment that gc has not removed, deleted ones too."""
        return [s for s in self._segments if s.generation == self.generation(s.kind, s.seg_id)]

    def score_segments(self, name: str, base: str) -> ScoreSegments:
        """The visible scores of one teacher on one rollout segment."""
        return tuple(self._segments[index] for index in self._score_segments.get((name, base), ()))

    def first(self, kind: str, name: str) -> Segment | None:
        """The segment that bound a name."""
        return self._names.get((kind, name))

    def generation(self, kind: str, seg_id: str) -> int:
        """How often gc has removed this content."""
        return self._removals.get((kind, seg_id), 0)

    def tags(self) -> dict[str, int]:
        """Name -> the log number that it marks."""
        return dict(self._tags)

    def deleted_after(self, number: int) -> list[Segment]:
        """Segments that were visible at record `number`, or came later, and are deleted by now."""
        return [self._segments[i] for i, by in self._deleted.items() if by > number]

    def at_time(self, time: str) -> int:
        """The newest record that was written at `time` or before; -1 = none. ISO 8601, UTC.

        Writers' clocks differ: of records in a row, none counts as older than one before it.
        """
        latest: list[str] = []
        for each in self._times:
            latest.append(max(each, latest[-1]) if latest else each)
        return bisect.bisect_right(latest, time) - 1

    def snapshot(self, number: int) -> Snapshot:
        """The fold of records 0..number. Raises StoreError where there are fewer."""
        if not -1 <= number < len(self):
            raise StoreError(
                f"{self._storage.url} has no log record {number}: its last is {len(self) - 1}",
                hint="open the store of the snapshot, or give a number that exists",
            )
        if self._snapshot is None or self._snapshot.number != number:
            visible = tuple(
                segment
                for index, segment in enumerate(self._segments[: self._ends[number + 1]])
                if self._deleted.get(index, len(self)) > number
            )
            self._snapshot = Snapshot(
                number=number, sha256=self._sums[number + 1], segments=visible
            )
        return self._snapshot


def bundle_name(first: int) -> str:
    return f"bundles/{first:010d}.jsonl"


def content_of(segment: Segment) -> Content:
    return segment.kind, segment.seg_id, segment.generation
