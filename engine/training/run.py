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
from logitcask.engine.training.settings import TrainSettings, training_arguments
from logitcask.engine.training.trainer import DistillTrainer
from logitcask.engine.types import ModelRef, Progress, no_progress


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """What a call of `train` or `distill` did."""

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
    """What a run is, beside its student and its settings."""

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

    def examined(self) -> dict[str, Any]:
        """What must be the same for numbers of one run to be compared."""
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
        """Whether this process is the one that writes."""
        return bool(self.args.process_index == 0)

    @property
    def rows_per_update(self) -> int:
        """Packed rows of an update over all processes."""
        return int(self.args.gradient_accumulation_steps * self.args.world_size)

    def wait(self) -> None:
        """Until every process is here."""
        if self.args.world_size > 1:
            torch.distributed.barrier()


def open_run_dir(
    out: Path,
    *,
    model: ModelRef,
    settings: TrainSettings,
    overwrite: bool = False,
    device: str = "auto",
) -> RunDir:
    """Raises ConfigError for a folder or a device that a run cannot use."""
    if out.resolve() == model.path.resolve():
        raise ConfigError(f"--out {out} is the student itself", hint="give another --out")
    args = training_arguments(out, settings, device)
    desk = RunDir(out=out, args=args, earlier=read_run(out))
    desk.wait()
    if overwrite and desk.earlier is not None:
        if desk.first:
            clear(out)
        desk.wait()
        return RunDir(out=out, args=args, earlier=None)
    return desk


def run_training(
    course: RunSpec,
    desk: RunDir,
    *,
    model: ModelRef,
    settings: TrainSettings,
    config: Mapping[str, Any],
    progress: Progress = no_progress,
) -> TrainReport:
    """Trains from the newest checkpoint on, if there is one, and saves the next version.

    Raises IdentityError if the folder holds another run, and what training raises.
    """
    preset = course.objective if isinstance(course.objective, Preset) else None
    objective = preset.objective if preset else course.objective
    assert isinstance(objective, Objective)
    mark = {"plan": course.plan, "rows_per_update": desk.rows_per_update}
    run = {
        "student": {k: v for k, v in model.lineage().items() if k not in ("name", "revision")},
        # A digest says less than a setting, so settings are compared before what follows from them.
        "settings": {**asdict(settings), "dtype": "bfloat16" if desk.args.bf16 else "float32"},
        "objective": objective.record(),
        **course.identity,
        "eval": course.examined(),
        **mark,
    }
    if desk.earlier is not None:
        check_same(desk.out, {key: desk.earlier.get(key) for key in run}, run)
    folder, step = newest_checkpoint(desk.out, mark) or (None, 0)
    finished = (desk.out / METADATA).exists()
    if finished:
        # Checkpoints are large, and of no more use: without them the metrics are still all true.
        step = course.updates
    desk.wait()
    if desk.first and desk.earlier is None:
        make_folder(desk.out)
        notes = {
            "preset": preset.name if preset else "",
            "updates": course.updates,
            "config": dict(config),
            "exactness": asdict(course.exactness),
        }
        write_json(desk.out / RUN, {**run, **notes})
    metrics = MetricsFile(desk.out / METRICS, step, first=desk.first)
    if not finished:
        with quiet():
            student = load_student(model, lora_rank=settings.lora_rank, seed=settings.seed)
            # Before a sampler takes views of the weights: moving them makes new ones.
            student.to(desk.args.device)
            trainer = DistillTrainer(
                student,
                desk.args,
                rows=course.rows(student),
                updates=course.updates,
                objective=objective,
                n_vocab=model.n_vocab,
                metric_share=settings.metric_share,
                aggregation=settings.aggregation,
                bounds=settings.bounds,
                version=model.version,
                same_root=course.same_root,
                metrics=metrics,
                mark=mark,
                progress=progress,
            )
            exams = None
            if course.evaluation or course.held_out:
                exams = Evaluations(
                    course.evaluation,
                    course.held_out,
                    student,
                    metrics,
                    model.version,
                    desk.first,
                )
                trainer.add_callback(EvalCallback(exams))
                exams.at(0)
            trainer.train(resume_from_checkpoint=str(folder) if folder else None)
            if exams:
                exams.at(course.updates)
            if desk.first:
                card = {
                    "pin": run.get("pin"),
                    "plan": course.plan,
                    "objective": run["objective"],
                }
                noted: dict[str, Any] = {"evaluations": metrics.evaluations} if exams else {}
                if metrics.skipped:
                    noted["rescore"] = {"skipped": metrics.skipped, "positions": metrics.positions}
                write_json(desk.out / RUN, {**(read_run(desk.out) or {}), **noted})
                save_student(student, desk.out, parent=model, updates=course.updates, card=card)
            desk.wait()
    return TrainReport(
        out=desk.out,
        updates=course.updates,
        resumed_at=step,
        version=model.version + course.updates,
        positions=metrics.positions,
        exactness=course.exactness,
        last=metrics.last,
        evaluations=tuple(metrics.evaluations),
    )


class EvalCallback(TrainerCallback):
    """Evaluates between updates, before the checkpoint of the same update is written."""

    def __init__(self, exams: Evaluations) -> None:
        self._exams = exams

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._exams.due(state.global_step):
            self._exams.at(state.global_step)
