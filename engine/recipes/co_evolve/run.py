"""Two students that score each other, in rounds: co-evolving policy distillation.

arXiv 2604.27083 (CoPD): experts are each other's teachers while they are trained, so that their
behaviour stays close. There each round of mutual distillation follows one of reinforcement learning
on the expert's own task, which this engine does not have: train by your own program between two
rounds, or begin with two experts. A round here is `rollout`, `score` and `train` of either student,
as `plan.steps` lists them; their settings are those of the file of `distill`.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from logitcask.engine.commands.prove import prove
from logitcask.engine.commands.resolve import columns_of
from logitcask.engine.commands.rollout import run_rollout
from logitcask.engine.commands.score import run_score
from logitcask.engine.commands.train import find_objective, run_train
from logitcask.engine.config.sections import RolloutConfig, RunConfig, ScoreConfig
from logitcask.engine.errors import ConfigError
from logitcask.engine.estimate.left import Approve, refuse_full_disk
from logitcask.engine.events import EventHandler
from logitcask.engine.models.digests import read_json, replace_text, write_json
from logitcask.engine.models.identity import METADATA_FILE, resolve_model
from logitcask.engine.objectives import Objective
from logitcask.engine.objectives.supports import SPANS
from logitcask.engine.prompts.prompts import chat_template_for, load_tokenizer
from logitcask.engine.prompts.source import open_source
from logitcask.engine.recipes.co_evolve.plan import (
    SIDES,
    Pairing,
    Step,
    check_config,
    folder_of,
    prompts_of,
    steps,
    student_in,
)
from logitcask.engine.recipes.prompt_text import written
from logitcask.engine.teachers.checks import check_spans
from logitcask.engine.teachers.token_maps import OtherVocabulary, compare_folders
from logitcask.engine.training.run_dir.files import check_same, make_folder
from logitcask.engine.types import Progress, no_progress

OVER_SPANS = "span_advantage"
"""Objective of two students with other vocabularies, where the file has one of equal ids."""
SETTINGS = "co-evolve.json"
"""Settings of the rounds in OUT; their number may grow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CoEvolveReport:
    first: Path
    """Folder of the student of [student] after the last round."""
    second: Path
    """Of the one of [teacher]."""
    rounds: int
    objective: str
    trained: Mapping[str, float]
    """Folder of each student that this call has trained -> the loss of its last update, nats."""
    next: str
    """Command that goes on with one more round."""


def run_co_evolve(
    config: RunConfig,
    *,
    file: str,
    overrides: Sequence[str] = (),
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
    approve: Approve = refuse_full_disk,
) -> CoEvolveReport:
    """Let two students sample, score each other and learn, round by round.

    file: name of the TOML file, for the next command. A rerun goes on where the last call stopped:
    a student that is whole is not trained again, and each command resumes by itself. Raises those
    errors of `check_co_evolve`, IdentityError for a folder with rounds of other settings, and the
    errors of the commands.
    """
    pairing = check_co_evolve(config, on_event)
    _claim(config)
    lines = list(_lines(config))
    for number in range(1, config.loop.rounds + 1):
        _write_prompts(config, lines, number)
    trained = dict[str, float]()
    for step in steps(config, pairing):
        if (folder_of(config, step.side, step.round) / METADATA_FILE).exists():
            continue  # written last: this student has all of its round
        on_event(f"round {step.round} of {config.loop.rounds}: {step.command}, {step.side}")
        loss = _run(step, progress, on_event, approve)
        if loss is not None:
            trained[folder_of(config, step.side, step.round).name] = loss
    first, second = (folder_of(config, side, config.loop.rounds) for side in SIDES)
    kept = [each for each in overrides if not each.replace(" ", "").startswith("loop.rounds=")]
    sets = [*kept, f"loop.rounds={config.loop.rounds + 1}"]
    words = [word for each in sets for word in ("--set", each)]
    return CoEvolveReport(
        first=first,
        second=second,
        rounds=config.loop.rounds,
        objective=pairing.objective,
        trained=trained,
        next=shlex.join(["logitcask", "recipe", "co-evolve", file, *words]),
    )


def check_co_evolve(config: RunConfig, on_event: EventHandler = lambda line: None) -> Pairing:
    """Raise what needs no weights and would stop `run_co_evolve`; return the pairing.

    Raises ConfigError for settings that two students cannot have, for too few prompts and for an
    unknown objective, PromptError, and ModelError for a tokenizer without bytes.
    """
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(
            f"WORLD_SIZE = {size}: a recipe runs in one process",
            hint="start it without torchrun; --dry-run prints its commands, and `train` runs under "
            "torchrun",
        )
    check_config(config)
    objective = find_objective(config.train).objective
    _check_prompts(config)
    first, second = (
        resolve_model(each.model, each.revision, weights=False)
        for each in (student_in(config, side, 1) for side in SIDES)
    )
    try:
        shared = compare_folders(first, second, config.teacher.model)
    except OtherVocabulary:
        return _over_spans(config, objective, (first, second), on_event)
    if shared is not None:
        on_event(shared.note(config.teacher.model))
    return Pairing(objective=config.train.objective, differ=shared is not None)


