"""`logitcask train`: a student learns from stored scores."""

import re
from collections.abc import Mapping
from typing import Any

from logitcask.engine.commands.load_teacher import live_backend
from logitcask.engine.commands.resolve import (
    columns_of,
    decoder,
    read_fitting,
    rendering_of,
    snapshot_of,
    student_of,
)
from logitcask.engine.config.sections import Run, TrainConfig
from logitcask.engine.config.training import Eval, Train
from logitcask.engine.errors import ConfigError
from logitcask.engine.events import EventHandler
from logitcask.engine.models.identity import read_config, resolve_model, vocabulary
from logitcask.engine.objectives import PRESETS, Preset, parse_objective, warnings
from logitcask.engine.objectives.parse import preset_hint
from logitcask.engine.packing.source import PackSource
from logitcask.engine.packing.teachers import NO_MIX, Teachers
from logitcask.engine.prompts.graders import open_grader
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.prompts.source import open_source
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.store import Snapshot, Store, open_store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.store.inspect import choose, choose_teacher
from logitcask.engine.training.evaluation.held_out import HeldOutSet, hold_out
from logitcask.engine.training.evaluation.responses import EvalPlan
from logitcask.engine.training.memory.estimate import MemoryEstimate
from logitcask.engine.training.run import TrainReport
from logitcask.engine.training.settings import training_arguments
from logitcask.engine.training.train import check, estimate, train
from logitcask.engine.types import ModelRef, Progress, no_progress


