"""Policy of a loop: which rounds may be sampled, and which may be trained on.

Both are functions of what the store holds and of the newest version of the student, so nothing can
be lost by a kill, and a restart cannot let a burst of rounds begin.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from logitcask.engine.errors import StoreError
from logitcask.engine.rollout.unit import unit_ranges
from logitcask.engine.store import Segment


class RoundsHeld(Protocol):
    """The rounds that a store holds, as `rounds.Rounds` reads them."""

    unscored_bytes: int

    def rollouts(self, number: int) -> dict[int, Segment]:
        """Return first prompt -> rollout segment, of one round."""

    def is_scored(self, segment: Segment) -> bool: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Rounds of a loop, and the bounds on their age and on work that waits for scores.

    Round r has the updates r x updates_per_round and those after it. By admission, no version that
    samples a unit of it is more than max_age updates older than the student at the first of them.
    """

    rounds: int
    prompts_per_round: int
    prompts: int
    """Prompts of the file, which rounds take in order, again and again."""
    unit_prompts: int
    updates_per_round: int
    max_age: int
    max_unscored_bytes: int
    first_version: int
    """Version of the student before update 0."""
    resamples: bool = False
    """Units beyond the bounds are deleted, and sampled again by the version that trains on them."""
    follow_every: int = 0
    """Updates between two refreshes of a teacher that follows the student; 0 = it does not move."""

    def units(self, number: int) -> list[tuple[int, int]]:
        """Return (first prompt, prompts) of each unit of a round."""
        first = number * self.prompts_per_round % self.prompts
        return unit_ranges(first, self.prompts_per_round, self.prompts, self.unit_prompts)

    @property
    def units_total(self) -> int:
        return sum(len(self.units(number)) for number in range(self.rounds))

    def draw_version(self, number: int) -> int:
        """Return the version that samples a round where max_age is 0: it seeds every other."""
        return self.first_version + number * self.updates_per_round

    def age(self, number: int, version: int) -> int:
        """Return the updates from a version to the first update of a round."""
        return self.draw_version(number) - version

    def teacher_version(self, number: int) -> int | None:
        """Return the refresh of the teacher that scores a round; None where it does not move.

        It is the newest one that is published when the first unit of the round may begin, so no
        scorer waits for a version, and the trainer's pace does not change it. At the first update
        of the round it is at most max_age + follow_every - updates_per_round updates old.
        """
        if not self.follow_every:
            return None
        ahead = self.max_age // self.updates_per_round
        return self._refresh(max(0, number - ahead) * self.updates_per_round)

    def is_refresh(self, version: int) -> bool:
        """Return whether the teacher is refreshed at a version."""
        return self.follow_every > 0 and self._refresh(version - self.first_version) == version

    def oldest_refresh(self, version: int) -> int:
        """Return the oldest refresh that a trainer reads which begins a round at a version: that of
        the round, or the one before, from which an average goes on.
        """
        number = (version - self.first_version) // self.updates_per_round
        teacher = self.teacher_version(number)
        return version if teacher is None else min(teacher, self.refresh_before(version))

    def refresh_before(self, version: int) -> int:
        """Return the last refresh before a version, the first version at least."""
        return self._refresh(max(0, version - self.first_version - 1))

    def _refresh(self, updates: int) -> int:
        return self.first_version + updates // self.follow_every * self.follow_every

    def missing(self, there: RoundsHeld, number: int) -> list[tuple[int, int]]:
        """Return the units of a round that are not sampled."""
        held = there.rollouts(number)
        return [unit for unit in self.units(number) if unit[0] not in held]

    def admitted(self, there: RoundsHeld, newest: int, since: int = 0) -> Iterator[int]:
        """Yield the rounds, `since` and later, that the version `newest` may sample units of now.

        None while too much waits for scores: each unit that begins adds its own bytes to less than
        max_unscored_bytes. With a teacher that follows, all but the round that the trainer waits
        for: what waits may be of a refresh that the trainer published before it was killed, and
        publishes again after this round.
        """
        full = there.unscored_bytes >= self.max_unscored_bytes
        for number in range(since, self.rounds):
            age = self.age(number, newest)
            if age > self.max_age or (full and (age > 0 or not self.follow_every)):
                return
            if self.missing(there, number):
                yield number

    def whole(self, there: RoundsHeld, number: int) -> list[Segment] | None:
        """Return the segments of a round to train on; None while a unit has no scores.

        Raises StoreError for a segment beyond the bounds of the loop that is not to be resampled.
        """
        held = there.rollouts(number)
        found = [held[first] for first, _ in self.units(number) if first in held]
        if len(found) < len(self.units(number)) or not all(map(there.is_scored, found)):
            return None
        for segment in found:
            age = self.age(number, segment.version)
            if age < 0 or (age > self.max_age and not self.resamples):
                raise StoreError(
                    f"{segment.what} is of round {number} and version {segment.version}: its age "
                    f"is {age} updates, and max_age is {self.max_age}",
                    hint="run `logitcask store delete STORE --segment ID`, and it is sampled again",
                )
        return found

    def older(self, number: int, whole: Sequence[Segment]) -> list[Segment]:
        """Return the segments of a whole round that may be resampled.

        Not those of the version that trains on the round: they have not drifted, and another sample
        by this version would be no newer. So resampling ends.
        """
        if not self.resamples:
            return []
        return [segment for segment in whole if self.age(number, segment.version) > 0]

    def to_resample(
        self, number: int, whole: Sequence[Segment], drifted: Collection[str]
    ) -> list[Segment]:
        """Return the segments of a whole round to delete before its first update.

        drifted: seg_ids of those of `older` that are beyond the drift bound.
        """
        return [
            segment
            for segment in self.older(number, whole)
            if segment.seg_id in drifted or self.age(number, segment.version) > self.max_age
        ]
