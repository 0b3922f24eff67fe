"""Rows that are made round by round: what an on-policy loop trains on.

A round is known by the version and the live digest of the student that samples it, so a loop that
comes back to a round finds what it committed and makes only the rest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from logitcask.engine.commands.load_teacher import LoadedTeacher, live_backend
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.events import EventHandler
from logitcask.engine.models.load import live_digest
from logitcask.engine.packing.batches import Ahead
from logitcask.engine.packing.plan import Lengths, PackPlan, PlanKey, make_plan
from logitcask.engine.packing.source import Pack, PackSource
from logitcask.engine.prompts.graders import Grader
from logitcask.engine.rollout.plan import rollout
from logitcask.engine.rollout.unit import RolloutRequest
from logitcask.engine.score.plan import score
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import Segment, Store
from logitcask.engine.types import ModelRef, Progress, Prompt, ScoreParams, no_progress


class OnPolicyRows:
    """The `Packs` of a loop: a round's rollouts and scores are made before its first update."""

    def __init__(
        self,
        student: nn.Module,
        config: RunConfig,
        store: Store,
        model: ModelRef,
        prompts: list[Prompt],
        template: bool,
        teacher: LoadedTeacher,
        request: ScoreParams,
        width: int,
        run: Mapping[str, Any],
        grader: Grader | None = None,
        progress: Progress = no_progress,
        on_event: EventHandler = lambda line: None,
    ) -> None:
        """`student` is the model in training, on its device; `request` what the teacher is asked;
        `width` the packed rows of an update; `run` what the name of the rollouts stands for;
        `grader` who gives responses rewards; `progress` is told of the prompts of all rounds,
        `on_event` the notes of every scoring.
        """
        self._student = student
        self._config = config
        self._store = store
        self._model = model
        self._prompts = prompts
        self._template = template
        self._teacher = teacher
        self._request = request
        self._width = width
        self._run = run
        self._grading = grader
        self._progress = progress
        self._on_event = on_event
        self._sampler = live_backend(student, model, config.run)
        self._made: tuple[PackSource, list[PackPlan]]
        self._ahead = Ahead(self._make)

    def prepare(self, step: int) -> None:
        """Makes the round that update `step` begins; inside a round there is nothing to do."""
        updates = self._config.loop.updates_per_round
        if step % updates:
            return
        live = replace(
            self._model, digest=live_digest(self._student), version=self._model.version + step
        )
        number = step // updates
        units = self._roll(live, number)
        scored = score(
            ScoreRequest(
                store=self._store,
                model=self._teacher.model,
                scorer=self._teacher.scorer,
                teacher_name=self._config.teacher.name,
                rollouts_name=self._config.store.rollouts,
                params=self._request,
                at=self._config.score.extra_name(),
                profile=self._config.store.profile,
                eos_rows=self._config.score.foreign_eos,
                shared=self._teacher.shared,
                lineage_extra=self._teacher.lineage_extra,
            ),
            # It counts the units of earlier rounds, too.
            progress=lambda stage, done, all_: self._tell(
                stage, number, max(0, done - all_ + units), units
            ),
        )
        for note in scored.notes:
            self._on_event(note)
        self._made = self._pack(live)

    def row(self, index: int) -> Pack:
        return self._ahead.row(index)

    def expect(self, indices: Iterable[int]) -> None:
        """Rows of the next round are of a student that does not exist yet."""
        ahead = list(indices)
        if ahead and ahead[0] // self._width % self._config.loop.updates_per_round:
            self._ahead.expect(ahead)

    def _make(self, index: int) -> Pack:
        update, slot = divmod(index, self._width)
        source, plans = self._made
        return source.row(plans[update % len(plans)].row(slot))

    def _tell(self, stage: str, round_number: int, done: int, units: int) -> None:
        """In prompts, because a round that begins again with the first has a unit more."""
        loop = self._config.loop
        prompts = loop.prompts_per_round
        self._progress(
            stage, round_number * prompts + done * prompts // units, loop.rounds * prompts
        )

    def _roll(self, live: ModelRef, round_number: int) -> int:
        """The units of the round."""
        config, count = self._config, self._config.loop.prompts_per_round
        return rollout(
            RolloutRequest(
                store=self._store,
                model=live,
                sampler=self._sampler,
                prompts=self._prompts,
                sampling=config.rollout,
                name=config.store.rollouts,
                seed=config.run.seed,
                student_k=config.rollout.student_topk,
                mc_draws=config.rollout.mc_draws,
                grader=self._grading,
                unit_prompts=config.rollout.unit_prompts or None,
                profile=config.store.profile,
                first=round_number * count % len(self._prompts),
                count=count,
                versions=True,
                run=self._run,
                lineage_extra={"chat_template": self._template},
            ),
            progress=lambda stage, done, units: self._tell(stage, round_number, done, units),
        ).units_total

    def _pack(self, live: ModelRef) -> tuple[PackSource, list[PackPlan]]:
        """The round's own segments, packed for each of its updates."""
        config = self._config

        def ours(segment: Segment) -> bool:
            # Both: a first update at a learning rate of 0 leaves the weights as they are.
            student = segment.lineage["student"]
            return bool((student["weights"], student["version"]) == (live.digest, live.version))

        snapshot = self._store.head()
        source = PackSource(
            self._store,
            snapshot,
            config.store.rollouts,
            config.teacher.name,
            partial=True,
            only=ours,
        )
        # The pin's number may differ between runs that share a store; the round may not.
        key = PlanKey(
            snapshot=live.version,
            snapshot_sha256=live.digest,
            rollouts=config.store.rollouts,
            teacher=config.teacher.name,
            seed=config.run.seed,
            epochs=1,
            pack_length=config.train.pack_length,
        )
        rng = np.random.default_rng([config.run.seed, live.version])
        parts = deal(source.lengths(), config.loop.updates_per_round, rng)
        plans = [make_plan(key, part) for part in parts]
        assert max(map(len, plans)) <= self._width, "rows_per_update"
        return source, plans


def deal(lengths: Sequence[Lengths], updates: int, rng: np.random.Generator) -> list[list[Lengths]]:
    """Drawn shares of the sequences, one for each update, equally many but for one.

    Whole packed rows would not do: a round of short responses may fill less rows than updates.
    """
    counts = [len(segment.response) for segment in lengths]
    owner = np.split(rng.permutation(sum(counts)) % updates, np.cumsum(counts)[:-1])
    return [
        [
            # A plan leaves out what has no response.
            replace(segment, response=np.where(of == update, segment.response, 0))
            for segment, of in zip(lengths, owner, strict=True)
        ]
        for update in range(updates)
    ]
