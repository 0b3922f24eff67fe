"""On-policy rows: the packs of a loop, sampled and scored round by round.

A round is identified by the version and the digest of the student that samples it, so a loop that
returns to a round finds the committed units of it and makes only the missing ones.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from logitcask.engine.commands.load_teacher import LoadedTeacher, live_backend
from logitcask.engine.distill.checks import pack_length
from logitcask.engine.distill.setup import LoopSetup
from logitcask.engine.distill.teacher.refreshes import InlineTeacher
from logitcask.engine.events import EventHandler
from logitcask.engine.models.load import live_digest
from logitcask.engine.packing.batches import Prefetcher
from logitcask.engine.packing.plan import Lengths, PackPlan, PlanKey, make_plan
from logitcask.engine.packing.source import Pack, PackSource
from logitcask.engine.rollout.plan import rollout
from logitcask.engine.score.plan import score
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import ScoreSegments, Segment, Snapshot
from logitcask.engine.types import NO_DETAIL, Detail, Progress


@dataclass(kw_only=True)
class RoundRows:
    """`Packs` of a loop, one round after the other; `prepare` of a subclass fills each."""

    loop: LoopSetup
    student: nn.Module
    """The model in training, on its device."""
    width: int
    """Packs of an update, over all processes."""

    def __post_init__(self) -> None:
        self._round: tuple[PackSource, list[PackPlan]]
        self._names: Mapping[str, str] | None = None
        """seg_id of a round -> name of its scores, where the teacher follows the student."""
        self._prefetcher = Prefetcher(self._make)

    def pack(self, index: int) -> Pack:
        return self._prefetcher.pack(index)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Make packs of this round; those of the next need a student that does not exist yet."""
        ahead = list(indices)
        updates = self.loop.inputs.policy.updates_per_round
        if ahead and ahead[0] // self.width % updates:
            self._prefetcher.prefetch(ahead)

    def _make(self, index: int) -> Pack:
        update, slot = divmod(index, self.width)
        source, plans = self._round
        pack, policy = source.pack(plans[update % len(plans)].pack(slot)), self.loop.inputs.policy
        teacher = policy.teacher_version(update // policy.updates_per_round)
        if teacher is None:
            return pack
        of_refresh = {s._replace(teacher_version=teacher): n for s, n in pack.sources.items()}
        return replace(pack, sources=of_refresh)

    def _packed(
        self, number: int, student: str, snapshot: Snapshot, only: Callable[[Segment], bool]
    ) -> tuple[PackSource, list[PackPlan]]:
        """Return the source of a round, and the plan of each of its updates.

        student: digest of the model in training. only: True for the segments of the round.
        """
        inputs = self.loop.inputs
        config, version = inputs.config, inputs.policy.draw_version(number)
        source = self._source(snapshot, only)
        # Not the snapshot id: it may differ between runs that share a store, the round does not.
        key = PlanKey(
            snapshot=version,
            snapshot_sha256=student,
            rollouts=config.store.rollouts,
            teacher=config.teacher.name,
            seed=config.run.seed,
            epochs=1,
            pack_length=pack_length(config.train),
        )
        rng = np.random.default_rng([config.run.seed, version])
        parts = deal(source.lengths(), config.loop.updates_per_round, rng)
        plans = [make_plan(key, part) for part in parts]
        assert max(map(len, plans)) <= self.width, "packs_per_update"
        return source, plans

    def _source(self, snapshot: Snapshot, only: Callable[[Segment], bool]) -> PackSource:
        """Return the source of some segments of the loop."""
        config = self.loop.inputs.config
        return PackSource(
            self.loop.store,
            snapshot,
            config.store.rollouts,
            config.teacher.name,
            partial=True,
            only=only,
            scores=None if self._names is None else scores_named(snapshot, self._names),
        )


@dataclass(kw_only=True)
class OnPolicyRows(RoundRows):
    """`Packs` of a loop in one process: a round is sampled and scored before its first update."""

    teacher: LoadedTeacher
    progress: Progress
    """Receives the number of prompts over all rounds."""
    on_event: EventHandler
    """Receives the notes of every scoring."""

    def __post_init__(self) -> None:
        super().__post_init__()
        inputs = self.loop.inputs
        self._sampler = live_backend(self.student, inputs.model, inputs.config.run)
        self._moving: InlineTeacher | None = None
        self._fixed: ScoreRequest | None = None
        if inputs.follow_every:
            live = replace(self.teacher, scorer=self._sampler)
            self._moving = InlineTeacher(self.loop, self.student, live)
        else:
            self._fixed = self.loop.score_request(self.teacher)

    def prepare(self, step: int) -> Sequence[str]:
        """Sample, score and pack the round that begins with update `step`, if one does."""
        inputs = self.loop.inputs
        number, update = divmod(step, inputs.policy.updates_per_round)
        if update:
            return ()
        current = replace(
            inputs.model,
            digest=live_digest(self.student),
            version=inputs.policy.draw_version(number),
        )
        units = rollout(
            self.loop.rollout_request(self._sampler, current, number),
            progress=lambda stage, done, units, detail=NO_DETAIL: self._report(
                stage, number, done, units, detail
            ),
        ).units_total

        def of_round(segment: Segment) -> bool:
            # Both: a first update at a learning rate of 0 leaves the weights unchanged.
            student = segment.provenance["student"]
            return bool(
                (student["weights"], student["version"]) == (current.digest, current.version)
            )

        scoring = self._fixed
        if self._moving is not None:
            scoring = self.loop.score_request(self._moving.at(number, current), of_round)
        assert scoring is not None, "a teacher moves, or it does not"
        report = score(
            scoring,
            # The counts of the scoring include the units of earlier rounds.
            progress=lambda stage, done, total, detail=NO_DETAIL: self._report(
                stage, number, max(0, done - total + units), units, detail
            ),
        )
        for note in report.notes:
            self.on_event(note)
        snapshot = self.loop.store.head()
        if self._moving is not None:
            ours = filter(of_round, snapshot.rollouts(inputs.config.store.rollouts))
            self._names = {segment.seg_id: scoring.teacher_name for segment in ours}
        self._round = self._packed(number, current.digest, snapshot, of_round)
        return ()

    def _report(self, stage: str, round_number: int, done: int, units: int, detail: Detail) -> None:
        """Report progress in prompts: a round that wraps to the first prompt has one more unit."""
        policy = self.loop.inputs.policy
        prompts = policy.prompts_per_round
        self.progress(
            stage,
            round_number * prompts + done * prompts // units,
            self.loop.inputs.config.loop.rounds * prompts,
            replace(detail, share=detail.share * prompts / units),
        )


def scores_named(snapshot: Snapshot, names: Mapping[str, str]) -> dict[str, ScoreSegments]:
    """Return seg_id of rollouts -> their scores, of names that differ."""
    scores = {name: snapshot.scores(name) for name in {*names.values()}}
    return {base: scores[name][base] for base, name in names.items() if base in scores[name]}


def deal(lengths: Sequence[Lengths], updates: int, rng: np.random.Generator) -> list[list[Lengths]]:
    """Divide the sequences at random into one share per update; sizes differ by at most one.

    Sequences and not packs: a round of short responses may fill fewer packs than it has updates.
    """
    counts = [len(segment.response) for segment in lengths]
    owner = np.split(rng.permutation(sum(counts)) % updates, np.cumsum(counts)[:-1])
    return [
        [
            # A plan leaves out sequences without a response.
            replace(segment, response=np.where(of == update, segment.response, 0))
            for segment, of in zip(lengths, owner, strict=True)
        ]
        for update in range(updates)
    ]
