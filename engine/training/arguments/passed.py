"""Fields of [train.args] and the optimizer, tried before anything is loaded."""

import warnings
from collections.abc import Mapping
from typing import Any, cast, get_type_hints

import torch
import transformers
from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from logitcask.engine.config.trainer_args import COMPILE, HUB, OPTIMIZERS, RECORDED
from logitcask.engine.config.training import Train
from logitcask.engine.errors import ConfigError
from logitcask.engine.training.arguments.trackers import check_trackers
from logitcask.engine.training.run_dir.files import TENSORBOARD

TRIAL = (64, 128)
"""Shape of the parameter that an optimizer moves on trial: 8-bit states begin at 4096 elements."""


def passed_fields(settings: Train, run_name: str) -> dict[str, Any]:
    """Return the fields that TrainingArguments gets from [train.args] and `optim`.

    run_name: the name of the run for trackers where none is set. Raises ConfigError for a field
    that the installed transformers lacks, a value of another type, and a tracker that is missing.
    """
    hints = get_type_hints(TrainingArguments)
    for name, value in settings.args.items():
        if name not in hints:
            raise ConfigError(
                f"train.args.{name}: transformers {transformers.__version__} has no such field",
                hint=f"leave {name} out, or install a newer transformers",
            )
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ConfigError(
                f"train.args.{name} = {value!r}: {error.errors()[0]['msg']}",
                hint=f"transformers takes {name}: {_type_name(hints[name])}",
            ) from error
    if settings.args.get("torch_compile") and settings.sharding != "none":
        raise ConfigError(
            f"train.args.torch_compile with train.sharding = {settings.sharding}: compiled layers "
            "are not proved with shards",
            hint="leave torch_compile out",
        )
    trackers = check_trackers(settings.args.get("report_to", "none"))
    return {
        "run_name": run_name,
        # A crash during a save leaves the checkpoint before.
        "save_total_limit": 2,
        "optim": settings.optim,
        **{name: value for name, value in settings.args.items() if name not in (*HUB, *COMPILE)},
        "report_to": [name for name in trackers if name != TENSORBOARD] or "none",
    }


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def arguments_of(fields: Mapping[str, Any]) -> TrainingArguments:
    """Build TrainingArguments; ConfigError for values that they refuse."""
    try:
        return TrainingArguments(**fields)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise ConfigError(
            f"transformers refuses these settings: {' '.join(str(error).split())}",
            hint="change that field in [train.args] (--train-arg)",
        ) from error


def check_optimizer(args: TrainingArguments, settings: Train) -> None:
    """Build the optimizer and its schedule, and move a parameter with it on the run's device.

    Raises ConfigError for one that does not run here, and for settings that it does not read.
    """
    pairs = _optim_args(args)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        _check_read(options, pairs, args, settings)
        trial = nn.Parameter(torch.zeros(TRIAL, device=args.device))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pages of a CPU, and on a schedule without a step
            optimizer = kind([trial], **{**options, "lr": 1.0})
            get_scheduler(
                args.lr_scheduler_type,
                optimizer,
                num_warmup_steps=0,
                num_training_steps=2,
                scheduler_specific_kwargs=dict(cast(Any, args.lr_scheduler_kwargs) or {}),
            )
            trial.grad = torch.ones_like(trial)
            optimizer.step()
    except ConfigError:
        raise
    # A package of its own raises what it wants, where it is missing or does not run here.
    except Exception as error:
        package = OPTIMIZERS[settings.optim]
        raise ConfigError(
            f"train.optim = {settings.optim} does not run here: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}",
            hint=f"pip install {package}, or take adamw_torch_fused"
            if package
            else "change optim_args or lr_scheduler_kwargs in [train.args]",
        ) from error
    if not bool((trial != 0).any()):
        raise ConfigError(
            f"train.optim = {settings.optim} moves no weight here", hint="take adamw_torch_fused"
        )


def _optim_args(args: TrainingArguments) -> dict[str, str]:
    """Return the pairs of `optim_args`; ConfigError for a part that is none."""
    found = {}
    for pair in filter(None, (args.optim_args or "").replace(" ", "").split(",")):
        key, equals, value = pair.partition("=")
        if not (equals and key and value):
            raise ConfigError(
                f"train.args.optim_args: {pair} is not NAME=VALUE",
                hint='write "momentum=0.9,nesterov=true"',
            )
        found[key] = value
    return found


def _check_read(
    options: Mapping[str, Any], pairs: Mapping[str, str], args: TrainingArguments, settings: Train
) -> None:
    """Raise ConfigError for a setting that the optimizer or its schedule would ignore."""
    if args.lr_scheduler_kwargs and settings.lr_scheduler_type == "constant":
        raise ConfigError(
            "train.args.lr_scheduler_kwargs is set, and a constant schedule reads none",
            hint="leave it out, or set train.lr_scheduler_type = cosine",
        )
    default = Train()
    read = {
        "adam_beta1": ("betas", settings.adam_beta1 != default.adam_beta1),
        "adam_beta2": ("betas", settings.adam_beta2 != default.adam_beta2),
        "args.adam_epsilon": ("eps", "adam_epsilon" in settings.args),
    }
    for name, (option, is_set) in read.items():
        if is_set and option not in options:
            raise ConfigError(
                f"train.{name} is set, and {settings.optim} does not read it",
                hint="leave it out, or take an optimizer of Adam's kind",
            )
    for key in pairs:
        args.optim_args = ",".join(f"{k}={v}" for k, v in pairs.items() if k != key) or None
        without = dict(Trainer.get_optimizer_cls_and_kwargs(args)[1])
        args.optim_args = ",".join(f"{k}={v}" for k, v in pairs.items())
        if key not in options and without == dict(options):
            raise ConfigError(
                f"train.args.optim_args: {settings.optim} does not read {key}",
                hint=f"leave {key} out; what it takes: {', '.join(sorted(options))}",
            )


def recorded_args(settings: Train) -> dict[str, Any]:
    """Return the fields of [train.args] that change numbers, for run.json."""
    return {name: value for name, value in settings.args.items() if name in RECORDED}
