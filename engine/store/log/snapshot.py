"""A snapshot: the segments of a store as of one log record, whatever is added or deleted later."""

from dataclasses import dataclass

import logitcask.engine.store.format.schema as schema
from logitcask.engine.store.format.entry import Segment

ScoreSegments = tuple[Segment, ...]
"""The score segments of one teacher on one rollout segment: the first, then its extensions."""


def are_partial(score_segments: ScoreSegments) -> bool:
    """Return whether some positions have no score in these segments."""
    return sum(each.rows for each in score_segments) < score_segments[0].counts["P"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The visible segments as of one log record."""

    number: int
    """The snapshot id; -1 = before the first record."""
    sha256: str
    """Of that record."""
    segments: tuple[Segment, ...]
    """In log order, without deleted ones."""

    def rollouts(self, name: str) -> tuple[Segment, ...]:
        """Return the rollout segments of a name, by student version, then by first prompt."""
        found = [s for s in self.segments if s.kind == schema.ROLLOUT and s.name == name]
        return tuple(sorted(found, key=lambda s: (s.version, s.first)))

    def names(self, kind: str) -> list[str]:
        """Return the names in use: of rollouts ('rollout') or of teachers ('score')."""
        return sorted({s.name for s in self.segments if s.kind == kind})

    def role(self, teacher: str) -> str:
        """Return the kind of a teacher: teacher, base or context; '' without scores of it."""
        found = (s for s in self.segments if s.kind == schema.SCORE and s.name == teacher)
        return next((str(s.provenance.get("teacher_kind", "")) for s in found), "")

    def scores(self, teacher: str) -> dict[str, ScoreSegments]:
        """Return seg_id of the rollouts -> the teacher's score segments on them."""
        found: dict[str, ScoreSegments] = {}
        for segment in self.segments:
            if segment.kind == schema.SCORE and segment.name == teacher:
                found[segment.base] = (*found.get(segment.base, ()), segment)
        return found

    def unit_keys(self) -> set[str]:
        return {s.unit_key for s in self.segments}