def _over_spans(
    config: RunConfig, objective: Objective, folders: tuple[Path, Path], on_event: EventHandler
) -> Pairing:
    """Return the pairing of two vocabularies, which score spans of equal bytes."""
    score, chosen = config.score, config.train.objective
    check_spans(
        config.teacher.model,
        extra_ids=score.extra_ids,
        positions=score.positions,
        selection=score.selection,
    )
    if objective.support != SPANS:
        on_event(
            f"note: the two have other vocabularies, so the objective is {OVER_SPANS} in place of "
            f"{chosen}; train.objective may name another one over spans"
        )
        chosen = OVER_SPANS
    source = open_source(
        config.prompts.file, columns_of(config.prompts), limit=config.prompts.limit
    )
    rendered = [
        side
        for side, folder in zip(SIDES, folders, strict=True)
        if chat_template_for(source, load_tokenizer(folder), config.prompts.chat_template)
    ]
    return Pairing(objective=chosen, differ=True, rendered=tuple(rendered))


def prove_co_evolve(config: RunConfig, on_event: EventHandler = lambda line: None) -> Pairing:
    """Raise what would stop the first round: reads the prompts and loads both models."""
    pairing = check_co_evolve(config, on_event)
    for step in steps(config.model_copy(update={"loop": _one_round(config)}), pairing):
        if isinstance(step.config, RolloutConfig):
            # The prompts of the rounds are not written yet.
            prove(step.config.model_copy(update={"prompts": config.prompts}), on_event)
        elif not isinstance(step.config, ScoreConfig):
            prove(step.config, on_event)
    return pairing


def _one_round(config: RunConfig) -> Any:
    return config.loop.model_copy(update={"rounds": 1})


def _run(step: Step, progress: Progress, on_event: EventHandler, approve: Approve) -> float | None:
    """Run one command; return the loss of the last update of a training."""
    if isinstance(step.config, RolloutConfig):
        run_rollout(step.config, progress=progress, on_event=on_event, approve=approve)
        return None
    if isinstance(step.config, ScoreConfig):
        report = run_score(step.config, progress=progress, on_event=on_event, approve=approve)
        for note in report.notes:
            on_event(note)
        return None
    trained = run_train(step.config, progress=progress, on_event=on_event)
    return float(trained.last["loss"])


def _claim(config: RunConfig) -> None:
    """Record the settings in OUT, or compare them with those that are there."""
    place = config.run.out / SETTINGS
    # Without defaults, so that a key of a later version changes nothing; without the machine.
    ours = config.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={"loop": {"rounds"}, "run": {"device", "batch_tokens", "backend"}, "work": True},
    )
    if place.exists():
        hint = "give the same settings, or another run.out and store.rollouts"
        check_same(config.run.out, read_json(place, hint=hint), ours, hint=hint)
        return
    make_folder(config.run.out)
    write_json(place, ours)


def _check_prompts(config: RunConfig) -> None:
    """Raise ConfigError for fewer prompts than a round has."""
    found = sum(1 for _ in _lines(config))
    if (size := config.loop.prompts_per_round) > found:
        raise ConfigError(
            f"loop.prompts_per_round = {size}: the file has {found} prompts",
            hint=f"set loop.prompts_per_round to {found} or less",
        )


def _lines(config: RunConfig) -> Iterator[str]:
    """Yield the prompts as lines with our keys; each has the id that it has in its file."""
    source = open_source(
        config.prompts.file, columns_of(config.prompts), limit=config.prompts.limit
    )
    for line in islice(source.lines(), config.prompts.limit):
        content = line.content(drop_last_assistant=config.prompts.drop_last_assistant)
        yield written(line, content, None, line.id)


def _write_prompts(config: RunConfig, lines: Sequence[str], number: int) -> None:
    """Write the prompts of a round, which are the next ones of the file and then its first again.

    Raises ConfigError where the file has other ones than at the first call.
    """
    size = config.loop.prompts_per_round
    chosen = [lines[at % len(lines)] for at in range((number - 1) * size, number * size)]
    place, text = prompts_of(config, number), "".join(chosen)
    if not place.exists():
        replace_text(place, text)
    elif place.read_text() != text:
        raise ConfigError(
            f"{place}: round {number} has had other prompts than {config.prompts.file} has now",
            hint="restore that file, or give another run.out and store.rollouts",
        )
