"""The bounds of a loop: no order of admissions, commits, kills and updates breaks them."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from logitcask.engine.distill.policy import Policy
from logitcask.engine.distill.rounds import ROUND, Rounds
from logitcask.engine.errors import StoreError
from logitcask.engine.store import Segment
from logitcask.engine.store.format.entry import SegmentBody
from logitcask.engine.store.log.snapshot import Changes

SIZE = 10
"""Bytes of each segment of rollouts."""


def policy_of(**changes: Any) -> Policy:
    values: dict[str, Any] = {
        **{"rounds": 5, "prompts_per_round": 3, "prompts": 7, "unit_prompts": 2},
        **{"updates_per_round": 1, "max_age": 2, "max_unscored_bytes": 45, "first_version": 4},
    }
    return Policy(**{**values, **changes})


def sampled(number: int, first: int, version: int, *, recorded: bool = True) -> Segment:
    body = SegmentBody(
        unit={"version": version, "first": first},
        provenance={ROUND: number} if recorded else {},
    )
    return Segment(
        kind="rollout",
        seg_id=f"{number}/{first}",
        unit_key=f"{number}/{first}",
        name="main",
        layout="",
        profile="",
        size=SIZE,
        version=version,
        first=first,
        source=body,
    )


def scored(base: str, *, layout: str = "full", name: str = "big") -> Segment:
    return Segment(
        kind="score",
        unit_key=f"{base} scored",
        name=name,
        base=base,
        layout=layout,
        profile="",
        source=SegmentBody(unit={}, provenance={}),
    )


def rounds_of(policy: Policy, *segments: Segment, **options: Any) -> Rounds:
    found = Rounds(policy, rollouts="main", teacher="big", **options)
    for segment in segments:
        found.add(segment)
    return found


def admitted(policy: Policy, there: Rounds, newest: int) -> list[int]:
    return list(policy.admitted(there, newest))


def test_a_round_begins_when_its_sampler_is_young_enough() -> None:
    policy = policy_of(updates_per_round=2, max_age=4)
    there = rounds_of(policy)
    # Rounds 0 to 4 have their first updates at 0, 2, 4, 6, 8; the first version is 4.
    assert admitted(policy, there, 4) == [0, 1, 2]
    assert admitted(policy, there, 6) == [0, 1, 2, 3]
    assert admitted(policy_of(max_age=0), rounds_of(policy), 4) == [0]


def test_a_round_that_wraps_has_the_units_of_both_ends() -> None:
    policy = policy_of()
    assert [policy.units(number) for number in (0, 1, 2)] == [
        [(0, 2), (2, 1)],
        [(3, 2), (5, 1)],
        [(6, 1), (0, 2)],
    ]
    assert policy.units_total == 10


def test_bytes_that_wait_for_scores_stop_admissions() -> None:
    policy = policy_of(max_unscored_bytes=2 * SIZE)
    first, second = sampled(0, 0, 4), sampled(0, 2, 4)
    assert admitted(policy, rounds_of(policy, first), 4) == [0, 1, 2]
    assert admitted(policy, rounds_of(policy, first, second), 4) == []
    of_other = scored(first.seg_id, name="other")
    assert admitted(policy, rounds_of(policy, first, second, of_other), 4) == []
    there = rounds_of(policy, first, second, scored(first.seg_id))
    assert admitted(policy, there, 4) == [1, 2]
    assert there.unscored_bytes == SIZE


def test_scores_of_equal_rollouts_under_another_name_count() -> None:
    policy = policy_of()
    there = rounds_of(policy, scored("0/0"), sampled(0, 0, 4))
    assert (there.units_sampled, there.units_scored, there.unscored_bytes) == (1, 1, 0)


def test_scores_with_extra_ids_are_complete_with_their_extension() -> None:
    policy = policy_of()
    segments = [sampled(0, 0, 4), scored("0/0")]
    assert rounds_of(policy, *segments, extended=True).units_scored == 0
    segments.append(scored("0/0", layout="extension"))
    assert rounds_of(policy, *segments, extended=True).units_scored == 1


def test_the_teacher_of_a_round_is_worked_by_hand() -> None:
    """Let rounds of 2 updates begin up to 4 updates early, by refreshes at 4, 8, 12 ..."""
    policy = policy_of(updates_per_round=2, max_age=4, follow_every=4)
    assert [policy.teacher_version(number) for number in range(8)] == [4, 4, 4, 4, 8, 8, 12, 12]
    assert [policy.is_refresh(version) for version in (4, 6, 8)] == [True, False, True]
    assert [policy.refresh_before(version) for version in (4, 6, 8, 10)] == [4, 4, 4, 8]
    assert policy_of().teacher_version(3) is None
    assert not policy_of().is_refresh(4)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 60))
def test_the_teacher_of_a_round_is_published_in_time_and_bounded(
    updates: int, every: int, ahead: int, number: int
) -> None:
    age, every = ahead * updates + (updates - 1 if ahead else 0), every * updates
    policy = policy_of(updates_per_round=updates, max_age=age, follow_every=every)
    teacher = policy.teacher_version(number)
    assert teacher is not None
    assert policy.is_refresh(teacher)
    # A round begins at the first published version that is young enough for it.
    published = range(policy.first_version, policy.draw_version(number) + 1, updates)
    earliest = min(version for version in published if policy.age(number, version) <= age)
    assert policy.first_version <= teacher <= earliest
    assert policy.age(number, teacher) <= age + every - updates
    assert teacher <= (policy.teacher_version(number + 1) or 0)
    # What a trainer reads that begins the round: its scores, and the average before its own.
    oldest = policy.oldest_refresh(policy.draw_version(number))
    assert oldest <= teacher
    assert policy.is_refresh(oldest)
    assert policy.draw_version(number) - oldest <= age + every


def test_a_round_is_scored_by_its_own_refresh_alone() -> None:
    """Refresh at 4, 5 ...: a round 0 of version 4 waits for scores of that version."""
    policy = policy_of(max_age=0, follow_every=1)
    first, second = sampled(0, 0, 4), sampled(1, 3, 5)
    others = [
        scored("0/0"),
        scored("0/0", name="big.v5-00000000"),
        scored("0/0", name="other.v4-00000000"),
    ]
    there = rounds_of(policy, first, second, *others)
    assert (there.units_sampled, there.units_scored, there.waiting) == (2, 0, [4, 5])
    there.add(scored("0/0", name="big.v4-11111111"))
    # Of a trainer that was killed, and then published other weights of the version.
    there.add(scored("0/0", name="big.v4-22222222"))
    assert (there.units_scored, there.unscored_bytes, there.waiting) == (1, SIZE, [5])
    assert there.is_scored(first)
    assert there.scores_of(first) == "big.v4-11111111"
    assert not there.is_scored(second)


def test_the_round_of_the_trainer_begins_also_while_later_refreshes_are_missing() -> None:
    """Let a trainer resume at version 4 with units that wait for version 5 of the teacher."""
    fields = {"max_age": 1, "max_unscored_bytes": SIZE, "unit_prompts": 3}
    moving, fixed = (policy_of(**fields, follow_every=every) for every in (1, 0))
    later = sampled(2, 6, 5)
    assert moving.teacher_version(2) == 5
    assert admitted(moving, rounds_of(moving, later), 4) == [0]
    assert admitted(fixed, rounds_of(fixed, later), 4) == []


def test_equal_rollouts_of_two_rounds_are_scored_at_once() -> None:
    """Let one version sample both greedily: their content, and so their seg_id, is the same."""
    policy = policy_of(prompts=3, unit_prompts=3)
    first = sampled(0, 0, 4)
    again = replace(first, unit_key="again", source=SegmentBody(unit={}, provenance={ROUND: 1}))
    there = rounds_of(policy, first, again)
    assert (there.units_sampled, there.unscored_bytes) == (2, 2 * SIZE)
    there.add(scored(first.seg_id))
    assert (there.units_scored, there.unscored_bytes, there.waiting) == (2, 0, [])


def test_the_round_of_an_earlier_loop_follows_from_its_version() -> None:
    policy = policy_of(updates_per_round=2, max_age=0)
    there = rounds_of(policy, sampled(0, 3, 6, recorded=False))
    assert list(there.rollouts(1)) == [3]


@pytest.mark.parametrize(("version", "age"), [(3, 3), (7, -1)])
def test_a_sequence_beyond_the_bounds_is_never_consumed(version: int, age: int) -> None:
    policy = policy_of(unit_prompts=3)
    segment = sampled(2, 6, version), sampled(2, 0, 5)
    there = rounds_of(policy, *segment, *(scored(each.seg_id) for each in segment))
    with pytest.raises(StoreError, match=f"its age is {age} updates, and max_age is 2"):
        policy.whole(there, 2)


def test_segments_beyond_a_bound_are_sampled_again_by_the_version_that_trains() -> None:
    # Round 2 is trained on by version 6; its bound is an age of 2.
    segments = [sampled(2, 6, 3), sampled(2, 0, 5)]
    assert policy_of().to_resample(2, segments, {"2/0"}) == []
    policy = policy_of(resamples=True)
    assert policy.to_resample(2, segments, set()) == segments[:1], "too old"
    assert policy.to_resample(2, segments, {"2/0"}) == segments, "too old, and beyond the drift"
    again = [sampled(2, 6, 6), sampled(2, 0, 6)]
    assert policy.older(2, again) == []
    assert policy.to_resample(2, again, {"2/0", "2/6"}) == [], "once"
    there = rounds_of(policy, *segments, *(scored(each.seg_id) for each in segments))
    assert policy_of(unit_prompts=3, resamples=True).whole(there, 2) == segments


class Loop(RuleBasedStateMachine):
    """Samplers, scorers and a trainer that any order of steps and kills may interleave."""

    @initialize(
        updates=st.integers(1, 3),
        more=st.integers(0, 5),
        cap=st.integers(1, 60),
        age=st.booleans(),
        resamples=st.booleans(),
        refresh=st.integers(0, 2),
    )
    def begin(
        self, updates: int, more: int, cap: int, age: bool, resamples: bool, refresh: int
    ) -> None:
        self.policy = policy_of(
            follow_every=refresh * updates,
            updates_per_round=updates,
            max_age=updates + more if age else 0,
            max_unscored_bytes=cap,
            resamples=resamples,
        )
        self.there = rounds_of(self.policy)
        self.committed: list[Segment] = []
        self.deleted: Counter[tuple[str, int]] = Counter()
        self.stale: Counter[tuple[str, int]] = Counter()
        """(unit, version) -> units in hand of older versions when it was deleted first."""
        self.newest = self.policy.first_version
        self.consumed = 0
        self.in_hand: list[Segment] = []
        self.scoring: list[Segment] = []
        self.ages: set[int] = set()

    def units(self) -> list[Segment]:
        """Return the units that a sampler may begin now, with the version that samples them."""
        return [
            replace(sampled(number, first, self.newest), seg_id=f"{number}/{first}/{self.newest}")
            for number in self.policy.admitted(self.there, self.newest)
            for first, _ in self.policy.missing(self.there, number)
        ]

    def unscored(self) -> list[Segment]:
        """Return the rollouts without scores whose teacher is published."""
        held = [each for n in range(5) for each in self.there.rollouts(n).values()]
        return [
            each
            for each in held
            if not self.there.is_scored(each) and (self.teacher(each) or 0) <= self.newest
        ]

    def teacher(self, rollouts: Segment) -> int | None:
        return self.policy.teacher_version(rollouts.provenance[ROUND])

    def whole(self) -> bool:
        there = self.there
        if self.consumed == self.policy.rounds:
            return False
        return self.policy.whole(there, self.consumed) is not None

    @precondition(lambda self: self.units() and len(self.in_hand) < 3)
    @rule(data=st.data())
    def begin_unit(self, data: Any) -> None:
        """Begin any unit, also one that another sampler has in hand: a lease may have ended."""
        unit = data.draw(st.sampled_from(self.units()))
        age = self.policy.age(unit.provenance[ROUND], self.newest)
        due = self.policy.follow_every > 0 and age <= 0
        assert due or self.there.unscored_bytes < self.policy.max_unscored_bytes
        self.in_hand.append(unit)

    @precondition(lambda self: self.in_hand)
    @rule(data=st.data(), killed=st.booleans())
    def end_unit(self, data: Any, killed: bool) -> None:
        unit = data.draw(st.sampled_from(self.in_hand))
        self.in_hand.remove(unit)
        # The store commits one segment of a key.
        if not killed and unit.first not in self.there.rollouts(unit.provenance[ROUND]):
            self.commit(unit)

    def commit(self, segment: Segment) -> None:
        self.committed.append(segment)
        self.there.add(segment)

    @precondition(lambda self: self.unscored())
    @rule(data=st.data())
    def score(self, data: Any) -> None:
        rollouts = data.draw(st.sampled_from(self.unscored()))
        version = self.teacher(rollouts)
        name = "big" if version is None else f"big.v{version}-00000000"
        self.commit(scored(rollouts.seg_id, name=name))

    @precondition(lambda self: self.whole())
    @rule(data=st.data(), killed=st.booleans())
    def train(self, data: Any, killed: bool) -> None:
        """Measure the drift, which may be any; resample, or train, unless it is killed before."""
        found = self.policy.whole(self.there, self.consumed)
        assert found is not None
        older = self.policy.older(self.consumed, found)
        drifted = {each.seg_id for each in older if data.draw(st.booleans())}
        gone = self.policy.to_resample(self.consumed, found, drifted)
        self.delete(gone)
        if gone or killed:
            return
        assert not self.policy.resamples or not drifted
        assert all(map(self.there.is_scored, found))
        assert [each.first for each in found] == [u for u, _ in self.policy.units(self.consumed)]
        self.ages |= {self.newest - segment.version for segment in found}
        self.consumed += 1
        self.newest = self.policy.draw_version(self.consumed)

    def delete(self, segments: list[Segment]) -> None:
        for segment in segments:
            assert segment.version < self.newest
            at = (segment.unit_key, self.newest)
            waiting = [unit for unit in self.in_hand if unit.unit_key == segment.unit_key]
            self.stale.setdefault(at, sum(unit.version < self.newest for unit in waiting))
            self.deleted[at] += 1
        gone = {segment.seg_id for segment in segments}
        self.committed = [s for s in self.committed if not {s.seg_id, s.base} & gone]
        if gone:
            self.there = rounds_of(self.policy, *self.committed)

    @invariant()
    def resamples_a_unit_once_for_a_version(self) -> None:
        # Samplers of older versions may have had it in hand.
        if hasattr(self, "policy"):
            assert all(self.deleted[at] <= 1 + self.stale[at] for at in self.deleted)

    @precondition(lambda self: self.consumed)
    @rule(data=st.data())
    def kill_the_trainer(self, data: Any) -> None:
        """Resume at an earlier round, whose version is then the newest one."""
        self.consumed = data.draw(st.integers(0, self.consumed))
        self.newest = self.policy.draw_version(self.consumed)
        self.deleted.clear()
        self.stale.clear()

    @invariant()
    def is_within_its_bounds(self) -> None:
        if not hasattr(self, "policy"):
            return
        assert all(0 <= age <= self.policy.max_age for age in self.ages)
        # A round has at most two units, and that of the trainer is admitted in any case.
        limit = self.policy.max_unscored_bytes + (5 if self.policy.follow_every else 3) * SIZE
        assert self.there.unscored_bytes <= limit

    @invariant()
    def can_go_on(self) -> None:
        if hasattr(self, "policy") and self.consumed < self.policy.rounds:
            assert self.in_hand or self.units() or self.unscored() or self.whole()


Loop.TestCase.settings = settings(max_examples=30, stateful_step_count=50, deadline=None)
TestLoop = Loop.TestCase


def test_a_refresh_reads_what_is_new_and_forgets_what_was_deleted() -> None:
    policy = policy_of()
    segments = [sampled(0, 0, 4), sampled(0, 2, 4), scored("0/0")]
    deleted: list[Segment] = []

    class Head:
        def __init__(self) -> None:
            self.segments = [each for each in segments if each not in deleted]
            self.number = len(segments)

        def changes(self, earlier: Any) -> Any:
            start = 0 if earlier is None else earlier.number
            return Changes(deleted=tuple(deleted), added=tuple(segments[start:]))

    store: Any = SimpleNamespace(head=Head)
    there = rounds_of(policy)
    there.refresh(store)
    assert (there.sampled, there.units_sampled, there.units_scored) == (1, 2, 1)
    segments.append(sampled(1, 3, 4))
    there.refresh(store)
    assert (there.sampled, there.units_sampled) == (1, 3)
    deleted.append(segments[1])
    there.refresh(store)
    assert (there.sampled, there.units_sampled) == (0, 2)
