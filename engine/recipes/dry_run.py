"""`distill --recipe NAME --dry-run`: check all that needs no model, and load only what is here."""

from pathlib import Path
from typing import Any

from logitcask.engine.commands.prove import prove
from logitcask.engine.commands.train import find_objective
from logitcask.engine.config.parse.toml import read_tables, resolve_paths, validate
from logitcask.engine.config.prompts import is_hub
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.distill.checks import check_inline, check_keys
from logitcask.engine.distill.setup import loop_exactness
from logitcask.engine.events import EventHandler
from logitcask.engine.models.identity import local_folder
from logitcask.engine.recipes.named import missing_keys, with_stand_ins
from logitcask.engine.teachers.remote import is_remote
from logitcask.engine.training.settings import training_arguments

_MANY_IDS = 1 << 17
"""Size of the vocabulary of a model that is not here: more ids than any k."""


def check_recipe(
    tables: dict[str, Any],
    path: Path | None,
    overrides: tuple[str, ...],
    on_event: EventHandler = lambda line: None,
) -> tuple[RunConfig, list[str]]:
    """Return (the configuration of a recipe below a file, the keys that are still to be given).

    Nothing is downloaded: models and prompts on a hub are not looked at. If all models and prompts
    are on this machine, they are proved as without a recipe. Raises ConfigError and ObjectiveError,
    and those of `prove`.
    """
    values = read_tables(path, overrides, tables)
    missing = missing_keys(values)
    source = "the recipe" if path is None else str(path)
    config = validate(RunConfig, with_stand_ins(values, missing), source=source)
    config = resolve_paths(config, Path.cwd() if path is None else path.parent)
    check_settings(config, on_event)
    if missing:
        training_arguments(config.train, config.run)
        on_event(f"note: give {', '.join(missing)} in a file CONFIG, or with --set")
    elif elsewhere := _elsewhere(config):
        training_arguments(config.train, config.run)
        on_event(f"note: not looked at, as it is not on this machine: {', '.join(elsewhere)}")
    else:
        prove(config, on_event)
    return config, missing


def check_settings(config: RunConfig, on_event: EventHandler = lambda line: None) -> None:
    """Check the keys of a loop whose models are not looked at; its exactness goes to `on_event`.

    Raises ConfigError and ObjectiveError.
    """
    check_keys(config)
    if config.runner.kind == "inline":
        check_inline(config)
    preset = find_objective(config.train)
    report = loop_exactness(
        config,
        preset,
        config.score.params(config.run.seed),
        n_vocab=_MANY_IDS,
        # Of the tokenizers nothing is known: such an objective is for a teacher with another one.
        span_rows=config.score.span_topk if preset.objective.over_spans else "",
    )
    for line in report.lines():
        on_event(line)


def _elsewhere(config: RunConfig) -> list[str]:
    """Return the models and prompts of a hub."""
    models = [config.student.model]
    if config.teacher.model and not is_remote(config.teacher.model):
        models.append(config.teacher.model)
    found = [model for model in models if local_folder(model) is None]
    return [*found, *([str(config.prompts.file)] if is_hub(config.prompts.file) else [])]