def run_train(
    config: TrainConfig,
    *,
    cache: UnitCache | None = None,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> TrainReport:
    """Train the student. The exactness report of the objective goes to `on_event` first."""
    store, snapshot, task = _train_task(config)
    model = student_of(config.student, snapshot, config.store.rollouts)
    report = train(
        store,
        **task,
        model=model,
        lora=config.lora,
        run=config.run,
        snapshot=None if config.train.snapshot is None else snapshot,
        evaluation=eval_plan(
            config.eval,
            config.run,
            model,
            rendering_of(snapshot, config.store.rollouts),
            on_event,
        ),
        held_out=held_out_set(config.eval, config.store.url, config.train),
        cache=cache,
        config=config.model_dump(mode="json"),
        on_event=on_event,
        progress=progress,
    )
    for line in warnings(task["objective"].objective, report.last):
        on_event(f"warning: {line}")
    return report


def check_train(config: TrainConfig) -> None:
    """Raise what would stop `run_train` before its first update."""
    training_arguments(config.train, config.run)
    store, snapshot, task = _train_task(config)
    model = student_of(config.student, snapshot, config.store.rollouts)
    check(
        _source(config, store, snapshot, task),
        config.store.rollouts,
        model=model,
        objective=task["objective"],
        settings=config.train,
        seed=config.run.seed,
    )
    rendering = rendering_of(snapshot, config.store.rollouts)
    eval_plan(config.eval, config.run, model, rendering)
    held = held_out_set(config.eval, config.store.url, config.train)
    if held is not None:
        hold_out(held, model, task["objective"], config.train.pack_length)


def estimate_train(config: TrainConfig, world_size: int) -> MemoryEstimate:
    """Estimate the memory of `run_train` per process, of so many; reads no weights."""
    store, snapshot, task = _train_task(config)
    path = resolve_model(config.student.model, config.student.revision, weights=False)
    n_vocab, _ = vocabulary(path, read_config(path), load_tokenizer(path))
    return estimate(
        _source(config, store, snapshot, task),
        config.store.rollouts,
        path=path,
        n_vocab=n_vocab,
        objective=task["objective"],
        settings=config.train,
        lora=config.lora,
        run=config.run,
        world_size=world_size,
    )


def _source(
    config: TrainConfig, store: Store, snapshot: Snapshot, task: Mapping[str, Any]
) -> PackSource:
    """Open what `run_train` reads, without decoding a unit."""
    return PackSource(
        store,
        snapshot,
        config.store.rollouts,
        task["teacher"],
        teacher_field=task["teacher_field"],
        mix=config.train,
        base=task["base"],
        partial=config.train.partial,
    )


def scoring_seconds(config: TrainConfig) -> float | None:
    """Return the teacher's seconds for one pass over what `run_train` reads; None where the store
    does not record them for every unit.
    """
    _, snapshot, task = _train_task(config)
    rollouts = snapshot.rollouts(task["rollouts"])
    names = Teachers.parse(task["teacher"], task["teacher_field"]).names
    scores = [snapshot.scores(name) for name in names]
    read = [of[s.seg_id] for of in scores for s in rollouts if s.seg_id in of]
    took = [segment.seconds for segments in read for segment in segments]
    recorded = [seconds for seconds in took if seconds is not None]
    return sum(recorded) if len(recorded) == len(took) else None


def _train_task(config: TrainConfig) -> tuple[Store, Snapshot, dict[str, Any]]:
    """Return the store, its snapshot, and the arguments of `train` that need no student."""
    preset = find_objective(config.train)
    store = open_store(config.store.url)
    snapshot = snapshot_of(store, config.train.snapshot)
    where = (
        "the store"
        if config.train.snapshot is None
        else f"the store at log number {snapshot.number}"
    )
    bases = [n for n in snapshot.names("score") if snapshot.role(n) == "base"]
    base = config.train.base
    task = {
        "teacher": find_teachers(
            snapshot, config.train.teacher, config.train.teacher_field, where=where
        ),
        "teacher_field": config.train.teacher_field,
        "base": base and choose(bases, base, what="base", where=where),
        "rollouts": config.store.rollouts,
        "objective": preset,
        "settings": config.train,
    }
    return store, snapshot, task


def find_teachers(
    snapshot: Snapshot,
    text: str | None,
    field: str | None,
    *,
    what: str = "teacher",
    where: str = "the store",
) -> str:
    """Return the text of the teachers, checked against the names of the snapshot.

    Raises ConfigError for an unknown or ambiguous name and a wrong text, IncompleteError for none.
    """
    if text is None and field is None:
        return choose_teacher(snapshot, None, what=what, where=where)
    teachers = Teachers.parse(text, field)
    for name in teachers.names:
        choose_teacher(snapshot, name, what=what, where=where)
    return str(teachers)


def find_objective(settings: Train) -> Preset:
    """Return the preset that [train] names; ConfigError names the nearest known one."""
    name = re.split(r"[(+]", settings.objective)[0].strip()
    if name not in PRESETS:
        raise ConfigError(
            f"--objective {settings.objective}: no preset of this name", hint=preset_hint(name)
        )
    return parse_objective(settings.objective, k=settings.loss_topk)


def eval_plan(
    settings: Eval,
    run: Run,
    model: ModelRef,
    rendering: Rendering,
    on_event: EventHandler = lambda line: None,
) -> EvalPlan | None:
    """Return the evaluation of [eval], rendered as the rollouts; None without prompts.

    Raises PromptError, and ConfigError for a grader that is not there.
    """
    if settings.prompts is None:
        return None
    tokenizer = load_tokenizer(model.path)
    prompts = read_fitting(
        open_source(settings.prompts, columns_of(settings)),
        tokenizer,
        model.path,
        rendering,
        settings.max_new_tokens,
        "eval.",
        on_event=on_event,
    )
    return EvalPlan(
        prompts=prompts,
        sampling=settings,
        grader=open_grader(settings.grader, prompts),
        grader_name=settings.grader,
        decode=decoder(tokenizer),
        sampler=lambda student: live_backend(student, model, run),
        seed=run.seed,
        every=settings.every,
    )


def held_out_set(settings: Eval, url: str, train: Train) -> HeldOutSet | None:
    """Return the held-out rows that [eval] names, or None. `url` is the store of the training. The
    `base` scores of `train` are used here too if they have that name, and its `teacher_field` for
    several teachers, as its mix is where every row has several.

    Raises ConfigError where the choice is not clear, IncompleteError where there is none.
    """
    if all(each is None for each in settings.held_out_names()):
        return None
    several = settings.teacher is not None and "=" in settings.teacher
    field = train.teacher_field if several else None
    base = train.base
    store = open_store(settings.store or url)
    snapshot = snapshot_of(store, settings.snapshot)
    teacher = find_teachers(snapshot, settings.teacher, field, what="eval-teacher", where=store.url)
    return HeldOutSet(
        store=store,
        rollouts=choose(
            snapshot.names("rollout"), settings.rollouts, what="eval-rollouts", where=store.url
        ),
        teacher=teacher,
        teacher_field=field,
        mix=train if Teachers.parse(teacher, field).mixed else NO_MIX,
        base=base if base in snapshot.names("score") else None,
        snapshot=None if settings.snapshot is None else snapshot,
        every=settings.every,
    )
