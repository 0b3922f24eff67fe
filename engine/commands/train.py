"""`logitcask train`: a student learns from stored scores."""

from typing import Any

from logitcask.engine.commands.resolve import rendered, snapshot_of, student_of
from logitcask.engine.commands.resolve_training import eval_plan, find_objective, held_out_set
from logitcask.engine.config.sections import TrainConfig
from logitcask.engine.events import EventHandler
from logitcask.engine.objectives import warnings
from logitcask.engine.store import Snapshot, Store, open_store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.store.inspect import choose, choose_teacher
from logitcask.engine.training.evaluation import EvalPlan
from logitcask.engine.training.held_out import hold_out
from logitcask.engine.training.run import TrainReport
from logitcask.engine.training.train import check, train
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
    report = train(
        store,
        **task,
        lora=config.lora,
        run=config.run,
        snapshot=None if config.train.snapshot is None else snapshot,
        evaluation=_evaluation(config, snapshot, task["model"]),
        held_out=held_out_set(config.eval, config.store.url, config.train.base),
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
    store, snapshot, task = _train_task(config)
    check(store, **task, seed=config.run.seed, snapshot=snapshot)
    _evaluation(config, snapshot, task["model"])
    held = held_out_set(config.eval, config.store.url, config.train.base)
    if held is not None:
        hold_out(held, task["model"], task["objective"], config.train.pack_length)


def scoring_seconds(config: TrainConfig) -> float | None:
    """Return the teacher's seconds for one pass over what `run_train` reads; None where the store
    does not record them for every unit.
    """
    _, snapshot, task = _train_task(config)
    scores = snapshot.scores(task["teacher"])
    read = [scores[s.seg_id] for s in snapshot.rollouts(task["rollouts"]) if s.seg_id in scores]
    took = [segment.seconds for segments in read for segment in segments]
    tokenizer_vocab = [each for each in took if each is not None]
    return sum(tokenizer_vocab) if len(tokenizer_vocab) == len(took) else None


def _evaluation(config: TrainConfig, snapshot: Snapshot, model: ModelRef) -> EvalPlan | None:
    return eval_plan(config.eval, config.run, model, rendered(snapshot, config.store.rollouts))


def _train_task(config: TrainConfig) -> tuple[Store, Snapshot, dict[str, Any]]:
    """Return the store, its snapshot, and the arguments that `train` and `check` share."""
    preset = find_objective(config.train)
    store = open_store(config.store.url)
    snapshot = (
        store.head() if config.train.snapshot is None else snapshot_of(store, config.train.snapshot)
    )
    where = (
        "the store"
        if config.train.snapshot is None
        else f"the store at log number {snapshot.number}"
    )
    bases = [n for n in snapshot.names("score") if snapshot.role(n) == "base"]
    base = config.train.base
    task = {
        "model": student_of(config.student, snapshot, config.store.rollouts),
        "teacher": choose_teacher(snapshot, config.train.teacher, where=where),
        "base": base and choose(bases, base, what="base", where=where),
        "rollouts": config.store.rollouts,
        "objective": preset,
        "settings": config.train,
    }
    return store, snapshot, task
