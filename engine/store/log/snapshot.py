"""A snapshot: what a store holds as of one log record, whatever is added or deleted later."""

from dataclasses import dataclass

import logitcask.engine.store.format.schema as schema
from logitcask.engine.store.format.segment import Segment

ScoreSegments = tuple[Segment, ...]
"""The score segments of one teacher on one rollout segment: its first, then what widens it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A store as of one log record: it reads the same whatever comes later."""

    number: int
    """-1 = before the first record."""
    sha256: str
    """Of that record."""
    segments: tuple[Segment, ...]
    """In log order, without those that had been deleted."""

    def rollouts(self, name: str) -> tuple[Segment, ...]:
        """The rollout segments of a name, by student version, then by first prompt."""
        found = [s for s in self.segments if s.kind == schema.ROLLOUT and s.name == name]
        return tuple(sorted(found, key=lambda s: (s.unit["version"], s.unit["first"])))

    def names(self, kind: str) -> list[str]:
        """The names in use: of rollouts ('rollout') or of teachers ('score')."""
        return sorted({s.name for s in self.segments if s.kind == kind})

    def role(self, teacher: str) -> str:
        """What the scores of a name are for: teacher, base or context; '' if there are none."""
        found = (s for s in self.segments if s.kind == schema.SCORE and s.name == teacher)
        return next((str(s.lineage.get("role", "")) for s in found), "")

    def scores(self, teacher: str) -> dict[str, ScoreSegments]:
        """seg_id of the rollouts -> what the teacher says of them."""
        found: dict[str, ScoreSegments] = {}
        for segment in self.segments:
            if segment.kind == schema.SCORE and segment.name == teacher:
                found[segment.base] = (*found.get(segment.base, ()), segment)
        return found

    def unit_keys(self) -> set[str]:
        return {s.unit_key for s in self.segments}
