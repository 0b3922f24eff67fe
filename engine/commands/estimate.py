"""`logitcask store estimate`: the size of a store before it is paid for."""

from dataclasses import replace
from typing import Any

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.load_teacher import backend, open_teacher
from logitcask.engine.commands.resolve import columns_of, grader_of, student_and_prompts
from logitcask.engine.config.cost import Cost
from logitcask.engine.config.prompts import is_hub
from logitcask.engine.config.sections import EstimateConfig
from logitcask.engine.errors import ConfigError
from logitcask.engine.estimate.cost import (
    FORWARD,
    HOUR,
    TRAIN,
    Hours,
    Work,
    costs,
    describe,
    model_hours,
)
from logitcask.engine.estimate.estimate import Estimate, estimate
from logitcask.engine.estimate.requests import store_requests
from logitcask.engine.estimate.sizes import ModelSize, find_size
from logitcask.engine.events import CancelToken, EventHandler
from logitcask.engine.prompts.source import open_source
from logitcask.engine.rollout.unit import default_unit
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
    # A size that is not known is an error before anything is sampled.
    sizes = _sizes(config) if config.cost.has_price else None
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
            found = estimate(
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
    return found if sizes is None else replace(found, costs=_measured(config.cost, found, *sizes))


def declared_costs(config: EstimateConfig) -> dict[str, Any]:
    """Return the costs without any model, from sizes and lengths that are known or given.

    Nothing is loaded or downloaded. Raises ModelError for a size that is not known, ConfigError for
    prompts that are not here and not counted.
    """
    cost = config.cost
    student, teacher = _sizes(config)
    prompts = cost.prompt_count or _count(config)
    sequences = prompts * config.rollout.n
    work = Work(
        sequences=sequences,
        prompt_tokens=cost.prompt_tokens,
        response_tokens=float(cost.response_tokens or config.rollout.max_new_tokens),
        at_once=sequences,
    )
    hours = model_hours(work, student, teacher.parameters, cost)
    units = -(-prompts // default_unit(config.rollout))
    found = costs(
        hours,
        cost,
        store_bytes=work.positions * cost.bytes_per_position,
        requests=store_requests(units),
    )
    return {**describe(work, hours, student, teacher, cost), **found}


def _measured(
    cost: Cost, found: Estimate, student: ModelSize, teacher: ModelSize
) -> dict[str, Any]:
    """Return the costs at the measured rates of this device; of training by FLOP."""
    total = found.all_prompts
    score = total["scoring_seconds"] / HOUR
    ratio = TRAIN * student.parameters / (FORWARD * teacher.parameters)
    hours = Hours(sample=total["sampling_seconds"] / HOUR, score=score, train=score * ratio)
    return {
        "measured": "sampling, scoring and bytes, on this device",
        "assumed": f"training takes {ratio:.3g} times scoring, by their FLOP",
        "sample_hours": hours.sample,
        "score_hours": hours.score,
        "train_hours": hours.train,
        **costs(hours, cost, store_bytes=total["bytes"], requests=total),
    }


def _sizes(config: EstimateConfig) -> tuple[ModelSize, ModelSize]:
    """Return the sizes of (student, teacher)."""
    cost = config.cost
    student = find_size(
        config.student.model,
        "student",
        parameters=cost.student_parameters,
        kv_bytes=cost.student_kv_bytes,
    )
    return student, find_size(config.teacher.model, "teacher", parameters=cost.teacher_parameters)


def _count(config: EstimateConfig) -> int:
    """Return the number of prompts of a file."""
    if is_hub(config.prompts.file):
        raise ConfigError(
            f"{config.prompts.file} is not downloaded to count its prompts",
            hint="give --prompt-count",
        )
    return sum(1 for _ in open_source(config.prompts.file, columns_of(config.prompts)).texts())
