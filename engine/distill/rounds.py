"""Rounds of a loop in a store: their units and scores, read from the log as it grows."""

from collections.abc import Sequence

from logitcask.engine.distill.policy import Policy
from logitcask.engine.store import Segment, Snapshot, Store
from logitcask.engine.store.format import schema

ROUND = "round"
"""Key of the provenance of rollouts: the number of their round, from 0."""


class Rounds:
    """The rollouts and scores of one loop. A refresh costs what is new since the last."""

    def __init__(
        self, policy: Policy, *, rollouts: str, teacher: str, extended: bool = False
    ) -> None:
        """Begin with nothing. rollouts, teacher: names in the store.

        extended: scores are complete with their extension, of extra ids.
        """
        self._policy, self._names = policy, (rollouts, teacher)
        self._layouts = (schema.EXTENSION,) if extended else ()
        self._clear()

    def _clear(self) -> None:
        self._seen: Snapshot | None = None
        self._rounds: dict[int, dict[int, Segment]] = {}
        self._scored: set[str] = set()
        """seg_id of rollouts with scores, those of other names too: equal rollouts are one."""
        self._sizes: dict[str, int] = {}
        """seg_id -> bytes of our rollouts."""
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
        rollouts, teacher = self._names
        if segment.kind == schema.ROLLOUT and segment.name == rollouts:
            held = self._rounds.setdefault(self.round_of(segment), {})
            # The first commit wins, as that of a key does.
            if held.setdefault(segment.first, segment) is segment:
                self._sizes[segment.seg_id] = segment.size
                self.units_sampled += 1
                if self.is_scored(segment):
                    self.units_scored += 1
                else:
                    self.unscored_bytes += segment.size
        elif segment.kind == schema.SCORE and segment.name == teacher:
            done = not self._layouts or segment.layout in self._layouts
            if done and segment.base not in self._scored:
                self._scored.add(segment.base)
                if segment.base in self._sizes:
                    self.units_scored += 1
                    self.unscored_bytes -= self._sizes[segment.base]

    def round_of(self, segment: Segment) -> int:
        """Return the round of a rollout segment; earlier loops recorded the version alone."""
        policy = self._policy
        updates = segment.version - policy.first_version
        return int(segment.provenance.get(ROUND, updates // policy.updates_per_round))

    def rollouts(self, number: int) -> dict[int, Segment]:
        """Return first prompt -> rollout segment, of one round."""
        return self._rounds.get(number, {})

    def is_scored(self, segment: Segment) -> bool:
        return segment.seg_id in self._scored
