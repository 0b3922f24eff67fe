"""On-policy rows: the packs of a loop, sampled and scored round by round.

A round is identified by the version and the digest of the student that samples it, so a loop that
returns to a round finds the committed units of it and makes only the missing ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from logitcask.engine.commands.load_teacher import LoadedTeacher, live_backend
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.config.training import Train
from logitcask.engine.events import EventHandler
from logitcask.engine.models.load import live_digest
from logitcask.engine.packing.batches import Prefetcher
from logitcask.engine.packing.plan import Lengths, PackPlan, PlanKey, make_plan
from logitcask.engine.packing.source import Pack, PackSource
from logitcask.engine.prompts.graders import Grader
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.rollout.plan import rollout
from logitcask.engine.rollout.unit import RolloutRequest
from logitcask.engine.score.plan import score
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import Segment, Store
from logitcask.engine.types import (
    NO_DETAIL,
    PACK_LENGTH,
    Detail,
    ModelRef,
    Progress,
    Prompt,
    ScoreParams,
)


@dataclass(kw_only=True)
class OnPolicyRows:
    """`Packs` of a loop: a round is sampled and scored before its first update."""

    student: nn.Module
    """The model in training, on its device."""
    config: RunConfig
    store: Store
    model: ModelRef
    """Identity of the student before update 0."""
    prompts: list[Prompt]
    rendering: Rendering
    teacher: LoadedTeacher
    params: ScoreParams
    width: int
    """Packs of an update."""
    run: Mapping[str, Any]
    """Identity of the loop, recorded by its rollouts."""
    grader: Grader | None
    progress: Progress
    """Receives the number of prompts over all rounds."""
    on_event: EventHandler
    """Receives the notes of every scoring."""

    def __post_init__(self) -> None:
        self._sampler = live_backend(self.student, self.model, self.config.run)
        self._round: tuple[PackSource, list[PackPlan]]
        self._prefetcher = Prefetcher(self._make)

    def prepare(self, step: int) -> None:
        """Sample, score and pack the round that begins with update `step`, if one does."""
        number, update = divmod(step, self.config.loop.updates_per_round)
        if update:
            return
        current = replace(
            self.model, digest=live_digest(self.student), version=self.model.version + step
        )
        units = self._sample(current, number)
        report = score(
            ScoreRequest(
                store=self.store,
                model=self.teacher.model,
                scorer=self.teacher.scorer,
                teacher_name=self.config.teacher.name,
                rollouts_name=self.config.store.rollouts,
                params=self.params,
                extra_ids=self.config.score.extra_ids or None,
                positions=self.config.score.positions,
                profile=self.config.store.profile,
                eos_rows=self.config.score.foreign_eos,
                shared=self.teacher.shared,
                provenance_extra=self.teacher.provenance_extra,
            ),
            # The counts of the scoring include the units of earlier rounds.
            progress=lambda stage, done, total, detail=NO_DETAIL: self._report(
                stage, number, max(0, done - total + units), units, detail
            ),
        )
        for note in report.notes:
            self.on_event(note)
        self._round = self._packed(current)

    def pack(self, index: int) -> Pack:
        return self._prefetcher.pack(index)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Make packs of this round; those of the next need a student that does not exist yet."""
        ahead = list(indices)
        if ahead and ahead[0] // self.width % self.config.loop.updates_per_round:
            self._prefetcher.prefetch(ahead)

    def _make(self, index: int) -> Pack:
        update, slot = divmod(index, self.width)
        source, plans = self._round
        return source.pack(plans[update % len(plans)].pack(slot))

    def _report(self, stage: str, round_number: int, done: int, units: int, detail: Detail) -> None:
        """Report progress in prompts: a round that wraps to the first prompt has one more unit."""
        loop = self.config.loop
        prompts = loop.prompts_per_round
        self.progress(
            stage,
            round_number * prompts + done * prompts // units,
            loop.rounds * prompts,
            replace(detail, share=detail.share * prompts / units),
        )

    def _sample(self, current: ModelRef, round_number: int) -> int:
        """Sample the missing units of the round, and return the number of all its units."""
        config, count = self.config, self.config.loop.prompts_per_round
        return rollout(
            RolloutRequest(
                store=self.store,
                model=current,
                sampler=self._sampler,
                prompts=self.prompts,
                sampling=config.rollout,
                name=config.store.rollouts,
                seed=config.run.seed,
                student_k=config.rollout.student_topk,
                mc_draws=config.rollout.mc_draws,
                grader=self.grader,
                unit_prompts=config.rollout.unit_prompts or None,
                profile=config.store.profile,
                first=round_number * count % len(self.prompts),
                count=count,
                versions=True,
                run=self.run,
                stop_token_ids=config.rollout.stop_token_ids,
                provenance_extra=self.rendering.record(),
            ),
            progress=lambda stage, done, units, detail=NO_DETAIL: self._report(
                stage, round_number, done, units, detail
            ),
        ).units_total

    def _packed(self, current: ModelRef) -> tuple[PackSource, list[PackPlan]]:
        """Return the source of the round's segments, and the plan of each of its updates."""
        config = self.config

        def of_round(segment: Segment) -> bool:
            # Both: a first update at a learning rate of 0 leaves the weights unchanged.
            student = segment.provenance["student"]
            return bool(
                (student["weights"], student["version"]) == (current.digest, current.version)
            )

        source = PackSource(
            self.store,
            self.store.head(),
            config.store.rollouts,
            config.teacher.name,
            partial=True,
            only=of_round,
        )
        # Not the snapshot id: it may differ between runs that share a store, the round does not.
        key = PlanKey(
            snapshot=current.version,
            snapshot_sha256=current.digest,
            rollouts=config.store.rollouts,
            teacher=config.teacher.name,
            seed=config.run.seed,
            epochs=1,
            pack_length=pack_length(config.train),
        )
        rng = np.random.default_rng([config.run.seed, current.version])
        parts = deal(source.lengths(), config.loop.updates_per_round, rng)
        plans = [make_plan(key, part) for part in parts]
        assert max(map(len, plans)) <= self.width, "packs_per_update"
        return source, plans


def pack_length(train: Train) -> int:
    """Return the tokens of a pack, one number for all rounds: their lengths are not known before.

    All packs of a share make one update, so a long one costs no update.
    """
    return train.pack_length or PACK_LENGTH


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
