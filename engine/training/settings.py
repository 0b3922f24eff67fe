"""How the weights move, and the same as transformers takes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import TrainingArguments

from logitcask.engine.errors import ConfigError
from logitcask.engine.objectives import AGGREGATIONS, Bounds
from logitcask.engine.objectives.bounds import NO_BOUNDS
from logitcask.engine.training.run_dir import (
    CHECKPOINTS,
)


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
                    hint="see what `logitcask train --help` says it takes",
                )


_SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}
"""Ours -> transformers' names; all of them warm up."""


def training_arguments(
    out: Path, settings: TrainSettings, device: str = "auto"
) -> TrainingArguments:
    """What `DistillTrainer` needs of transformers' arguments, checkpoints below `out`.

    Raises ConfigError for a device that is not there.
    """
    if device not in ("auto", "cpu", "cuda", "cuda:0"):
        raise ConfigError(
            f"--device {device}: training takes auto, cpu or cuda",
            hint="choose a GPU with CUDA_VISIBLE_DEVICES, several with torchrun",
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: this machine shows no GPU", hint="--device cpu")
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
        report_to="none",
        disable_tqdm=True,
        # Every micro-batch reaches every trainable parameter, the empty ones too.
        ddp_find_unused_parameters=False,
    )
    # Without torchrun Trainer would spread one process over all GPUs with DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
    return args
