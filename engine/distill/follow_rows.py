"""Rows of the trainer among the roles of a loop: it publishes its student and waits for a round."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from logitcask.engine.distill.checks import pack_length
from logitcask.engine.distill.on_policy_rows import RoundRows
from logitcask.engine.distill.teacher.refreshes import Publisher
from logitcask.engine.distill.timed import Updates
from logitcask.engine.events import EventHandler
from logitcask.engine.store import Segment, Snapshot
from logitcask.engine.store.retention import delete_rollouts
from logitcask.engine.training.evaluation.drift import drifted
from logitcask.engine.training.processes import on_first
from logitcask.engine.workers.failures import Failures, error_of
from logitcask.engine.workers.timeline import span

LONG_S = 60.0
"""Seconds of waiting for a round before an event tells about it, and between two that differ."""


@dataclass(kw_only=True)
class FollowRows(RoundRows):
    """`Packs` of a loop whose rounds other processes sample and score."""

    timeline: Updates
    on_event: EventHandler

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rounds = self.loop.inputs.rounds()
        self._publisher = Publisher(self.loop, self.student)
        self._said, self._say_at_s = "", 0.0

    def prepare(self, step: int) -> Sequence[str]:
        """Publish the student, wait for the round that begins with update `step`, and pack it.

        Where units of it are beyond the bounds, wait for others in their place.
        """
        policy, timeline = self.loop.inputs.policy, self.timeline
        number, update = divmod(step, policy.updates_per_round)
        version = policy.draw_version(number)
        timeline.end()
        resampled: Sequence[str] = ()
        if not update:
            with span(timeline.file, "publish", round=number, version=version):
                digest = self._publisher.publish(version)
            snapshot, segments = self._within_bounds(number, version)
            self._round = self._packed(number, digest, snapshot, partial(_is_in, segments))
            if policy.resamples:
                resampled = on_first(lambda: self._deleted(number))
        timeline.begin(number, version + update)
        return resampled

    def _within_bounds(self, number: int, version: int) -> tuple[Snapshot, frozenset[str]]:
        """Wait for a whole round within all bounds; return a snapshot, and its segments."""
        timeline = self.timeline
        while True:
            with span(timeline.file, "wait", round=number, version=version):
                at, segments, older = self._awaited(number)
            snapshot, reasons = self._snapshot(at), dict[str, str]()
            if self.loop.inputs.follow_every:
                self._names = on_first(lambda: self._named(number))
            if older:
                with span(timeline.file, "measure", round=number, version=version):
                    reasons = self._drifted(snapshot, older)
            if not on_first(partial(self._resample, number, version, reasons)):
                return snapshot, segments

    def _drifted(self, snapshot: Snapshot, segments: frozenset[str]) -> dict[str, str]:
        """Return seg_id -> reason, of those of the segments that are beyond the drift bound."""
        inputs = self.loop.inputs
        return drifted(
            self.student,
            self._source(snapshot, partial(_is_in, segments)),
            inputs.preset.objective,
            inputs.config.train,
            n_vocab=inputs.model.n_vocab,
            pack_length=pack_length(inputs.config.train),
        )

    def _resample(self, number: int, version: int, reasons: Mapping[str, str]) -> int:
        """Delete the segments of a whole round that are beyond the bounds; return their number.

        Samplers find their units missing, and the newest version published before.
        """
        policy = self.loop.inputs.policy
        whole = policy.whole(self._rounds, number)
        assert whole is not None, "it was awaited"
        gone = policy.to_resample(number, whole, reasons)
        if gone:
            delete_rollouts(self.loop.store, gone)
            first = gone[0]
            age = f"it is {policy.age(number, first.version)} updates old"
            self.on_event(
                f"round {number}: {len(gone)} of {len(whole)} units are sampled again by version "
                f"{version}; {first.what} is of version {first.version}: "
                f"{reasons.get(first.seg_id, age)}"
            )
        return len(gone)

    def _deleted(self, number: int) -> list[str]:
        """Return the deleted segments of a round, oldest first, those before a restart too."""
        # Every version samples a unit under the same key.
        keys = {segment.unit_key for segment in self._rounds.rollouts(number).values()}
        newest_first = self.loop.store.log.deleted_after(-1)
        return [segment.seg_id for segment in newest_first if segment.unit_key in keys][::-1]

    def _awaited(self, number: int) -> tuple[int, frozenset[str], frozenset[str]]:
        """Wait for all units of a round; return (snapshot id, segments, those to measure)."""
        self._said, self._say_at_s = "", time.monotonic() + LONG_S
        # The first process looks once at a time: the others would give up on a longer wait.
        while (found := on_first(lambda: self._whole(number))) is None:
            time.sleep(self.loop.inputs.config.work.poll)
        return found

    def _snapshot(self, at: int) -> Snapshot:
        """Return a snapshot that the first process has seen; a network disk may show it later."""
        store, begun_s = self.loop.store, time.monotonic()
        while store.head().number < at and time.monotonic() - begun_s < 2 * LONG_S:
            time.sleep(self.loop.inputs.config.work.poll)
        return store.snapshot(at)

    def _whole(self, number: int) -> tuple[int, frozenset[str], frozenset[str]] | None:
        """Return as of `_awaited`, None while units of the round are missing."""
        rounds, policy = self._rounds, self.loop.inputs.policy
        at = rounds.refresh(self.loop.store).number
        if (found := policy.whole(rounds, number)) is None:
            if time.monotonic() > self._say_at_s:
                self._say_at_s = time.monotonic() + LONG_S
                if (said := self._lacks(number)) != self._said:
                    self._said = said
                    self.on_event(said)
            return None
        older = policy.older(number, found)
        segments, of_older = (frozenset(s.seg_id for s in each) for each in (found, older))
        return at, segments, of_older

    def _named(self, number: int) -> dict[str, str]:
        """Return seg_id -> name of its scores, of a whole round."""
        rounds = self._rounds
        return {each.seg_id: rounds.scores_of(each) for each in rounds.rollouts(number).values()}

    def _lacks(self, number: int) -> str:
        """Return the text on a round that is not whole."""
        units, held = self.loop.inputs.policy.units(number), self._rounds.rollouts(number)
        scored = sum(map(self._rounds.is_scored, held.values()))
        text = (
            f"waiting for round {number}: {len(held)} of {len(units)} units are sampled, {scored} "
            "scored"
        )
        store = self.loop.store
        failures = Failures(store, self.loop.inputs.config.work.max_attempts)
        failures.refresh()
        if left_out := sorted(failures.left_out):
            text += (
                f"; {len(left_out)} units of the store failed too often and are left out: "
                f"{left_out[0]} with {error_of(store, left_out[0])}; remove the cause, then: "
                f"logitcask store retry-failed {store.url}"
            )
        return text


def _is_in(segments: frozenset[str], segment: Segment) -> bool:
    return segment.seg_id in segments
