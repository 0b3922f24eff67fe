"""Rounds of a loop in a store: their units and scores, read from the log as it grows."""

from collections.abc import Sequence

from logitcask.engine.distill.policy import Policy
from logitcask.engine.store import Segment, Snapshot, Store
from logitcask.engine.store.format import schema
from logitcask.engine.teachers.refreshes import refresh_version

Unit = tuple[str, int | None]
"""(seg_id of rollouts, refresh of the teacher that scores them; None where it does not move)."""

ROUND = "round"
"""Key of the provenance of rollouts: the number of their round, from 0."""


class Rounds:
    """The rollouts and scores of one loop. A refresh costs what is new since the last."""

    def __init__(
        self, policy: Policy, *, rollouts: str, teacher: str, extended: bool = False
    ) -> None:
        """Begin with nothing. rollouts, teacher: names in the store; scores of a round are those of
        its own refresh, where the teacher moves.

        extended: scores are complete with their extension, of extra ids.
        """
        self._policy, self._names = policy, (rollouts, teacher)
        self._layouts = (schema.EXTENSION,) if extended else ()
        self._moves = policy.follow_every > 0
        self._clear()

    def _clear(self) -> None:
        self._seen: Snapshot | None = None
        self._rounds: dict[int, dict[int, Segment]] = {}
        self._scored: dict[Unit, str] = {}
        """Unit -> the name of its scores. Those of other rollouts too: equal ones are one."""
        self._waiting: dict[Unit, list[Segment]] = {}
        """Unit -> our rollouts without scores."""
        self.unscored_bytes = 0
        self.units_sampled = self.units_scored = 0
        self.sampled = 0
        """Rounds from the first that have all units: those after it may lack some."""

    def refresh(self, store: Store) -> Snapshot:
        """Read what is new in a store, and return its newest snapshot."""
        snapshot = store.head()
        changes = snapshot.changes(self._seen)
        if changes is None or changes.deleted:
            self._clear()
            added: Sequence[Segment] = snapshot.segments
        else:
            added = changes.added
        for segment in added:
            self.add(segment)
        self._seen = snapshot
        while self.sampled < self._policy.rounds and not self._policy.missing(self, self.sampled):
            self.sampled += 1
        return snapshot

    def add(self, segment: Segment) -> None:
        """Count one segment of the store; rollouts come before their scores."""
        named, teacher = self._names
        if segment.kind == schema.ROLLOUT and segment.name == named:
            held = self._rounds.setdefault(self.round_of(segment), {})
            # The first commit wins, as that of a key does.
            if held.setdefault(segment.first, segment) is segment:
                self.units_sampled += 1
                if self.is_scored(segment):
                    self.units_scored += 1
                else:
                    self.unscored_bytes += segment.size
                    self._waiting.setdefault(self._unit(segment), []).append(segment)
        elif segment.kind == schema.SCORE and (
            not self._layouts or segment.layout in self._layouts
        ):
            version = refresh_version(teacher, segment.name) if self._moves else None
            if version is None and (self._moves or segment.name != teacher):
                return
            unit = segment.base, version
            # As the rollouts, so its scores: the first commit wins.
            self._scored.setdefault(unit, segment.name)
            for rollouts in self._waiting.pop(unit, ()):
                self.units_scored += 1
                self.unscored_bytes -= rollouts.size

    @property
    def waiting(self) -> list[int | None]:
        """Return the refreshes that are to score rollouts, oldest first; [None] for a teacher that
        does not move.
        """
        found = {version for _, version in self._waiting}
        return sorted(found, key=lambda version: version or 0)

    def round_of(self, segment: Segment) -> int:
        """Return the round of a rollout segment; earlier loops recorded the version alone."""
        policy = self._policy
        updates = segment.version - policy.first_version
        return int(segment.provenance.get(ROUND, updates // policy.updates_per_round))

    def rollouts(self, number: int) -> dict[int, Segment]:
        """Return first prompt -> rollout segment, of one round."""
        return self._rounds.get(number, {})

    def is_scored(self, segment: Segment) -> bool:
        return self._unit(segment) in self._scored

    def scores_of(self, segment: Segment) -> str:
        """Return the name of the scores of rollouts that have some."""
        return self._scored[self._unit(segment)]

    def _unit(self, segment: Segment) -> Unit:
        return segment.seg_id, self._policy.teacher_version(self.round_of(segment))
