"""Train a student on a snapshot of a store: one call, which resumes where it was interrupted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.events import EventHandler
from logitcask.engine.objectives import Objective, Preset, check_exactness
from logitcask.engine.packing.batches import PlannedPacks
from logitcask.engine.packing.plan import PackPlan
from logitcask.engine.packing.source import PackSource
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.store.decoded_unit import has_lists
from logitcask.engine.training.cache_info import cache_info, first_snapshot
from logitcask.engine.training.evaluation.held_out import HeldOutSet, hold_out
from logitcask.engine.training.evaluation.responses import EvalPlan
from logitcask.engine.training.memory.estimate import MemoryEstimate, estimate_memory
from logitcask.engine.training.memory.shapes import largest_pack, loss_shape
from logitcask.engine.training.run import RunSpec, TrainReport, run_training
from logitcask.engine.training.run_dir.open import open_run_dir
from logitcask.engine.training.settings import check_lora, training_arguments, updates_at_most
from logitcask.engine.types import ModelRef, Progress, no_progress

DEFAULTS, NO_LORA = Train(), Lora()


def train(
    store: Store,
    *,
    model: ModelRef,
    teacher: str,
    teacher_field: str | None = None,
    base: str | None = None,
    rollouts: str = "main",
    objective: Objective | Preset,
    settings: Train = DEFAULTS,
    lora: Lora = NO_LORA,
    run: Run,
    snapshot: Snapshot | None = None,
    evaluation: EvalPlan | None = None,
    held_out: HeldOutSet | None = None,
    cache: UnitCache | None = None,
    config: Mapping[str, Any] | None = None,
    on_event: EventHandler = lambda line: None,
    progress: Progress = no_progress,
) -> TrainReport:
    """Train `model` on the scores of `teacher`, and save it as the next version in `run.out`.

    teacher, teacher_field, and the mix of several in `settings`: see packing/teachers.py. base:
    name of the scores of the teacher's base model, for objectives that need them. snapshot: None =
    the newest at the first call. The same call on the same folder resumes from the newest
    checkpoint, bit for bit on a CPU. evaluation, held_out: measured before the first update and
    after the last at least. cache: keeps decoded units for other runs. config: the resolved
    configuration, only recorded in run.json. The exactness report of the objective goes to
    `on_event` before the first update. Under torchrun every process calls this.

    Raises ConfigError, IdentityError (another run in the folder, another tokenizer than the
    rollouts'), IncompleteError (units missing and not `partial`), ObjectiveError (the scores cannot
    serve the objective) and ModelError.
    """
    _check_action(settings)
    with open_run_dir(model, settings, run, on_event) as run_dir:
        if snapshot is None:
            snapshot = first_snapshot(store, run_dir.earlier)
        source = PackSource(
            store,
            snapshot,
            rollouts,
            teacher,
            teacher_field=teacher_field,
            mix=settings,
            base=base,
            partial=settings.partial,
            cache=cache,
        )
        info = cache_info(model, source, settings.allow_off_lineage)
        exactness = check_exactness(objective, info)
        if run_dir.first:
            for line in exactness.lines():
                on_event(line)
        # An earlier call had the default of its time.
        recorded = ((run_dir.earlier or {}).get("settings") or {}).get("tokens_per_batch")
        length = settings.pack_length or recorded
        plan = _plan(source, rollouts, settings, run.seed, length)
        held = None
        if held_out is not None:
            held = hold_out(
                held_out, model, objective, settings.pack_length, run_dir.earlier, cache
            )
            if run_dir.first:
                for line in held.exactness.lines():
                    on_event(f"held out: {line}")
        spec = RunSpec(
            model=model,
            packs=lambda student: PlannedPacks(plan, source),
            updates=updates_at_most(settings, -(-len(plan) // run_dir.packs_per_update)),
            longest=plan.longest,
            objective=objective,
            known_ages=info.known_ages,
            identity={
                "store": store.uuid,
                "pin": {"number": snapshot.number, "sha256": snapshot.sha256},
                "rollouts": rollouts,
                **source.teachers.record(),
                "base": base,
            },
            plan=plan.digest,
            exactness=exactness,
            settings=settings.model_copy(update={"pack_length": plan.key.pack_length}),
            lora=lora,
            run=run,
            evaluation=evaluation,
            held_out=held,
            teachers=source.teacher_models(),
        )
        return run_training(
            spec, run_dir, config=config or {}, on_event=on_event, progress=progress
        )


def check(
    source: PackSource,
    rollouts: str,
    *,
    model: ModelRef,
    objective: Objective | Preset,
    settings: Train,
    seed: int,
) -> None:
    """Raise the errors of `train` before its first update; decodes no unit."""
    _check_action(settings)
    check_exactness(objective, cache_info(model, source, settings.allow_off_lineage))
    _plan(source, rollouts, settings, seed, settings.pack_length)


def _check_action(settings: Train) -> None:
    """Raise ConfigError for an action of loops alone."""
    if settings.staleness_action == "resample":
        raise ConfigError(
            "staleness_action = resample: nothing samples during a training on stored scores",
            hint="use it in `logitcask distill`, or give skip or stop",
        )


def _plan(
    source: PackSource, rollouts: str, settings: Train, seed: int, pack_length: int | None
) -> PackPlan:
    plan = source.plan(seed=seed, epochs=settings.num_train_epochs, pack_length=pack_length)
    if not len(plan):
        raise IncompleteError(
            f"rollouts {rollouts!r} hold no response token",
            hint="sample again with a larger --max-new-tokens",
        )
    return plan


def estimate(
    source: PackSource,
    rollouts: str,
    *,
    path: Path,
    n_vocab: int,
    objective: Objective | Preset,
    settings: Train,
    lora: Lora,
    run: Run,
    world_size: int = 1,
) -> MemoryEstimate:
    """Estimate the memory of `train` per process: decodes no unit, reads no weights.

    path: folder of the student, of which config.json is read.
    """
    _check_action(settings)
    check_lora(settings, lora)
    info = cache_info(None, source, settings.allow_off_lineage)
    plan = _plan(source, rollouts, settings, run.seed, settings.pack_length)
    lists = any(has_lists(scores) for _, scores in source.pairs)
    plain = objective.objective if isinstance(objective, Preset) else objective
    teachers, union = len(source.teachers.weights), source.teachers.mix.mixture != "sum"
    # Without lists a position has the column of its token; a mixture has the ids of all teachers.
    columns = info.student_k + info.k_max * (teachers if union else 1) if lists else 1
    return estimate_memory(
        path,
        largest_pack(plan, source.lengths(), columns, 1 if union else teachers),
        loss_shape(plain, settings),
        n_vocab=n_vocab,
        # Its arguments alone: this process is not one of those of the run.
        args=training_arguments(
            settings.model_copy(update={"sharding": "none", "cpu_offload": False}), run, path
        ),
        lora=lora,
        checkpointing=settings.gradient_checkpointing,
        world_size=world_size,
        sharded=settings.sharding != "none",
        zero3=settings.sharding == "zero3",
        offloaded=settings.cpu_offload,
    )
