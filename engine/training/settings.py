"""The settings of a run as transformers.TrainingArguments and as a record in run.json."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from logitcask.engine.backends.hf import pick_dtype
from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.errors import ConfigError
from logitcask.engine.training.arguments.passed import (
    arguments_of,
    check_optimizer,
    passed_fields,
    recorded_args,
)
from logitcask.engine.training.metric_sampling import SHARE
from logitcask.engine.training.run_dir.files import CHECKPOINTS
from logitcask.engine.training.sharding.settings import (
    check_environment,
    complete_arguments,
    is_sharded,
    launcher_variables,
    sharding_arguments,
)

FLASH = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
"""Attention implementation of transformers -> its package, the faster one first."""
_SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}
"""`lr_scheduler_type` -> transformers' value; all of them warm up."""


def training_arguments(settings: Train, run: Run, student: Path | None = None) -> TrainingArguments:
    """Build the transformers.TrainingArguments of a run, checkpoints below `run.out`.

    student: its folder, for dtype = auto on a CPU, see `pick_dtype`; None = float32 there.
    Raises ConfigError for a device that does not exist, for a field of [train.args] or an optimizer
    that does not run here.
    """
    if run.device not in ("auto", "cpu", "cuda", "cuda:0"):
        raise ConfigError(
            f"--device {run.device}: training takes auto, cpu or cuda",
            hint="choose a GPU with CUDA_VISIBLE_DEVICES, several with torchrun",
        )
    if run.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {run.device}: this machine shows no GPU", hint="--device cpu")
    cpu = run.device == "cpu" or not torch.cuda.is_available()
    dtype = pick_dtype(run.dtype, torch.device("cpu" if cpu else "cuda"), student)
    check_environment(settings)
    fields: dict[str, Any] = {
        "output_dir": str(run.out / CHECKPOINTS),
        "use_cpu": cpu,
        "bf16": dtype == torch.bfloat16,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        # The plan contains all epochs, in order.
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": _SCHEDULES[settings.lr_scheduler_type],
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "max_grad_norm": settings.max_grad_norm,
        "seed": run.seed,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "logging_strategy": "steps",
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        # Every micro-batch reaches every trainable parameter, the empty ones too.
        "ddp_find_unused_parameters": False,
    }
    fields |= passed_fields(settings, run.out.resolve().name) | sharding_arguments(settings, cpu)
    with launcher_variables(settings.sharding == "fsdp2", settings.cpu_offload):
        args = arguments_of(fields)
    check_optimizer(args, settings)
    # Without torchrun Trainer would spread one process over all GPUs with DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
    complete_arguments(args, settings)
    return args


def check_lora(settings: Train, lora: Lora) -> None:
    """Raise ConfigError for weights in 4 bits with settings that they are not proved with."""
    names = {"sharding": settings.sharding != "none"} | {
        "args.torch_compile": settings.args.get("torch_compile", False)
    }
    for name, is_set in names.items():
        if lora.load_in_4bit and is_set:
            raise ConfigError(
                f"lora.load_in_4bit with train.{name}: weights in 4 bits are not proved with it",
                hint=f"leave one of them out; --{name.replace('args.', 'train-arg ')} needs whole "
                "weights",
            )


def choose_attention(settings: Train, args: TrainingArguments) -> str | None:
    """Return the attention implementation of a run; None = that of packs, see models.attention.

    Raises ConfigError for one that this machine or the dtype of the run does not support.
    """
    name = settings.attn_implementation
    flash = [each for each, package in FLASH.items() if importlib.util.find_spec(package)]
    half = args.bf16 and not args.use_cpu
    if is_sharded(args) and name not in ("auto", "sdpa", "eager"):
        raise ConfigError(
            f"attn_implementation = {name} with train.sharding: shards cannot prove it",
            hint="leave it out: the attention of packs is used",
        )
    if name == "auto" and is_sharded(args):
        return None
    if name == "auto":
        return flash[0] if half and flash else None
    if args.use_cpu and name not in ("sdpa", "eager"):
        raise ConfigError(
            f"attn_implementation = {name} does not train on a CPU",
            hint="leave it out, or give sdpa or eager",
        )
    if name in FLASH and name not in flash:
        raise ConfigError(
            f"attn_implementation = {name} needs the package {FLASH[name]}",
            hint="install it as github.com/Dao-AILab/flash-attention says, or leave the key out",
        )
    if name in FLASH and not half:
        raise ConfigError(
            f"attn_implementation = {name} needs a run in bfloat16",
            hint="give --dtype bfloat16, or leave the key out",
        )
    return name


def updates_at_most(settings: Train, planned: int) -> int:
    """Return the updates of a run whose data make `planned` updates."""
    return planned if settings.max_steps is None else min(planned, settings.max_steps)


def settings_record(settings: Train, lora: Lora, run: Run) -> dict[str, Any]:
    """Return the settings under their keys in run.json and in the rollouts of a loop.

    Keys added later are omitted at their defaults, so that earlier runs still resume.
    """
    adapters = lora.model_dump(exclude={"r", "save_adapter"}, exclude_defaults=True)
    later = {
        **{f"lora_{key}": value for key, value in adapters.items()},
        **settings.model_dump(
            include={
                *("dropout", "max_steps", "optim", "attn_implementation", "save_dtype"),
                "metrics_steps",
            },
            exclude_defaults=True,
        ),
        **({"args": fields} if (fields := recorded_args(settings)) else {}),
    }
    return {
        "lr": settings.learning_rate,
        "epochs": settings.num_train_epochs,
        "tokens_per_batch": settings.pack_length,
        "accumulation": settings.gradient_accumulation_steps,
        "schedule": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "beta1": settings.adam_beta1,
        "beta2": settings.adam_beta2,
        "max_grad_norm": settings.max_grad_norm,
        "seed": run.seed,
        "dtype": run.dtype,
        "lora_rank": lora.r,
        "metric_share": settings.metrics_fraction or SHARE,  # the default of earlier versions
        "save_steps": settings.save_steps,
        "log_steps": settings.logging_steps,
        "aggregation": settings.aggregation,
        "bounds": {
            "action": settings.staleness_action,
            "min_coverage": settings.min_coverage,
            "max_drift": settings.max_drift,
        },
        **later,
    }


def compared_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of run.json without `accumulation`.

    More processes with fewer packs each are the same run: `rows_per_update` is their product.
    """
    settings = record["settings"] or {}
    kept = {key: value for key, value in settings.items() if key != "accumulation"}
    return {**record, "settings": kept}
