"""A run, wherever its rows come from: its folder, its checkpoints, the trained student.

`train` gives it rows of a plan, `distill` rows that are made round by round; what a run's folder
promises (the same call resumes, another is refused, a finished folder is a model) is kept here.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.errors import ConfigError
from logitcask.engine.models.load import load_student, quiet, save_student
from logitcask.engine.objectives import ExactnessReport, Objective, Preset
from logitcask.engine.packing.batches import Packs
from logitcask.engine.training.evaluation import EvalPlan, Evaluations
from logitcask.engine.training.held_out import HeldOut
from logitcask.engine.training.run_dir import (
    METADATA,
    METRICS,
    RUN,
    MetricsFile,
    check_same,
    clear,
    make_folder,
    newest_checkpoint,
    read_run,
    write_json,
)
from logitcask.engine.training.settings import (
    settings_record,
    staleness_bounds,
    training_arguments,
)
from logitcask.engine.training.trainer import DistillTrainer
from logitcask.engine.types import ModelRef, Progress, no_progress


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """Result of a call of `train` or `distill`."""

    out: Path
    updates: int
    """Of the whole run."""
    resumed_at: int
    """Updates that an earlier call had done; equal to `updates` if there was nothing left to do."""
    version: int
    """Of the trained student."""
    positions: int
    """Response positions trained on, all epochs."""
    exactness: ExactnessReport
    last: Mapping[str, Any]
    """The last update's line of metrics.jsonl."""
    evaluations: tuple[Mapping[str, Any], ...] = ()
    """Its lines of evaluations, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """A run without its student and its settings."""

    rows: Callable[[nn.Module], Packs]
    """Makes the rows, given the student in training."""
    updates: int
    objective: Objective | Preset
    same_root: bool
    """The rollouts are of the student's lineage, so that ages are version differences."""
    identity: Mapping[str, Any]
    """Goes into run.json; the same folder takes no run in which any of it differs."""
    plan: str
    """Digest of the data and its order: a checkpoint of another is not resumed from."""
    exactness: ExactnessReport
    evaluation: EvalPlan | None = None
    held_out: HeldOut | None = None

    def evaluation_identity(self) -> dict[str, Any]:
        """Return the settings that must be equal for numbers of one run to be comparable."""
        return {
            **(self.evaluation.identity() if self.evaluation else {}),
            **({"held_out": self.held_out.identity} if self.held_out else {}),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDir:
    """A run's folder as found, and the arguments that all its processes agree on."""

    out: Path
    args: TrainingArguments
    earlier: Mapping[str, Any] | None
    """run.json of an earlier call."""

    @property
    def first(self) -> bool:
        """Return True in the process that writes."""
        return bool(self.args.process_index == 0)

    @property
    def rows_per_update(self) -> int:
        """Packed rows of an update over all processes."""
        return int(self.args.gradient_accumulation_steps * self.args.world_size)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.args.world_size > 1:
            torch.distributed.barrier()


def open_run_dir(model: ModelRef, settings: Train, run: Run) -> RunDir:
    """Open the folder `run.out`; ConfigError for a folder or a device that a run cannot use."""
    out = run.out
    if out.resolve() == model.path.resolve():
        raise ConfigError(f"--out {out} is the student itself", hint="give another --out")
    args = training_arguments(settings, run)
    run_dir = RunDir(out=out, args=args, earlier=read_run(out))
    run_dir.wait()
    if run.overwrite and run_dir.earlier is not None:
        if run_dir.first:
            clear(out)
        run_dir.wait()
        return RunDir(out=out, args=args, earlier=None)
    return run_dir


def run_training(
    spec: RunSpec,
    run_dir: RunDir,
    *,
    model: ModelRef,
    settings: Train,
    lora: Lora,
    run: Run,
    config: Mapping[str, Any],
    progress: Progress = no_progress,
) -> TrainReport:
    """Train from the newest checkpoint on, if there is one, and saves the next version.

    Raises IdentityError if the folder holds another run, and what training raises.
    """
    preset = spec.objective if isinstance(spec.objective, Preset) else None
    objective = preset.objective if preset else spec.objective
    assert isinstance(objective, Objective)
    resume_metadata = {"plan": spec.plan, "rows_per_update": run_dir.rows_per_update}
    record = {
        "student": {k: v for k, v in model.lineage().items() if k not in ("name", "revision")},
        # A digest says less than a setting, so settings are compared before what follows from them.
        "settings": {
            **settings_record(settings, lora, run),
            "dtype": "bfloat16" if run_dir.args.bf16 else "float32",
        },
        "objective": objective.record(),
        **spec.identity,
        "eval": spec.evaluation_identity(),
        **resume_metadata,
    }
    if run_dir.earlier is not None:
        check_same(run_dir.out, {key: run_dir.earlier.get(key) for key in record}, record)
    folder, step = newest_checkpoint(run_dir.out, resume_metadata) or (None, 0)
    finished = (run_dir.out / METADATA).exists()
    if finished:
        # Checkpoints are large, and of no more use: without them the metrics are still all true.
        step = spec.updates
    run_dir.wait()
    if run_dir.first and run_dir.earlier is None:
        make_folder(run_dir.out)
        notes = {
            "preset": preset.name if preset else "",
            "updates": spec.updates,
            "config": dict(config),
            "exactness": asdict(spec.exactness),
        }
        write_json(run_dir.out / RUN, {**record, **notes})
    metrics = MetricsFile(run_dir.out / METRICS, step, first=run_dir.first)
    if not finished:
        with quiet():
            student = load_student(model, lora=lora, seed=run.seed)
            # Before a sampler takes views of the weights: moving them makes new ones.
            student.to(run_dir.args.device)
            trainer = DistillTrainer(
                student,
                run_dir.args,
                rows=spec.rows(student),
                updates=spec.updates,
                objective=objective,
                n_vocab=model.n_vocab,
                metrics_fraction=settings.metrics_fraction,
                aggregation=settings.aggregation,
                bounds=staleness_bounds(settings),
                version=model.version,
                same_root=spec.same_root,
                metrics=metrics,
                resume_metadata=resume_metadata,
                progress=progress,
            )
            evaluations = None
            if spec.evaluation or spec.held_out:
                evaluations = Evaluations(
                    spec.evaluation,
                    spec.held_out,
                    student,
                    metrics,
                    model.version,
                    run_dir.first,
                )
                trainer.add_callback(EvalCallback(evaluations))
                evaluations.at(0)
            trainer.train(resume_from_checkpoint=str(folder) if folder else None)
            if evaluations:
                evaluations.at(spec.updates)
            if run_dir.first:
                metadata = {
                    "pin": record.get("pin"),
                    "plan": spec.plan,
                    "objective": record["objective"],
                }
                noted: dict[str, Any] = {"evaluations": metrics.evaluations} if evaluations else {}
                if metrics.skipped:
                    noted["rescore"] = {"skipped": metrics.skipped, "positions": metrics.positions}
                write_json(run_dir.out / RUN, {**(read_run(run_dir.out) or {}), **noted})
                save_student(
                    student, run_dir.out, parent=model, updates=spec.updates, metadata=metadata
                )
            run_dir.wait()
    return TrainReport(
        out=run_dir.out,
        updates=spec.updates,
        resumed_at=step,
        version=model.version + spec.updates,
        positions=metrics.positions,
        exactness=spec.exactness,
        last=metrics.last,
        evaluations=tuple(metrics.evaluations),
    )


class EvalCallback(TrainerCallback):
    """Evaluates between updates, before the checkpoint of the same update is written."""

    def __init__(self, evaluations: Evaluations) -> None:
        self._evaluations = evaluations

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._evaluations.due(state.global_step):
            self._evaluations.at(state.global_step)
