"""Set-up of a loop: the data that all of its roles agree on, and the identity that they record."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from logitcask.engine.commands.load_teacher import LoadedTeacher
from logitcask.engine.commands.resolve import grader_of, student_and_prompts
from logitcask.engine.commands.train import find_objective
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.config.training import Train
from logitcask.engine.distill.checks import (
    check_loop,
    check_name,
    follow_note,
    longest_of,
    pack_length,
    packs_per_update,
)
from logitcask.engine.distill.policy import Policy
from logitcask.engine.distill.rounds import ROUND, Rounds
from logitcask.engine.distill.teacher.facts import TeacherFacts
from logitcask.engine.events import EventHandler
from logitcask.engine.models.identity import digest, read_metadata
from logitcask.engine.objectives import CacheInfo, ExactnessReport, Preset, check_exactness
from logitcask.engine.prompts.graders import Grader
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.rollout.unit import RolloutRequest, default_unit, prompt_set_digest
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import Segment, Store
from logitcask.engine.teachers.refreshes import FOLLOW, refresh_name
from logitcask.engine.training.settings import settings_record, updates_at_most
from logitcask.engine.types import ALL_POSITIONS, MC_IDS, ModelRef, Prompt, ScoreParams


@dataclass(frozen=True, kw_only=True)
class LoopInput:
    """A configuration that was checked, without its teacher."""

    config: RunConfig
    preset: Preset
    model: ModelRef
    """The student before update 0."""
    prompts: list[Prompt]
    rendering: Rendering
    grader: Grader | None

    @cached_property
    def settings(self) -> Train:
        """Return [train] with its packs, for one process."""
        config, train = self.config, self.config.train
        updates = config.loop.updates_per_round
        return train.model_copy(
            update={
                "gradient_accumulation_steps": packs_per_update(config, self.prompts),
                # A checkpoint inside a round would not have the student that sampled the round.
                "save_steps": -(-train.save_steps // updates) * updates,
                "pack_length": pack_length(train),
            }
        )

    @property
    def updates(self) -> int:
        loop = self.config.loop
        return updates_at_most(self.settings, loop.rounds * loop.updates_per_round)

    @property
    def longest(self) -> int:
        return longest_of(self.config, self.prompts)

    @property
    def follow_every(self) -> int:
        """Return the updates between two refreshes of the teacher; 0 = it does not move."""
        teacher = self.config.teacher
        return (teacher.follow_every or self.config.loop.updates_per_round) if teacher.follow else 0

    @property
    def follow(self) -> dict[str, Any]:
        """Return how the teacher follows the student, for provenance."""
        teacher = self.config.teacher
        decay = {"ema_decay": teacher.ema_decay} if teacher.follow == "ema" else {}
        return {"kind": teacher.follow, "every": self.follow_every, **decay}

    @property
    def teacher_model(self) -> str:
        """Return the name of the teacher's model."""
        return self.config.student.model if self.follow_every else self.config.teacher.model

    @cached_property
    def policy(self) -> Policy:
        config, loop = self.config, self.config.loop
        return Policy(
            rounds=-(-self.updates // loop.updates_per_round),
            prompts_per_round=loop.prompts_per_round,
            prompts=len(self.prompts),
            unit_prompts=config.rollout.unit_prompts or default_unit(config.rollout),
            updates_per_round=loop.updates_per_round,
            max_age=loop.max_age,
            max_unscored_bytes=loop.max_unscored_bytes,
            first_version=self.model.version,
            resamples=config.train.staleness_action == "resample",
            follow_every=self.follow_every,
        )

    def may_resample(self) -> bool:
        """Return whether units that are done may be deleted: until the last update is."""
        if not self.policy.resamples:
            return False
        metadata = read_metadata(self.config.run.out)
        return metadata is None or metadata["version"] < self.model.version + self.updates

    def rounds(self) -> Rounds:
        """Return the rounds of the loop before they are read."""
        return Rounds(
            self.policy,
            rollouts=self.config.store.rollouts,
            teacher=self.config.teacher.name,
            extended=self.config.score.extra_ids == MC_IDS,
        )

    def exactness(
        self, params: ScoreParams, *, bounds: bool, span_rows: str = ""
    ) -> ExactnessReport:
        """Check the objective against the scores of a round; bounds: entropies are intervals;
        span_rows: as of TeacherFacts."""
        model = self.model
        return loop_exactness(
            self.config,
            self.preset,
            params,
            n_vocab=model.n_vocab,
            version=model.version,
            bounds=bounds,
            span_rows=span_rows,
        )


def loop_exactness(
    config: RunConfig,
    preset: Preset,
    params: ScoreParams,
    *,
    n_vocab: int,
    version: int = 0,
    bounds: bool = False,
    span_rows: str = "",
) -> ExactnessReport:
    """Check an objective against the scores that a round of a loop will have.

    n_vocab, version: of the student; bounds: entropies are intervals; span_rows: as of
    TeacherFacts. Raises ObjectiveError.
    """
    return check_exactness(
        preset,
        CacheInfo(
            student_k=config.rollout.student_topk,
            k_min=config.score.teacher_topk_min,
            k_max=config.score.teacher_topk_max,
            n_vocab=n_vocab,
            at_student=params.at_student,
            mc_draws=config.rollout.mc_draws,
            at_mc=config.score.extra_ids == MC_IDS,
            q_draws=config.score.draws,
            versions=(),  # a new one every round
            student_version=version,
            same_base_weights=True,
            same_template=True,
            plain_sampling=config.rollout.is_plain(),
            rewards=config.rollout.grader != "",
            samples=config.rollout.n,
            entropy_bounds=bounds,
            span_rows=span_rows or None,
            max_age=config.loop.max_age,
            scored="" if config.score.positions == ALL_POSITIONS else config.score.positions,
        ),
    )


def read_input(config: RunConfig, on_event: EventHandler) -> LoopInput:
    """Read and check the student, the prompts and the settings of a loop."""
    preset = find_objective(config.train)
    model, prompts, rendering = student_and_prompts(
        config.student, config.prompts, config.rollout, on_event
    )
    check_loop(config, prompts)
    if note := follow_note(config):
        on_event(note)
    found = LoopInput(
        config=config,
        preset=preset,
        model=model,
        prompts=prompts,
        rendering=rendering,
        grader=grader_of(config.rollout, model, prompts),
    )
    # Raises for an objective that no teacher could serve, before the weights of one are read.
    found.exactness(config.score.params(config.run.seed), bounds=False)
    return found


@dataclass(frozen=True, kw_only=True)
class LoopSetup:
    """A loop in its store: requests of its rounds, and the identity that all of them record."""

    inputs: LoopInput
    teacher: TeacherFacts
    store: Store
    identity: Mapping[str, Any]
    """Recorded in run.json."""
    run: Mapping[str, Any]
    """Recorded by the rollouts. Rounds of two runs under one name would mix students that share
    only their version numbers."""

    @cached_property
    def set_digest(self) -> str:
        return _set_digest(self.inputs, run=self.run)

    def rollout_request(self, sampler: Any, model: ModelRef, number: int) -> RolloutRequest:
        """Describe the rollouts of one round by a version of the student."""
        config, inputs, policy = self.inputs.config, self.inputs, self.inputs.policy
        count = policy.prompts_per_round
        return RolloutRequest(
            store=self.store,
            model=model,
            sampler=sampler,
            prompts=inputs.prompts,
            sampling=config.rollout,
            name=config.store.rollouts,
            seed=config.run.seed,
            student_k=config.rollout.student_topk,
            mc_draws=config.rollout.mc_draws,
            grader=self.inputs.grader,
            unit_prompts=policy.unit_prompts,
            profile=config.store.profile,
            first=number * count % len(inputs.prompts),
            count=count,
            versions=True,
            run=self.run,
            known_digest=self.set_digest,
            round=number if policy.max_age else None,
            draw_version=policy.draw_version(number),
            stop_token_ids=config.rollout.stop_token_ids,
            provenance_extra={**inputs.rendering.record(), ROUND: number},
        )

    def score_request(
        self, teacher: LoadedTeacher, only: Callable[[Segment], bool] | None = None
    ) -> ScoreRequest:
        """Describe the scores of every round, or of the rounds of a refresh of a teacher that
        follows; only: as of ScoreRequest.
        """
        config, model = self.inputs.config, teacher.model
        name, record = config.teacher.name, dict(teacher.provenance_extra)
        if self.inputs.follow_every:
            name = refresh_name(name, model.version, model.digest)
            record[FOLLOW] = self.inputs.follow
        return ScoreRequest(
            store=self.store,
            model=model,
            scorer=teacher.scorer,
            teacher_name=name,
            rollouts_name=config.store.rollouts,
            only=only,
            params=self.teacher.params,
            role=config.score.teacher_kind,
            context=teacher.context,
            extra_ids=config.score.extra_ids or None,
            positions=config.score.positions,
            profile=config.store.profile,
            eos_rows=config.score.foreign_eos,
            shared=teacher.shared,
            alignment=teacher.alignment,
            provenance_extra=record,
        )

    @property
    def plan(self) -> str:
        """Return the digest of the data and its order."""
        return digest(self.identity)


def open_loop(inputs: LoopInput, teacher: TeacherFacts, store: Store) -> LoopSetup:
    """Set a loop up in its store. Raises IdentityError where its rollouts are of another run."""
    config = inputs.config
    partial = config.score.positions != ALL_POSITIONS
    identity = {
        "rollouts": config.store.rollouts,
        "prompts": _set_digest(inputs),
        "unit_prompts": config.rollout.unit_prompts,
        "teacher": teacher.digest,
        "teacher_name": config.teacher.name,
        "request": asdict(teacher.params),
        **({"at": config.score.extra_ids} if config.score.extra_ids else {}),
        **({"positions": config.score.positions} if partial else {}),
        **({"context": teacher.context} if teacher.context else {}),
        **({FOLLOW: inputs.follow} if inputs.follow_every else {}),
        "loop": config.loop.record(),
    }
    record = settings_record(inputs.settings, config.lora, config.run)
    run = {"settings": record, "objective": inputs.preset.objective.record(), **identity}
    check_name(store, config.store.rollouts, run, inputs.model)
    return LoopSetup(
        inputs=inputs,
        teacher=teacher,
        store=store,
        identity={**identity, "store": store.uuid},
        run=run,
    )


def _set_digest(inputs: LoopInput, run: Mapping[str, Any] | None = None) -> str:
    rollout = inputs.config.rollout
    return prompt_set_digest(
        inputs.prompts,
        inputs.model,
        rollout,
        seed=inputs.config.run.seed,
        student_k=rollout.student_topk,
        mc_draws=rollout.mc_draws,
        grader=rollout.grader,
        stop_token_ids=rollout.stop_token_ids,
        run=run,
    )
