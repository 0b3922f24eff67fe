"""`logitcask store estimate`: the size of a store before it is paid for."""

from dataclasses import replace

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.load_teacher import backend, open_teacher
from logitcask.engine.commands.resolve import grader_of, student_and_prompts
from logitcask.engine.config.sections import EstimateConfig
from logitcask.engine.estimate.estimate import Estimate, estimate
from logitcask.engine.events import CancelToken, EventHandler
from logitcask.engine.teachers.remote import is_remote
from logitcask.engine.types import Progress, no_progress


def run_estimate(
    config: EstimateConfig,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> Estimate:
    """Sample and score a small part, and estimate the size of the whole."""
    model, prompts, rendering = student_and_prompts(
        config.student, config.prompts, config.rollout, on_event
    )
    grader = grader_of(config.rollout, model, prompts)
    remote = is_remote(config.teacher.model)
    teacher = open_teacher(
        config.teacher,
        config.run,
        model.provenance(),
        template=rendering.chat_template,
        exact=not remote,
        k_max=config.estimate.teacher_topk_max,
        cancel=CancelToken(on_event),
    )
    try:
        # Both over the ids that both know, and the student here.
        own, model = model.n_vocab, replace(model, n_vocab=teacher.model.n_vocab)
        run = config.run.model_copy(update={"backend": "auto"}) if remote else config.run
        student = backend(model, run, tokenizer_vocab=own)
        try:
            return estimate(
                grader=grader,
                teacher=teacher.scorer,
                student=student,
                prompts=prompts,
                sampling=config.rollout,
                sample=config.estimate.sample,
                student_topk=config.rollout.student_topk,
                mc_draws=config.rollout.mc_draws,
                teacher_topk_min=config.score.teacher_topk_min,
                teacher_topk_max=config.estimate.teacher_topk_max,
                shared=teacher.shared,
                seed=config.run.seed,
                progress=progress,
            )
        finally:
            close_backend(student)
    finally:
        teacher.close()
