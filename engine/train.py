"""Train a student on a pinned store: one call, which resumes where it was interrupted."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from logitcask.engine.batches import PlannedRows, RowSource
from logitcask.engine.errors import ConfigError, IdentityError, IncompleteError
from logitcask.engine.objectives import Facts, Objective, Preset, Verdict, verdict
from logitcask.engine.plan import Plan, PlanKey, make_plan
from logitcask.engine.rundir import (
    CARD,
    CHECKPOINTS,
    METRICS,
    RUN,
    MetricsFile,
    check_same,
    clear,
    newest_checkpoint,
    read_run,
    write_json,
)
from logitcask.engine.store import Pin, Store
from logitcask.engine.student import load_student, quiet, save_student
from logitcask.engine.trainer import DistillTrainer, gathered
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
    save_steps: int = 100
    """Updates between checkpoints; there is one at the end, too."""
    log_steps: int = 1
    """Updates per line of metrics.jsonl."""

    def __post_init__(self) -> None:
        counts = ("epochs", "tokens_per_batch", "accumulation", "save_steps", "log_steps")
        rules = {
            **{name: getattr(self, name) >= 1 for name in counts},
            **{n: getattr(self, n) >= 0 for n in ("warmup_steps", "weight_decay", "lora_rank")},
            **{n: getattr(self, n) > 0 for n in ("lr", "max_grad_norm")},
            **{n: 0 <= getattr(self, n) < 1 for n in ("beta1", "beta2")},
            "schedule": self.schedule in _SCHEDULES,
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
    """What a call of `train` did."""

    out: Path
    updates: int
    """Of the whole run."""
    resumed_at: int
    """Updates that an earlier call had done; equal to `updates` if there was nothing left to do."""
    version: int
    """Of the trained student."""
    positions: int
    """Response positions trained on, all epochs."""
    pin: int
    """Log number of the data."""
    exactness: Verdict
    last: Mapping[str, Any]
    """The last line of metrics.jsonl."""


def train(
    store: Store,
    *,
    model: ModelRef,
    out: Path,
    teacher: str,
    rollouts: str = "main",
    objective: Objective | Preset,
    settings: TrainSettings | None = None,
    pin: Pin | None = None,
    partial: bool = False,
    foreign_student: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    config: Mapping[str, Any] | None = None,
    report_to: tuple[str, ...] = (),
    progress: Progress = silent,
) -> TrainReport:
    """Trains `model` on the scores of `teacher`, and saves it as the next version in `out`.

    Without a `pin` the store is pinned as it is at the first call. The same call on the same `out`
    resumes from the newest checkpoint, bit-exactly on a CPU. `config`, the caller's resolved
    configuration, is only recorded, in run.json. Under torchrun every process calls this.

    Raises ConfigError, IdentityError (another run in `out`, another tokenizer than the rollouts'),
    IncompleteError (units missing and not `partial`), ObjectiveError (the cache cannot serve the
    objective) and ModelError.
    """
    settings = settings or TrainSettings()
    if out.resolve() == model.path.resolve():
        raise ConfigError(f"--out {out} is the student itself", remedy="give another --out")
    args = training_arguments(out, settings, device, report_to)
    first = args.process_index == 0
    earlier = read_run(out)
    _wait(args)
    if overwrite and earlier is not None:
        if first:
            clear(out)
        earlier = None
        _wait(args)
    if pin is None:
        pin = _pin(store, earlier)
    source = RowSource(store, pin, rollouts, teacher, partial=partial)
    facts = _facts(model, source, foreign_student)
    exactness = verdict(objective, facts)
    bare = objective.objective if isinstance(objective, Preset) else objective
    plan = _plan(source, pin, rollouts, teacher, settings)
    width = args.gradient_accumulation_steps * args.world_size
    mark = {"plan": plan.digest, "rows_per_update": width}
    run = {
        "student": {k: v for k, v in model.lineage().items() if k not in ("name", "revision")},
        "store": store.uuid,
        "pin": {"number": pin.number, "sha256": pin.sha256},
        "rollouts": rollouts,
        "teacher": teacher,
        "objective": asdict(bare),
        "settings": {**asdict(settings), "dtype": "bfloat16" if args.bf16 else "float32"},
        **mark,
    }
    if earlier is not None:
        check_same(out, {key: earlier.get(key) for key in run}, run)
    folder, step = newest_checkpoint(out, mark) or (None, 0)
    _wait(args)
    if first and earlier is None:
        out.mkdir(parents=True, exist_ok=True)
        preset = objective.name if isinstance(objective, Preset) else ""
        notes = {"preset": preset, "config": dict(config or {}), "exactness": asdict(exactness)}
        write_json(out / RUN, {**run, **notes})
    finished = (out / CARD).exists()
    metrics = MetricsFile(out / METRICS, step, first=first)
    updates = -(-len(plan) // width)
    if not finished:
        with quiet():
            student = load_student(model, lora_rank=settings.lora_rank, seed=settings.seed)
            trainer = DistillTrainer(
                student,
                args,
                rows=PlannedRows(plan, source),
                updates=updates,
                objective=bare,
                n_vocab=model.n_vocab,
                version=model.version,
                same_root=facts.same_root,
                metrics=metrics,
                mark=mark,
                progress=progress,
            )
            trainer.train(resume_from_checkpoint=str(folder) if folder else None)
            if first:
                card = {"pin": run["pin"], "plan": plan.digest, "objective": run["objective"]}
                save_student(student, out, parent=model, updates=updates, card=card)
            _wait(args)
    return TrainReport(
        out=out,
        updates=updates,
        resumed_at=updates if finished else step,
        version=model.version + updates,
        positions=metrics.positions,
        pin=pin.number,
        exactness=exactness,
        last=metrics.last,
    )


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


def _wait(args: TrainingArguments) -> None:
    if args.world_size > 1:
        torch.distributed.barrier()


def _pin(store: Store, earlier: Mapping[str, Any] | None) -> Pin:
    """That of the earlier call, else the newest that the first process sees."""
    if earlier is not None:
        return store.pin(int(earlier["pin"]["number"]), earlier["pin"]["sha256"])
    newest = store.head()
    number, sha256 = gathered((newest.number, newest.sha256))[0]
    return store.pin(number, sha256)


def _facts(model: ModelRef, source: RowSource, foreign_student: bool) -> Facts:
    """What the cache and the student are to each other. IdentityError for another tokenizer."""
    rollouts = [segment for segment, _ in source.pairs]
    scores = [segment for _, segment in source.pairs]
    sampler = rollouts[0].lineage["student"]
    if sampler["tokenizer"] != model.tokenizer_digest:
        raise IdentityError(
            f"the rollouts were sampled with tokenizer {sampler['tokenizer']}, the student "
            f"{model.name} has {model.tokenizer_digest}",
            remedy="train a student with the tokenizer of the rollouts, or sample with this one",
        )
    request = scores[0].lineage["request"]
    sampling = rollouts[0].lineage["set"]
    return Facts(
        student_k=int(sampling["student_k"]),
        k_min=int(request["k_min"]),
        k_max=int(request["k_max"]),
        layout="whole" if any(s.layout == "whole" for s in scores) else "once",
        versions=tuple(sorted({int(s.unit["version"]) for s in rollouts})),
        student_version=model.version,
        same_root=sampler["root"] == model.root,
        same_template=sampler["template"] == model.template_digest,
        plain_sampling=all(sampling[k] == v for k, v in _PLAIN.items()),
        allow_foreign=foreign_student,
    )


_PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling parameters that leave the student's own distribution."""


def _plan(
    source: RowSource, pin: Pin, rollouts: str, teacher: str, settings: TrainSettings
) -> Plan:
    key = PlanKey(
        pin=pin.number,
        pin_sha256=pin.sha256,
        rollouts=rollouts,
        teacher=teacher,
        seed=settings.seed,
        epochs=settings.epochs,
        tokens_per_batch=settings.tokens_per_batch,
    )
    plan = make_plan(key, source.lengths())
    if not len(plan):
        raise IncompleteError(
            f"rollouts {rollouts!r} hold no response token",
            remedy="sample again with a larger --max-new-tokens",
        )
    return plan
