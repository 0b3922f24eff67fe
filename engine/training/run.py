"""One run from its folder and checkpoints to the trained student.

`train` gives it the packs of a plan, `distill` packs that are made round by round. The same call
resumes, another run in the folder is refused, and the folder of a finished run is a model.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.events import EventHandler, peak_memory, running_step
from logitcask.engine.models.digests import sha256_of, write_json
from logitcask.engine.models.identity import digest
from logitcask.engine.models.load import quiet
from logitcask.engine.models.save import dtype_of_result, save_student
from logitcask.engine.objectives import Bounds, ExactnessReport, Objective, Preset
from logitcask.engine.packing.batches import Packs
from logitcask.engine.store.transfer.card import CARD
from logitcask.engine.training.arguments.hub import open_repo, push
from logitcask.engine.training.arguments.trackers import (
    check_trackers,
    ended_runs,
    tensorboard_callback,
)
from logitcask.engine.training.evaluation.held_out import HeldOut
from logitcask.engine.training.evaluation.responses import EvalCallback, EvalPlan
from logitcask.engine.training.metric_sampling import metric_sampling
from logitcask.engine.training.processes import on_first
from logitcask.engine.training.provenance.card import build_card, write_card
from logitcask.engine.training.provenance.ledger import Ledger, read_lines
from logitcask.engine.training.run_dir.checkpoints import (
    LEDGER_SHA256,
    METRICS_SHA256,
    remove_checkpoints,
    resume_point,
)
from logitcask.engine.training.run_dir.files import (
    CHECKPOINTS,
    LEDGER,
    METRICS,
    RUN,
    TENSORBOARD,
    MetricsFile,
    check_same,
    finishing,
    read_run,
    writing,
)
from logitcask.engine.training.run_dir.open import RunDir
from logitcask.engine.training.settings import check_lora, compared_settings, settings_record
from logitcask.engine.training.sharding.settings import is_sharded
from logitcask.engine.training.sharding.student import whole_student
from logitcask.engine.training.student import load_for_training
from logitcask.engine.training.trainer import DistillTrainer
from logitcask.engine.types import ModelRef, Progress, no_progress


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """Result of a call of `train` or `distill`."""

    out: Path
    updates: int
    """Updates of the whole run."""
    resumed_at: int
    """Updates done by an earlier call; equal to `updates` if nothing was left to do."""
    version: int
    """Version of the trained student."""
    positions: int
    """Response positions trained on, all epochs."""
    positions_per_second: float
    """Of the training, with its evaluations, and in a loop with its rollouts and scores."""
    peak_memory_bytes: Mapping[str, int]
    """As of `events.peak_memory`."""
    checkpoints_bytes: int
    """Size of the checkpoints that were kept: they would only repair the result."""
    exactness: ExactnessReport
    last: Mapping[str, Any]
    """Line of metrics.jsonl of the last update."""
    evaluations: tuple[Mapping[str, Any], ...] = ()
    """Lines of metrics.jsonl of evaluations, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """Student, data, objective, settings and evaluation of a run."""

    model: ModelRef
    """The student before the first update."""
    packs: Callable[[nn.Module], Packs]
    """Builds the packs for the student in training."""
    updates: int
    longest: int
    """Tokens of the longest sequence."""
    objective: Objective | Preset
    known_ages: bool
    """The versions of the rollouts count updates of this student, so ages are their differences."""
    identity: Mapping[str, Any]
    """Recorded in run.json; the folder accepts no run in which any of it differs."""
    plan: str
    """Digest of the data and its order; a checkpoint must have the same to resume from."""
    exactness: ExactnessReport
    settings: Train
    lora: Lora
    run: Run
    evaluation: EvalPlan | None = None
    held_out: HeldOut | None = None
    rows_per_update: int | None = None
    """Packs of an update to record; None = those of the processes of this call. An update of a loop
    has the same rows for any number of processes, and some have more packs without rows."""
    teachers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name of scores -> provenance of the model, for the model card."""

    @property
    def plain_objective(self) -> Objective:
        """Return the objective without the name of its preset."""
        return self.objective.objective if isinstance(self.objective, Preset) else self.objective


def run_training(
    spec: RunSpec,
    run_dir: RunDir,
    *,
    config: Mapping[str, Any],
    on_event: EventHandler,
    progress: Progress = no_progress,
) -> TrainReport:
    """Train from the newest sound checkpoint, if there is one, and save the next version.

    on_event: gets every damaged file, and a note on dropout. Raises IdentityError if the folder
    holds another run, IntegrityError for a damaged result without a checkpoint, StoreError for a
    disk that is full, and the errors of the training.
    """
    model, settings = spec.model, spec.settings
    check_lora(settings, spec.lora)
    rows = run_dir.packs_per_update if spec.rows_per_update is None else spec.rows_per_update
    resume_metadata = {"plan": spec.plan, "rows_per_update": rows}
    record = {**_record(spec, run_dir), **resume_metadata}
    if run_dir.earlier is not None:
        theirs = {key: run_dir.earlier.get(key) for key in record}
        check_same(run_dir.out, compared_settings(theirs), compared_settings(record))
    # The first process may remove or rename what others would find.
    folder, step = on_first(
        lambda: resume_point(run_dir.out, spec.updates, resume_metadata, run_dir.earlier, on_event)
    )
    finished = folder is None and step == spec.updates
    begun = run_dir.out if finished else folder
    if run_dir.first and run_dir.earlier is None:
        notes = {
            "preset": spec.objective.name if isinstance(spec.objective, Preset) else "",
            "updates": spec.updates,
            **{"config": dict(config), "exactness": asdict(spec.exactness)},
        }
        with writing(run_dir.out):
            write_json(run_dir.out / RUN, {**record, **notes})
    metrics = MetricsFile(run_dir.out / METRICS, _text(begun, METRICS), first=run_dir.first)
    repo = open_repo(settings.args, run_dir.out) if run_dir.first else None
    if not finished:
        if settings.dropout and run_dir.first:
            on_event(
                "note: dropout is on: the loss is of another distribution than the one that was "
                "sampled and scored"
            )
        with quiet():
            student = load_for_training(
                model,
                settings,
                spec.lora,
                run_dir.args,
                attention=run_dir.attention,
                seed=spec.run.seed,
                length=max(spec.longest, spec.held_out.longest if spec.held_out else 0),
            )
            version = model.version if spec.known_ages else None
            text, first = _text(folder, LEDGER), run_dir.first
            ledger = Ledger(run_dir.out / LEDGER, text, version=version, first=first)
            _train(student, spec, run_dir, metrics, ledger, resume_metadata, folder, step, progress)
            with finishing(run_dir.out, spec.updates), running_step(f"save {run_dir.out.name}"):
                whole: nn.Module | None = student
                if is_sharded(run_dir.args):
                    whole = whole_student(student, model, spec.lora, spec.run.seed)
                on_first(lambda: _save(whole, spec, run_dir, metrics, record, on_event))
    if run_dir.first and not settings.keep_checkpoints:
        remove_checkpoints(run_dir.out)
    run_dir.wait()
    if repo is not None:
        on_event(f"pushed to {push(repo, settings.args, run_dir.out)}")
    return TrainReport(
        out=run_dir.out,
        updates=spec.updates,
        resumed_at=step,
        version=model.version + spec.updates,
        positions=metrics.positions,
        positions_per_second=metrics.positions / max(metrics.last.get("progress/seconds", 0), 1e-9),
        peak_memory_bytes=peak_memory(),
        checkpoints_bytes=sum(
            file.stat().st_size for file in (run_dir.out / CHECKPOINTS).rglob("*") if file.is_file()
        ),
        exactness=spec.exactness,
        last=metrics.last,
        evaluations=tuple(metrics.evaluations),
    )


def _text(folder: Path | None, name: str) -> str:
    """Return the lines of a file up to the state that training begins at; '' without them."""
    found = folder is not None and (folder / name).is_file()
    return (folder / name).read_text(errors="replace") if folder and found else ""


def _record(spec: RunSpec, run_dir: RunDir) -> dict[str, Any]:
    """Return the part of run.json in which a resumed run must be equal."""
    student = spec.model.provenance()
    return {
        # run.json calls the base weights `root`, as checkpoints do.
        "student": {
            {"base_weights": "root"}.get(k, k): v
            for k, v in student.items()
            if k not in ("name", "revision")
        },
        # Settings come first: an error then names a setting instead of a digest that depends on it.
        "settings": {
            **settings_record(spec.settings, spec.lora, spec.run),
            "dtype": "bfloat16" if run_dir.args.bf16 else "float32",
        },
        "objective": spec.plain_objective.record(),
        **spec.identity,
        "eval": {
            **(spec.evaluation.identity() if spec.evaluation else {}),
            **({"held_out": spec.held_out.identity} if spec.held_out else {}),
        },
    }


def _train(
    student: nn.Module,
    spec: RunSpec,
    run_dir: RunDir,
    metrics: MetricsFile,
    ledger: Ledger,
    resume_metadata: dict[str, Any],
    checkpoint: Path | None,
    step: int,
    progress: Progress,
) -> None:
    """Train the student to the last update, with its evaluations."""
    settings = spec.settings
    trackers = check_trackers(settings.args.get("report_to", "none"))
    tracked = run_dir.first and TENSORBOARD in trackers
    trainer = DistillTrainer(
        student,
        run_dir.args,
        packs=spec.packs(student),
        updates=spec.updates,
        objective=spec.plain_objective,
        n_vocab=spec.model.n_vocab,
        sampling=metric_sampling(settings, spec.updates),
        aggregation=settings.aggregation,
        dropout=settings.dropout,
        bounds=Bounds(
            action=settings.staleness_action,
            min_coverage=settings.min_coverage,
            max_drift=settings.max_drift,
        ),
        version=spec.model.version,
        known_ages=spec.known_ages,
        metrics=metrics,
        ledger=ledger,
        resume_metadata=resume_metadata,
        progress=progress,
        tracker=tensorboard_callback(run_dir.out, step) if tracked else None,
    )

    def whole() -> Any:
        args = (student, spec.model, spec.lora, spec.run.seed)
        return whole_student(*args, device=run_dir.args.device)

    evaluation = None
    if spec.evaluation or spec.held_out:
        evaluation = EvalCallback(
            spec.evaluation,
            spec.held_out,
            student,
            metrics,
            spec.model.version,
            write=run_dir.first,
            track=trainer.track,
            whole=whole if is_sharded(run_dir.args) else None,
            progress=progress,
        )
        trainer.add_callback(evaluation)
    with ended_runs(trackers, run_dir.out):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.write_ledger()
    if evaluation:
        evaluation.evaluate_at(spec.updates)


def _save(
    student: nn.Module | None,
    spec: RunSpec,
    run_dir: RunDir,
    metrics: MetricsFile,
    record: Mapping[str, Any],
    on_event: EventHandler,
) -> None:
    """Complete run.json, write the model card, and save the student with its metadata last."""
    assert student is not None, "the first process has it"
    ledger = sha256_of(run_dir.out / LEDGER)
    preset = spec.objective.name if isinstance(spec.objective, Preset) else ""
    results: dict[str, Any] = {METRICS_SHA256: sha256_of(metrics.path), LEDGER_SHA256: ledger}
    if spec.evaluation or spec.held_out:
        results["evaluations"] = metrics.evaluations
    if metrics.skipped:
        results["rescore"] = {"skipped": metrics.skipped, "positions": metrics.positions}
    metadata = {
        **{key: record.get(key) for key in ("pin", "objective", "store")},
        **{"plan": spec.plan, "preset": preset, "ledger": ledger},
        "settings": digest(record["settings"]),
    }
    with writing(run_dir.out):
        write_json(run_dir.out / RUN, {**(read_run(run_dir.out) or {}), **results})
        # No file of the result: an edit of it is no damage.
        card = build_card(
            spec.model,
            name=spec.settings.args.get("hub_model_id") or run_dir.out.resolve().name,
            record=record,
            teachers=spec.teachers,
            objective=preset,
            lines=read_lines(run_dir.out / LEDGER),
            ledger=ledger,
            updates=spec.updates,
            metrics={**metrics.last, **(metrics.evaluations or [{}])[-1]},
        )
        if not write_card(run_dir.out, card):
            on_event(f"{run_dir.out / CARD} is not ours or edited, and stays as it is")
        save_student(
            student,
            run_dir.out,
            parent=spec.model,
            updates=spec.updates,
            metadata=metadata,
            dtype=dtype_of_result(spec.settings.save_dtype, spec.model),
            adapter=spec.lora.save_adapter,
        )
