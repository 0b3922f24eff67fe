"""The fold of the records of a log: the state of a store, and the questions that it answers.

The first commit of a unit_key wins; a deleted unit is not visible from its record on, and its key
is free again.
"""

import bisect
import itertools

import logitcask.engine.store.format.schema as schema
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.log.lines import BROKEN
from logitcask.engine.store.log.record import Record, file_name
from logitcask.engine.store.log.snapshot import Changes, Listed, ScoreSegments, Snapshot, place


class Fold:
    """The state of a store as of the records that were folded."""

    def __init__(self, url: str, genesis: str) -> None:
        """Begin with no record; genesis is the sha256 of format.json, the `prev` of the first."""
        self._url = url
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
        self._deleted_at: dict[str, int] = {}
        """unit_key -> the last record that deleted it."""
        self._last_delete = -1
        """The last record that deleted a segment."""
        self._visible: tuple[int, tuple[Segment, ...]] = (-1, ())
        """The segments as of one record, the last one of which they were read."""
        self._sorted: dict[str, list[Segment]] = {}
        """Name -> its visible rollouts in order, of names that were read since their last delete.
        """
        self._scores: dict[str, dict[str, ScoreSegments]] = {}
        """Teacher -> base -> its visible scores, of teachers that were read since their last
        delete."""

    def __len__(self) -> int:
        return len(self._sums) - 1

    def where(self, number: int) -> str:
        """Return the path or URL of a record."""
        return f"{self._url}/log/{file_name(number)}"

    def fold(self, new: Record) -> None:
        """Apply the next record. Raises IntegrityError where it contradicts those before it."""
        try:
            self._apply(new)
        except (ValueError, KeyError) as error:
            raise IntegrityError(
                f"{self.where(new.number)}: contradicts the records before it ({error})",
                hint=BROKEN,
            ) from error
        self._sums.append(new.sha256)
        self._times.append(new.time)
        self._ends.append(len(self._segments))

    def _apply(self, new: Record) -> None:
        """Apply a record to the state. Raises KeyError or ValueError where it contradicts it."""
        if new.deletes:
            self._delete_all(new)
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

    def _delete_all(self, new: Record) -> None:
        for segment in [self._delete(unit_key, new.number) for unit_key in new.deletes]:
            # An extension is meaningless without the segment that it extends.
            before = ""
            for each in self.score_segments(segment.name, segment.base):
                if each.extends != before:
                    raise ValueError(f"deletes {each.extends}, which {each.seg_id} extends")
                before = each.seg_id

    def _add(self, segment: Segment) -> None:
        removed = self.generation(segment.kind, segment.seg_id) if self._removals else 0
        if segment.generation != removed:
            raise ValueError(f"{segment.path} has another generation than the newest")
        index = len(self._segments)
        if segment.kind == schema.ROLLOUT:
            self._bases.setdefault(segment.seg_id, []).append(index)
            self._rollouts[segment.seg_id] = segment
            if segment.name in self._sorted:
                bisect.insort(self._sorted[segment.name], segment, key=place)
        else:
            base = self._bases.get(segment.base)
            before = self._score_segments.get((segment.name, segment.base), [])
            if not base or self._segments[base[0]].tokens_sha256 != segment.tokens_sha256:
                raise ValueError(f"scores of other rollouts than {segment.base}")
            if segment.extends != (self._segments[before[-1]].seg_id if before else ""):
                raise ValueError(f"extends {segment.extends!r} of {len(before)} segments")
            self._score_segments[segment.name, segment.base] = [*before, index]
            if (scores := self._scores.get(segment.name)) is not None:
                scores[segment.base] = (*scores.get(segment.base, ()), segment)
        self._segments.append(segment)
        self._by_key[segment.unit_key] = index
        self._names.setdefault((segment.kind, segment.name), segment)

    def _delete(self, unit_key: str, number: int) -> Segment:
        index = self._by_key.pop(unit_key)
        segment = self._segments[index]
        self._deleted[index] = number
        self._deleted_at[unit_key] = number
        self._last_delete = number
        if segment.kind == schema.ROLLOUT:
            self._bases[segment.seg_id].remove(index)
            self._sorted.pop(segment.name, None)
        else:
            self._scores.pop(segment.name, None)
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

    def added_since(self, number: int) -> list[Segment]:
        """Return the segments that record `number` and those after it made visible."""
        return self._segments[self._ends[number] :]

    def deleted_at(self, unit_key: str) -> int:
        """Return the last record that deleted a unit, -1 for none."""
        return self._deleted_at.get(unit_key, -1)

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
        return [self._segments[index] for index in self._deleted_after(number)]

    def _deleted_after(self, number: int) -> list[int]:
        """Return the indices of the segments that the records after `number` deleted."""
        newest_first = reversed(self._deleted.items())
        return [i for i, _ in itertools.takewhile(lambda each: each[1] > number, newest_first)]

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
                f"{self._url} has no log record {number}: its last is {len(self) - 1}",
                hint="open the store of the snapshot, or give an existing number",
            )
        return Snapshot(number=number, sha256=self.sha256(number), state=self)

    # The state of snapshots. The newest record is answered from what is kept for it, any other
    # one from the segments.

    def segments_at(self, number: int) -> tuple[Segment, ...]:
        """Return the visible segments as of a record, in log order."""
        before, visible = self._visible
        if before <= number and self._last_delete <= before:
            visible += tuple(self._segments[self._ends[before + 1] : self._ends[number + 1]])
        elif before != number:
            visible = tuple(self._visible_of(0, self._ends[number + 1], number))
        self._visible = (number, visible)
        return visible

    def rollouts_at(self, number: int, name: str) -> tuple[Segment, ...]:
        """Return the visible rollouts of a name as of a record, by version and first prompt."""
        if number != len(self) - 1:
            return Listed(self.segments_at(number)).rollouts_at(number, name)
        if name not in self._sorted:
            self._sorted[name] = list(Listed(self.segments_at(number)).rollouts_at(number, name))
        return tuple(self._sorted[name])

    def scores_at(self, number: int, teacher: str) -> dict[str, ScoreSegments]:
        """Return base -> the visible scores of a teacher on it as of a record."""
        if number != len(self) - 1:
            return Listed(self.segments_at(number)).scores_at(number, teacher)
        if teacher not in self._scores:
            self._scores[teacher] = Listed(self.segments_at(number)).scores_at(number, teacher)
        return dict(self._scores[teacher])

    def unit_keys_at(self, number: int) -> set[str]:
        """Return the unit keys of the visible segments as of a record."""
        if number != len(self) - 1:
            return Listed(self.segments_at(number)).unit_keys_at(number)
        return set(self._by_key)

    def changes(self, start: int, end: int) -> Changes:
        """Return the segments that are visible as of one of two records only, start <= end."""
        before = self._ends[start + 1]
        deleted = [i for i in self._deleted_after(start) if i < before and self._deleted[i] <= end]
        added = self._visible_of(before, self._ends[end + 1], end)
        return Changes([self._segments[index] for index in sorted(deleted)], added)

    def _visible_of(self, first: int, end: int, number: int) -> list[Segment]:
        """Return the segments of the indices first..end-1 that are visible as of a record."""
        deleted, later = self._deleted, len(self)
        part = self._segments[first:end]
        return [s for i, s in enumerate(part, first) if deleted.get(i, later) > number]
