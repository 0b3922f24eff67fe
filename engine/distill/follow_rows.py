"""Rows of the trainer among the roles of a loop: it publishes its student and waits for a round."""

import time
from dataclasses import dataclass

from logitcask.engine.distill.on_policy_rows import RoundRows
from logitcask.engine.distill.timed import Updates
from logitcask.engine.distill.versions import publish, remove_others, whole_copy
from logitcask.engine.events import EventHandler
from logitcask.engine.store import Snapshot
from logitcask.engine.training.processes import on_first
from logitcask.engine.workers.timeline import span

LONG_S = 60.0
"""Seconds of waiting for a round before an event tells about it."""


@dataclass(kw_only=True)
class FollowRows(RoundRows):
    """`Packs` of a loop whose rounds other processes sample and score."""

    timeline: Updates
    on_event: EventHandler

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rounds = self.loop.inputs.rounds()
        self._proved = False

    def prepare(self, step: int) -> None:
        """Publish the student, wait for the round that begins with update `step`, and pack it."""
        policy, timeline = self.loop.inputs.policy, self.timeline
        number, update = divmod(step, policy.updates_per_round)
        version = policy.draw_version(number)
        timeline.end()
        if not update:
            with span(timeline.file, "publish", round=number, version=version):
                digest = self._publish(version)
            with span(timeline.file, "wait", round=number, version=version):
                at, segments = self._awaited(number)
            snapshot = self._snapshot(at)
            self._round = self._packed(
                number, digest, snapshot, lambda segment: segment.seg_id in segments
            )
        timeline.begin(number, version + update)

    def _awaited(self, number: int) -> tuple[int, frozenset[str]]:
        """Wait for all units of a round, and return (snapshot id, segments)."""
        begun_s, silent = time.monotonic(), True
        # The first process looks once at a time: the others would give up on a longer wait.
        while (found := on_first(lambda: self._whole(number))) is None:
            if silent and time.monotonic() - begun_s > LONG_S:
                silent = False
                self.on_event(self._lacks(number))
            time.sleep(self.loop.inputs.config.work.poll)
        return found

    def _snapshot(self, at: int) -> Snapshot:
        """Return a snapshot that the first process has seen; a network disk may show it later."""
        store, begun_s = self.loop.store, time.monotonic()
        while store.head().number < at and time.monotonic() - begun_s < 2 * LONG_S:
            time.sleep(self.loop.inputs.config.work.poll)
        return store.snapshot(at)

    def _publish(self, number: int) -> str:
        """Publish the student as a version, and return its digest."""
        inputs, loop = self.loop.inputs, self.loop
        config, out = inputs.config, inputs.config.run.out
        whole = whole_copy(self.student, inputs.model, config.lora, config.run.seed)
        metadata = {"plan": loop.plan, "objective": inputs.preset.objective.record()}

        def save() -> str:
            assert whole is not None, "the first process has it"
            # To load every version again would take as long as to save it.
            digest = publish(out, whole, inputs.model, number, metadata, check=not self._proved)
            self._proved = True
            remove_others(out, number)
            return digest

        return on_first(save)

    def _whole(self, number: int) -> tuple[int, frozenset[str]] | None:
        """Return (snapshot id, segments) of a round; None while units of it are missing."""
        rounds, policy = self._rounds, self.loop.inputs.policy
        at = rounds.refresh(self.loop.store).number
        if (found := policy.whole(rounds, number)) is None:
            return None
        return at, frozenset(segment.seg_id for segment in found)

    def _lacks(self, number: int) -> str:
        """Return the text on a round that is not whole."""
        units, held = self.loop.inputs.policy.units(number), self._rounds.rollouts(number)
        scored = sum(map(self._rounds.is_scored, held.values()))
        return (
            f"waiting for round {number}: {len(held)} of {len(units)} units are sampled, {scored} "
            "scored"
        )
