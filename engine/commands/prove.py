"""Prove the models of a configuration, for `--dry-run`: nothing is sampled, scored or trained."""

from typing import Any

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.load_teacher import backend
from logitcask.engine.commands.resolve import grader_of, student_and_prompts
from logitcask.engine.config.sections import RolloutConfig, RunConfig, ScoreConfig, TrainConfig
from logitcask.engine.events import EventHandler
from logitcask.engine.models.identity import model_ref
from logitcask.engine.models.load import load_student
from logitcask.engine.teachers.remote import is_remote
from logitcask.engine.training.settings import training_arguments


def prove(
    config: RolloutConfig | ScoreConfig | TrainConfig | RunConfig,
    on_event: EventHandler = lambda line: None,
) -> None:
    """Read the prompts and load the models of a command, and check the paths that it takes.

    A teacher at a URL is left out, and one that is the student. Raises PromptError, ConfigError and
    ModelError.
    """
    if isinstance(config, RolloutConfig | RunConfig):
        student, prompts, _ = student_and_prompts(
            config.student, config.prompts, config.rollout, on_event
        )
        grader_of(config.rollout, student, prompts)
        longest = max(len(prompt.token_ids) for prompt in prompts) + config.rollout.max_new_tokens
        _check(student, config.run, "sampling", length=longest)
    follows = isinstance(config, RunConfig) and config.teacher.follow
    if (
        isinstance(config, ScoreConfig | RunConfig)
        and not follows
        and not is_remote(config.teacher.model)
    ):
        teacher = model_ref(
            config.teacher.model, revision=config.teacher.revision, chat_template=False
        )
        _check(teacher, config.run)
    if isinstance(config, TrainConfig | RunConfig):
        training_arguments(config.train, config.run)
        trained = model_ref(
            config.student.model, revision=config.student.revision, chat_template=False
        )
        load_student(trained, lora=config.lora, seed=config.run.seed)


def _check(model: Any, run: Any, *paths: str, length: int = 0) -> None:
    """Load a model into its backend, which proves it; other backends than hf prove themselves."""
    loaded = backend(model, run)
    try:
        if hasattr(loaded, "check"):
            loaded.check(*paths, length=length)
    finally:
        close_backend(loaded)
