"""`logitcask rollout`: a student samples responses into a store."""

from collections.abc import Sequence

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.load_teacher import backend
from logitcask.engine.commands.resolve import grader_of, student_and_prompts
from logitcask.engine.config.sections import RolloutConfig
from logitcask.engine.estimate.left import (
    Approve,
    WorkLeft,
    refuse_full_disk,
    sampling_left,
)
from logitcask.engine.events import EventHandler
from logitcask.engine.prompts.graders import Grader
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.rollout.plan import RolloutReport, rollout
from logitcask.engine.rollout.unit import RolloutRequest
from logitcask.engine.store import open_store
from logitcask.engine.types import ModelRef, Progress, Prompt, no_progress


def run_rollout(
    config: RolloutConfig,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
    approve: Approve = refuse_full_disk,
) -> RolloutReport:
    """Sample what is missing. Prompts are read and checked before any weight is loaded, and
    `approve` then gets what is left.
    """
    request = open_rollout(config, on_event, approve)
    try:
        return rollout(request, progress=progress)
    finally:
        close_backend(request.sampler)


def open_rollout(
    config: RolloutConfig, on_event: EventHandler, approve: Approve = refuse_full_disk
) -> RolloutRequest:
    """Load prompts and student, and describe the rollouts; the caller closes the sampler."""
    model, prompts, rendering = student_and_prompts(
        config.student, config.prompts, config.rollout, on_event
    )
    grader = grader_of(config.rollout, model, prompts)
    approve(rollouts_left(config, len(prompts)))
    return rollout_request(config, model, prompts, rendering, grader)


def rollouts_left(config: RolloutConfig, prompts: int) -> WorkLeft:
    """Return what is left of the rollouts of so many prompts."""
    return sampling_left(
        config.store.url,
        config.store.rollouts,
        sequences=prompts * config.rollout.n,
        max_new_tokens=config.rollout.max_new_tokens,
    )


def rollout_request(
    config: RolloutConfig,
    model: ModelRef,
    prompts: Sequence[Prompt],
    rendering: Rendering,
    grader: Grader | None,
    *,
    versions: bool = False,
) -> RolloutRequest:
    """Load the student and describe its rollouts; the caller closes the sampler."""
    sampler = backend(model, config.run)
    try:
        return RolloutRequest(
            # Only now: a rejected configuration leaves no empty store behind.
            store=open_store(config.store.url, create=True),
            model=model,
            sampler=sampler,
            prompts=prompts,
            sampling=config.rollout,
            name=config.store.rollouts,
            seed=config.run.seed,
            student_k=config.rollout.student_topk,
            mc_draws=config.rollout.mc_draws,
            grader=grader,
            unit_prompts=config.rollout.unit_prompts or None,
            profile=config.store.profile,
            versions=versions,
            stop_token_ids=config.rollout.stop_token_ids,
            provenance_extra=rendering.record(),
        )
    except BaseException:
        close_backend(sampler)
        raise
