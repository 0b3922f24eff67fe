"""A teacher's own responses to prompts, as rollouts of which the teacher is the sampling model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from logitcask.engine.commands.resolve import grader_of, student_and_prompts
from logitcask.engine.commands.rollout import rollout_request
from logitcask.engine.config.recipes import TeacherText
from logitcask.engine.config.sections import Rollout, RolloutConfig, RunConfig, Student
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.events import EventHandler
from logitcask.engine.models.identity import model_ref
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.recipes.kept import Chosen, KeptReport, keep
from logitcask.engine.rollout.unit import RolloutRequest
from logitcask.engine.teachers.checks import check_identity
from logitcask.engine.teachers.remote import is_remote
from logitcask.engine.types import ModelRef, Progress, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherPrompts:
    """Prompts that a teacher can sample for a student, checked before weights are loaded."""

    config: RolloutConfig
    """Rollouts of the teacher."""
    teacher: ModelRef
    student: ModelRef
    """With the stop ids of the teacher besides its own."""
    own_stop_ids: tuple[int, ...]
    """Stop ids of the student's folder."""
    prompts: list[Prompt]
    rendering: Rendering


def teacher_prompts(
    config: RunConfig,
    settings: TeacherText,
    name: str,
    *,
    prompts: Path | None = None,
    grader: str = "",
    on_event: EventHandler,
) -> TeacherPrompts:
    """Read the prompts for the teacher's rollouts `name`; prompts: a file in place of [prompts].

    Raises ConfigError for a teacher that cannot sample here, IdentityError for one with another
    tokenizer or chat template than the student, PromptError, and ModelError.
    """
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(
            f"WORLD_SIZE = {size}: a recipe samples in one process",
            hint="start it without torchrun; `logitcask train` on its rollouts runs under torchrun",
        )
    if config.teacher.follow or is_remote(config.teacher.model):
        what = f"follow = {config.teacher.follow}" if config.teacher.follow else "a server"
        raise ConfigError(
            f"teacher.model = {config.teacher.model or 'the student'} ({what}): this recipe "
            "samples responses of the teacher",
            hint="give the teacher's folder or hub id, with --set teacher.model=FOLDER",
        )
    section = config.prompts
    if prompts is not None:
        section = section.model_copy(update={"file": prompts, "limit": None})
    sampling = RolloutConfig(
        student=Student(model=config.teacher.model, revision=config.teacher.revision),
        prompts=section,
        store=config.store.model_copy(update={"rollouts": name}),
        rollout=Rollout(
            **settings.record(),
            student_topk=config.score.teacher_topk_max,
            grader=grader,
            stop_token_ids=config.rollout.stop_token_ids,
            unit_prompts=config.rollout.unit_prompts,
        ),
        run=config.run,
    )
    teacher, read, rendering = student_and_prompts(
        sampling.student, sampling.prompts, sampling.rollout, on_event
    )
    plain = model_ref(
        config.student.model,
        revision=config.student.revision,
        chat_template=rendering.chat_template,
    )
    check_identity(plain.provenance(), teacher)
    if plain.template_digest != teacher.template_digest:
        raise IdentityError(
            f"{teacher.name} and {plain.name} render prompts by different chat templates, so the "
            "student would learn to answer prompts that its own template never writes",
            hint="save the teacher's chat template in the student's folder, or set "
            "prompts.chat_template = false",
        )
    student = replace(plain, stop_ids=tuple(sorted({*plain.stop_ids, *teacher.stop_ids})))
    return TeacherPrompts(
        config=sampling,
        teacher=teacher,
        student=student,
        own_stop_ids=plain.stop_ids,
        prompts=read,
        rendering=rendering,
    )


def open_request(found: TeacherPrompts) -> RolloutRequest:
    """Load the teacher and describe its rollouts; the caller closes the sampler."""
    grader = grader_of(found.config.rollout, found.teacher, found.prompts)
    return rollout_request(found.config, found.teacher, found.prompts, found.rendering, grader)


def keep_chosen(
    config: RunConfig,
    found: TeacherPrompts,
    request: RolloutRequest,
    chosen: list[Chosen],
    scorer: Any,
    *,
    name: str,
    rule: Mapping[str, Any],
    progress: Progress,
) -> KeptReport:
    """Commit chosen responses as the rollouts `name` of the student, see `keep`."""
    return keep(
        request.store,
        chosen,
        scorer,
        found.student,
        name=name,
        teacher=config.teacher.name,
        student_k=config.rollout.student_topk,
        rule=rule,
        profile=config.store.profile,
        extra=found.rendering.record(),
        progress=progress,
    )
