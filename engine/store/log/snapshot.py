"""A snapshot: the segments of a store as of one log record, whatever is added or deleted later."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import logitcask.engine.store.format.schema as schema
from logitcask.engine.store.format.entry import Segment

ScoreSegments = tuple[Segment, ...]
"""The score segments of one teacher on one rollout segment: the first, then its extensions."""


def are_partial(score_segments: ScoreSegments) -> bool:
    """Return whether some positions have no score in these segments."""
    return sum(each.rows for each in score_segments) < score_segments[0].counts["P"]


class Changes(NamedTuple):
    """The difference between two snapshots, both parts in log order."""

    deleted: Sequence[Segment]
    """Visible in the earlier one only."""
    added: Sequence[Segment]
    """Visible in the later one only."""


class State(Protocol):
    """The state of a log, which answers for any of its records."""

    def segments_at(self, number: int) -> tuple[Segment, ...]:
        """Return the visible segments as of a record."""

    def rollouts_at(self, number: int, name: str) -> tuple[Segment, ...]:
        """Return those of a name as `Snapshot.rollouts`."""

    def scores_at(self, number: int, teacher: str) -> dict[str, ScoreSegments]:
        """Return those of a teacher as `Snapshot.scores`."""

    def unit_keys_at(self, number: int) -> set[str]:
        """Return their unit keys."""

    def changes(self, start: int, end: int) -> Changes:
        """Return what the records after `start`, up to `end`, changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The visible segments as of one log record."""

    number: int
    """The snapshot id; -1 = before the first record."""
    sha256: str
    """Of that record, and so of all before it: equal snapshots have equal segments."""
    state: State = field(compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.number, self.sha256, self.segments)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Return the segments in log order, without deleted ones."""
        return self.state.segments_at(self.number)

    def rollouts(self, name: str) -> tuple[Segment, ...]:
        """Return the rollout segments of a name, by student version, then by first prompt."""
        return self.state.rollouts_at(self.number, name)

    def names(self, kind: str) -> list[str]:
        """Return the names in use: of rollouts ('rollout') or of teachers ('score')."""
        return sorted({s.name for s in self.segments if s.kind == kind})

    def role(self, teacher: str) -> str:
        """Return the kind of a teacher: teacher, base or context; '' without scores of it."""
        found = (s for s in self.segments if s.kind == schema.SCORE and s.name == teacher)
        return next((str(s.provenance.get("teacher_kind", "")) for s in found), "")

    def scores(self, teacher: str) -> dict[str, ScoreSegments]:
        """Return seg_id of the rollouts -> the teacher's score segments on them."""
        return self.state.scores_at(self.number, teacher)

    def unit_keys(self) -> set[str]:
        return self.state.unit_keys_at(self.number)

    def changes(self, earlier: "Snapshot | None") -> Changes | None:
        """Return the changes since an earlier snapshot; None = since the empty store.

        The time that it takes depends on the changes alone. Return None where `earlier` is of
        another log, or later than this one.
        """
        if earlier is None:
            return self.state.changes(-1, self.number)
        if earlier.state is not self.state or earlier.number > self.number:
            return None
        return self.state.changes(earlier.number, self.number)


class Listed:
    """The state of a log with one record, which made all of some segments visible."""

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self._segments = segments

    def segments_at(self, number: int) -> tuple[Segment, ...]:
        return self._segments

    def rollouts_at(self, number: int, name: str) -> tuple[Segment, ...]:
        found = [s for s in self._segments if s.kind == schema.ROLLOUT and s.name == name]
        return tuple(sorted(found, key=place))

    def scores_at(self, number: int, teacher: str) -> dict[str, ScoreSegments]:
        found: dict[str, ScoreSegments] = {}
        for segment in self._segments:
            if segment.kind == schema.SCORE and segment.name == teacher:
                found[segment.base] = (*found.get(segment.base, ()), segment)
        return found

    def unit_keys_at(self, number: int) -> set[str]:
        return {s.unit_key for s in self._segments}

    def changes(self, start: int, end: int) -> Changes:
        return Changes((), self._segments if start < end else ())


def place(segment: Segment) -> tuple[int, int]:
    """Return the place of rollouts among those of their name: student version, first prompt."""
    return segment.version, segment.first


def _unpickled(number: int, sha256: str, segments: tuple[Segment, ...]) -> Snapshot:
    return Snapshot(number=number, sha256=sha256, state=Listed(segments))
