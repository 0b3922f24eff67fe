"""Load the teacher of a loop, and what it reads in place of the student's prompts."""

from dataclasses import replace
from typing import Any

from logitcask.engine.backends.base import open_backend
from logitcask.engine.commands.load_teacher import LoadedTeacher, backend, open_teacher
from logitcask.engine.commands.resolve import columns_of
from logitcask.engine.commands.score import teacher_context
from logitcask.engine.distill.setup import LoopInput
from logitcask.engine.errors import PromptError
from logitcask.engine.events import CancelToken, EventHandler
from logitcask.engine.prompts.source import open_source
from logitcask.engine.teachers.alignment import RolloutText
from logitcask.engine.types import Prompt


def open_loop_teacher(
    inputs: LoopInput, cancel: CancelToken, on_event: EventHandler, *, live: bool = False
) -> LoadedTeacher:
    """Load the teacher of a loop, one that follows with the weights of the student before update 0.

    live: load no weights of one that follows, for the model in training scores. Raises as
    `open_teacher` does, and PromptError for a context that lacks a prompt.
    """
    config, text = inputs.config, _text(inputs, on_event)
    over_spans = inputs.preset.objective.over_spans
    if not over_spans:
        text.check_unused("the objective is not over spans", by_spans=config.teacher.by_spans)
    if inputs.follow_every:
        scorer: Any = open_backend("hf")
        if not live:
            scorer = backend(inputs.model, config.run, exact=config.score.exact)
        teacher = LoadedTeacher(model=inputs.model, scorer=scorer, shared=None)
    else:
        teacher = open_teacher(
            config.teacher,
            config.run,
            inputs.model.provenance(),
            template=text.has_template(config.teacher.model),
            exact=config.score.exact,
            k_max=config.score.teacher_topk_max,
            cancel=cancel,
            # Before it is loaded: another objective cannot read scores of spans.
            text=text if over_spans else None,
        )
    try:
        context = context_of(inputs, teacher, text)
        alignment = teacher.alignment
        if alignment is not None and context is not None:
            alignment = replace(alignment, prompts=context)
        return replace(teacher, context=context, alignment=alignment)
    except BaseException:
        teacher.close()
        raise


def _text(inputs: LoopInput, on_event: EventHandler) -> RolloutText:
    """Return the text of the rollouts of a loop, for the teachers that read it."""
    config = inputs.config
    return RolloutText(
        score=config.score,
        rendering=inputs.rendering,
        stored=lambda: inputs.prompts,
        source=open_source(config.prompts.file, columns_of(config.prompts)),
        max_new_tokens=lambda: config.rollout.max_new_tokens,
        on_event=on_event,
    )


def context_of(
    inputs: LoopInput, teacher: LoadedTeacher, text: RolloutText
) -> dict[str, Prompt] | None:
    """Return the prompts that a teacher reads in place of the student's; None = the same.

    Raises PromptError where one is missing.
    """
    config = inputs.config
    if config.score.teacher_kind != "context":
        return None
    student = None if teacher.alignment is None else inputs.model.provenance()
    context = teacher_context(text, teacher.model, student, named=config.teacher.student_tokenizer)
    if lost := [prompt.id for prompt in inputs.prompts if prompt.id not in context]:
        raise PromptError(
            f"score.context = {config.score.context} has no prompt {lost[0]!r:.80}, and "
            f"{len(lost) - 1} others of prompts.file",
            hint="give the teacher a prompt for every id of prompts.file",
        )
    return context
