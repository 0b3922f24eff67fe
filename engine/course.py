"""A run, wherever its rows come from: its folder, its checkpoints, the trained student.

`train` gives it rows of a plan, `distill` rows that are made round by round; what a run's folder
promises (the same call resumes, another is refused, a finished folder is a model) is kept here.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitcask.engine.batches import Rows
from logitcask.engine.errors import ConfigError
from logitcask.engine.evaluate import EvalPlan, Evaluations
from logitcask.engine.held_out import HeldOut
from logitcask.engine.objectives import AGGREGATIONS, Bounds, Objective, Preset, Verdict
from logitcask.engine.objectives.bounds import NO_BOUNDS
from logitcask.engine.rundir import (
    CARD,
    CHECKPOINTS,
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
from logitcask.engine.student import load_student, quiet, save_student
from logitcask.engine.trainer import DistillTrainer
from logitcask.engine.types import ModelRef, Progress, silent


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """How the weights move. Checked at construction: ConfigError."""

    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    epochs: int = 1
    tokens_per_batch: int = 16384
    """Tokens of one packed row at most, prompts included."""
    accumulation: int = 1
    """Packed rows per update and process."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of compute; auto = bfloat16 on a GPU, float32 on a CPU. Weights are float32 in any case."""
    lora_rank: int = 0
    """0 = all weights are trained."""
    metric_share: float = 1 / 16
    """Of the rows that metrics are taken of at least; see row_loss."""
    save_steps: int = 100
    """Updates between checkpoints; there is one at the end, too."""
    log_steps: int = 1
    """Updates per line of metrics.jsonl."""
    aggregation: str = "token-mean"
    """Of the positions of an update: one of AGGREGATIONS."""
    bounds: Bounds = NO_BOUNDS
    """How far the student may move from what was scored."""

    def __post_init__(self) -> None:
        counts = ("epochs", "tokens_per_batch", "accumulation", "save_steps", "log_steps")
        rules = {
            **{name: getattr(self, name) >= 1 for name in counts},
            **{n: getattr(self, n) >= 0 for n in ("warmup_steps", "weight_decay", "lora_rank")},
            **{n: getattr(self, n) > 0 for n in ("lr", "max_grad_norm")},
            **{n: 0 <= getattr(self, n) < 1 for n in ("beta1", "beta2")},
            "metric_share": 0 < self.metric_share <= 1,
            "schedule": self.schedule in _SCHEDULES,
            "aggregation": self.aggregation in AGGREGATIONS,
            "dtype": self.dtype in ("auto", "float32", "bfloat16"),
        }
        for name, holds in rules.items():
            if not holds:
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r} is not allowed",
                    remedy="see what `logitcask train --help` says it takes",
                )


_SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}
"""Ours -> transformers' names; all of them warm up."""


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
    exactness: Verdict
    last: Mapping[str, Any]
    """The last update's line of metrics.jsonl."""
    evaluations: tuple[Mapping[str, Any], ...] = ()
    """Its lines of evaluations, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """What a run is, beside its student and its settings."""

    rows: Callable[[nn.Module], Rows]
    """Makes the rows, given the student in training."""
    updates: int
    objective: Objective | Preset
    same_root: bool
    """The rollouts are of the student's lineage, so that ages are version differences."""
    identity: Mapping[str, Any]
    """Goes into run.json; the same folder takes no run in which any of it differs."""
    plan: str
    """Digest of the data and its order: a checkpoint of another is not resumed from."""
    exactness: Verdict
    evaluation: EvalPlan | None = None
    held_out: HeldOut | None = None

    def examined(self) -> dict[str, Any]:
        """What must be the same for numbers of one run to be compared."""
        return {
            **(self.evaluation.identity() if self.evaluation else {}),
            **({"held_out": self.held_out.identity} if self.held_out else {}),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Desk:
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


def open_desk(
    out: Path,
    *,
    model: ModelRef,
    settings: TrainSettings,
    overwrite: bool = False,
    device: str = "auto",
    report_to: tuple[str, ...] = (),
) -> Desk:
    """Raises ConfigError for a folder or a device that a run cannot use."""
    if out.resolve() == model.path.resolve():
        raise ConfigError(f"--out {out} is the student itself", remedy="give another --out")
    args = training_arguments(out, settings, device, report_to)
    desk = Desk(out=out, args=args, earlier=read_run(out))
    desk.wait()
    if overwrite and desk.earlier is not None:
        if desk.first:
            clear(out)
        desk.wait()
        return Desk(out=out, args=args, earlier=None)
    return desk


def carry_out(
    course: Course,
    desk: Desk,
    *,
    model: ModelRef,
    settings: TrainSettings,
    config: Mapping[str, Any],
    progress: Progress = silent,
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
    finished = (desk.out / CARD).exists()
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
                trainer.add_callback(_Examiner(exams))
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
                if exams:
                    noted = read_run(desk.out) or {}
                    write_json(desk.out / RUN, {**noted, "evaluations": metrics.evaluations})
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


class _Examiner(TrainerCallback):
    """Evaluates between updates, before the checkpoint of the same update is written."""

    def __init__(self, exams: Evaluations) -> None:
        self._exams = exams

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._exams.due(state.global_step):
            self._exams.at(state.global_step)


def training_arguments(
    out: Path, settings: TrainSettings, device: str = "auto", report_to: tuple[str, ...] = ()
) -> TrainingArguments:
    """What `DistillTrainer` needs of transformers' arguments, checkpoints below `out`.

    Raises ConfigError for a device that is not there.
    """
    if device not in ("auto", "cpu", "cuda", "cuda:0"):
        raise ConfigError(
            f"--device {device}: training takes auto, cpu or cuda",
            remedy="choose a GPU with CUDA_VISIBLE_DEVICES, several with torchrun",
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: this machine shows no GPU", remedy="--device cpu")
    cpu = device == "cpu" or not torch.cuda.is_available()
    bf16 = settings.dtype == "bfloat16" or (settings.dtype == "auto" and not cpu)
    args = TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        use_cpu=cpu,
        bf16=bf16,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.accumulation,
        # The plan holds all epochs, in order.
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        optim="adamw_torch_fused",
        learning_rate=settings.lr,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.save_steps,
        # A crash while one is written leaves the one before.
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        report_to=list(report_to) or "none",
        disable_tqdm=True,
        # Every micro-batch reaches every trainable parameter, the empty ones too.
        ddp_find_unused_parameters=False,
    )
    # Without torchrun Trainer would spread one process over all GPUs with DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
    return args
