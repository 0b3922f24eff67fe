"""Set-up of a loop: the data that all of its roles agree on, and the identity that they record."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from logitcask.engine.commands.load_teacher import LoadedTeacher, open_teacher
from logitcask.engine.commands.resolve import grader_of, student_and_prompts
from logitcask.engine.commands.train import find_objective
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.config.training import Train
from logitcask.engine.distill.checks import (
    check_loop,
    check_name,
    longest_of,
    pack_length,
    packs_per_update,
)
from logitcask.engine.distill.policy import Policy
from logitcask.engine.distill.rounds import ROUND, Rounds
from logitcask.engine.errors import IntegrityError
from logitcask.engine.events import CancelToken, EventHandler
from logitcask.engine.models.digests import read_json, write_json
from logitcask.engine.models.identity import digest, read_metadata
from logitcask.engine.objectives import CacheInfo, ExactnessReport, Preset, check_exactness
from logitcask.engine.prompts.graders import Grader
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.rollout.unit import RolloutRequest, default_unit, prompt_set_digest
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import Store
from logitcask.engine.training.run_dir.files import TEACHER, check_same, make_folder
from logitcask.engine.training.settings import settings_record, updates_at_most
from logitcask.engine.types import ALL_POSITIONS, MC_IDS, ModelRef, Prompt, ScoreParams


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopTeacher:
    """Facts of a loaded teacher, for the roles that do not load it."""

    digest: str
    params: ScoreParams
    bounds: bool
    """Its entropies are intervals."""


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

    def exactness(self, params: ScoreParams, *, bounds: bool) -> ExactnessReport:
        """Check the objective against the scores of a round; bounds: entropies are intervals."""
        config = self.config
        return check_exactness(
            self.preset,
            CacheInfo(
                student_k=config.rollout.student_topk,
                k_min=config.score.teacher_topk_min,
                k_max=config.score.teacher_topk_max,
                n_vocab=self.model.n_vocab,
                at_student=params.at_student,
                at_mc=config.score.extra_ids == MC_IDS,
                q_draws=config.score.draws,
                versions=(),  # a new one every round
                student_version=self.model.version,
                same_base_weights=True,
                same_template=True,
                plain_sampling=config.rollout.is_plain(),
                rewards=config.rollout.grader != "",
                samples=config.rollout.n,
                entropy_bounds=bounds,
                max_age=config.loop.max_age,
                scored="" if config.score.positions == ALL_POSITIONS else config.score.positions,
            ),
        )


def open_loop_teacher(inputs: LoopInput, cancel: CancelToken) -> LoadedTeacher:
    """Load the teacher of a loop; raises as `open_teacher` does."""
    config = inputs.config
    return open_teacher(
        config.teacher,
        config.run,
        inputs.model.provenance(),
        template=inputs.rendering.chat_template,
        exact=config.score.exact,
        k_max=config.score.teacher_topk_max,
        cancel=cancel,
    )


def read_input(config: RunConfig, on_event: EventHandler) -> LoopInput:
    """Read and check the student, the prompts and the settings of a loop."""
    preset = find_objective(config.train)
    model, prompts, rendering = student_and_prompts(
        config.student, config.prompts, config.rollout, on_event
    )
    check_loop(config, prompts)
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


def facts_of(teacher: LoadedTeacher, config: RunConfig) -> tuple[LoopTeacher, tuple[str, ...]]:
    """Return the facts of a teacher, and notes on what it cannot serve."""
    params, notes = teacher.score_params(config.score, config.run.seed)
    facts = LoopTeacher(
        digest=teacher.model.digest,
        params=params,
        bounds="bounds" in teacher.scorer.capabilities,
    )
    return facts, (*teacher.notes, *notes)


def write_facts(out: Path, facts: LoopTeacher) -> None:
    """Write the facts of the teacher to the folder of a run, for its other roles.

    Raises IdentityError where the folder has those of another teacher or request.
    """
    if (earlier := read_facts(out)) is not None:
        hint = f"set run.out to a new folder, or remove {out / TEACHER} if that loop never began"
        check_same(out, {"teacher": asdict(earlier)}, {"teacher": asdict(facts)}, hint=hint)
        return
    make_folder(out)
    # Several scorers may write the same file.
    staged = out / f".{TEACHER}.{uuid4().hex}"
    write_json(staged, asdict(facts))
    staged.replace(out / TEACHER)


def read_facts(out: Path) -> LoopTeacher | None:
    """Read the facts of the teacher; None before a scorer has written them."""
    file = out / TEACHER
    if not file.exists():
        return None
    hint = f"remove {file}: the next scorer writes it"
    found = read_json(file, hint=hint)
    try:
        return LoopTeacher(**found | {"params": ScoreParams(**found["params"])})
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{file} has other keys than ours: {error}", hint=hint) from error


@dataclass(frozen=True, kw_only=True)
class LoopSetup:
    """A loop in its store: requests of its rounds, and the identity that all of them record."""

    inputs: LoopInput
    teacher: LoopTeacher
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

    def score_request(self, teacher: LoadedTeacher) -> ScoreRequest:
        """Describe the scores of every round."""
        config = self.inputs.config
        return ScoreRequest(
            store=self.store,
            model=teacher.model,
            scorer=teacher.scorer,
            teacher_name=config.teacher.name,
            rollouts_name=config.store.rollouts,
            params=self.teacher.params,
            extra_ids=config.score.extra_ids or None,
            positions=config.score.positions,
            profile=config.store.profile,
            eos_rows=config.score.foreign_eos,
            shared=teacher.shared,
            provenance_extra=teacher.provenance_extra,
        )

    @property
    def plan(self) -> str:
        """Return the digest of the data and its order."""
        return digest(self.identity)


def open_loop(inputs: LoopInput, teacher: LoopTeacher, store: Store) -> LoopSetup:
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
