"""Train a student on a pinned store: one call, which resumes where it was interrupted."""

from collections.abc import Mapping
from typing import Any

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.errors import IncompleteError
from logitcask.engine.events import EventHandler
from logitcask.engine.objectives import Objective, Preset, check_exactness
from logitcask.engine.packing.batches import PlannedPacks
from logitcask.engine.packing.plan import PackPlan, PlanKey, make_plan
from logitcask.engine.packing.source import PackSource
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.training.cache_info import facts_of, first_snapshot
from logitcask.engine.training.evaluation import EvalPlan
from logitcask.engine.training.held_out import HeldOutSet, hold_out
from logitcask.engine.training.run import RunSpec, TrainReport, open_run_dir, run_training
from logitcask.engine.types import ModelRef, Progress, no_progress

DEFAULTS, NO_LORA = Train(), Lora()


def train(
    store: Store,
    *,
    model: ModelRef,
    teacher: str,
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
    """Train `model` on the scores of `teacher`, and save it as the next version in `out`.

    `base` names scores of the model that the teacher was made from, for objectives that look there.
    Without a `snapshot` the store as it is at the first call is used. The same call on the same
    `out` resumes from the newest checkpoint, bit-exactly on a CPU. `evaluation`: runs
    before the first update and after the last, as do the rows of `held_out`. `cache`: keeps units
    for other runs. `config`, the resolved configuration, is only recorded, in run.json.
    What the cache serves exactly for the objective goes to `on_event` before the first update.
    Under torchrun every process calls this.

    Raises ConfigError, IdentityError (another run in `out`, another tokenizer than the rollouts'),
    IncompleteError (units missing and not `partial`), ObjectiveError (the cache cannot serve the
    objective) and ModelError.
    """
    run_dir = open_run_dir(model, settings, run)
    if snapshot is None:
        snapshot = first_snapshot(store, run_dir.earlier)
    source = PackSource(
        store, snapshot, rollouts, teacher, base=base, partial=settings.partial, cache=cache
    )
    facts = facts_of(model, source, settings.allow_off_lineage)
    exactness = check_exactness(objective, facts)
    if run_dir.first:
        for line in exactness.lines():
            on_event(line)
    plan = _plan(source, snapshot, rollouts, teacher, settings, run.seed)
    held = None
    if held_out is not None:
        held = hold_out(held_out, model, objective, settings.pack_length, run_dir.earlier, cache)
        if run_dir.first:
            for line in held.exactness.lines():
                on_event(f"held out: {line}")
    spec = RunSpec(
        rows=lambda student: PlannedPacks(plan, source),
        updates=-(-len(plan) // run_dir.rows_per_update),
        objective=objective,
        same_root=facts.same_root,
        identity={
            "store": store.uuid,
            "pin": {"number": snapshot.number, "sha256": snapshot.sha256},
            "rollouts": rollouts,
            "teacher": teacher,
            "base": base,
        },
        plan=plan.digest,
        exactness=exactness,
        evaluation=evaluation,
        held_out=held,
    )
    return run_training(
        spec,
        run_dir,
        model=model,
        settings=settings,
        lora=lora,
        run=run,
        config=config or {},
        progress=progress,
    )


def check(
    store: Store,
    *,
    model: ModelRef,
    teacher: str,
    rollouts: str,
    objective: Objective | Preset,
    settings: Train,
    seed: int,
    snapshot: Snapshot,
    base: str | None = None,
) -> None:
    """Raise what `train` would raise before its first update; decodes no unit."""
    source = PackSource(store, snapshot, rollouts, teacher, base=base, partial=settings.partial)
    check_exactness(objective, facts_of(model, source, settings.allow_off_lineage))
    _plan(source, snapshot, rollouts, teacher, settings, seed)


def _plan(
    source: PackSource, snapshot: Snapshot, rollouts: str, teacher: str, settings: Train, seed: int
) -> PackPlan:
    key = PlanKey(
        snapshot=snapshot.number,
        snapshot_sha256=snapshot.sha256,
        rollouts=rollouts,
        teacher=teacher,
        seed=seed,
        epochs=settings.num_train_epochs,
        pack_length=settings.pack_length,
    )
    plan = make_plan(key, source.lengths())
    if not len(plan):
        raise IncompleteError(
            f"rollouts {rollouts!r} hold no response token",
            hint="sample again with a larger --max-new-tokens",
        )
    return plan
