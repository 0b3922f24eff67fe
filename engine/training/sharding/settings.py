"""The settings of a sharded run: checks, arguments of transformers, variables of accelerate."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from logitcask.engine.config.training import Train
from logitcask.engine.errors import ConfigError
from logitcask.engine.training.sharding import zero3

LAUNCHER = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""Variables by which `accelerate launch` asks for a kind of sharding."""
VARIABLES = (*LAUNCHER, "FSDP_OFFLOAD_PARAMS", "FSDP_CPU_RAM_EFFICIENT_LOADING")
"""Variables that accelerate and transformers set where a run is sharded."""
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
"""Optimizers whose moments have the shape of their parameter, so that they are sharded with it."""


def check_environment(settings: Train) -> None:
    """Raise ConfigError where the environment or the packages cannot shard as [train] asks."""
    if settings.cpu_offload and settings.sharding != "fsdp2":
        raise ConfigError(
            f"train.cpu_offload = true with train.sharding = {settings.sharding}: shards are kept "
            "in the memory of the CPU by FSDP2 alone",
            hint="set train.sharding = fsdp2 (--sharding fsdp2), or leave --cpu-offload out",
        )
    same = {"ACCELERATE_USE_FSDP": settings.sharding == "fsdp2"}
    for name in LAUNCHER:
        if _is_true(os.environ.get(name)) and not same.get(name, False):
            raise ConfigError(
                f"{name} = {os.environ[name]} in the environment, and train.sharding = "
                f"{settings.sharding}",
                hint="start without a configuration file of accelerate: torchrun, or `accelerate "
                "launch --multi_gpu`; train.sharding = fsdp2 or zero3 asks for either",
            )
    if settings.sharding == "none":
        return
    fsdp = {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": str(settings.cpu_offload).lower()}
    for name, value in fsdp.items() if settings.sharding == "fsdp2" else ():
        if os.environ.get(name, value).lower() != value:
            raise ConfigError(
                f"{name} = {os.environ[name]} in the environment, and [train] asks for {value}",
                hint=f"remove {name} from the environment: [train] sets it",
            )
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ConfigError(
            f"train.sharding = {settings.sharding}: one process has nothing to shard",
            hint="start several with torchrun --nproc-per-node N -m logitcask.cli.main train ..., "
            "or leave --sharding out: a checkpoint of a sharded run resumes either way",
        )
    if settings.sharding == "zero3":
        zero3.check_package()


def sharding_arguments(settings: Train, cpu: bool) -> dict[str, Any]:
    """Return the fields of transformers.TrainingArguments for `train.sharding`."""
    if settings.sharding == "none":
        return {}
    if cpu and settings.cpu_offload:
        raise ConfigError(
            "train.cpu_offload = true on a CPU: its memory holds the shards in any case",
            hint="leave --cpu-offload out",
        )
    if cpu and torch.cuda.is_available():
        raise ConfigError(
            f"train.sharding = {settings.sharding} with --device cpu: it shards over the GPUs of "
            "this machine",
            hint='hide them with CUDA_VISIBLE_DEVICES="", or leave --device out',
        )
    if settings.sharding == "zero3":
        return {"deepspeed": zero3.configuration(cpu)}
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "cpu_offload": settings.cpu_offload,
            "cpu_ram_efficient_loading": True,
            "state_dict_type": "SHARDED_STATE_DICT",  # then Trainer gathers no weights
        },
        # Without it each process holds whole gradients between the micro-batches of an update.
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }


def complete_arguments(args: TrainingArguments, settings: Train) -> None:
    """Check the optimizer of a sharded run, and set the types in which it computes."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if settings.sharding == "none":
        return
    plugin: dict[str, Any] | None = getattr(args, "fsdp_plugin_args", None)
    resumes = hasattr(Trainer, "_prepare_for_training")
    if not (resumes if settings.sharding == "zero3" else plugin is not None):
        raise ConfigError(
            f"train.sharding = {settings.sharding}: this transformers cannot shard so",
            hint="install a newer transformers",
        )
    if str(getattr(args.optim, "value", args.optim)) not in OPTIMIZERS:
        raise ConfigError(
            f"train.optim = {args.optim} with train.sharding = {settings.sharding}: its states "
            "are not divided as the weights are",
            hint=f"set train.optim to {' or '.join(OPTIMIZERS)}",
        )
    if plugin is None:
        zero3.load_models_whole()
    elif args.bf16:
        # accelerate's own policy would round the loss and the sums of gradients too.
        plugin["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )


def is_zero3(args: TrainingArguments) -> bool:
    """Return True for the arguments of a run with DeepSpeed's ZeRO-3."""
    return bool(args.deepspeed)


def is_sharded(args: TrainingArguments) -> bool:
    """Return True for the arguments of a sharded run."""
    return is_zero3(args) or getattr(args, "fsdp_plugin_args", None) is not None


@contextmanager
def launcher_variables(fsdp: bool, cpu_offload: bool = False) -> Iterator[None]:
    """Ask accelerate for FSDP by its variables too, and restore the environment afterwards.

    It starts the processes' exchange with gloo for tensors of the CPU only if it finds them; and it
    sets them itself, as those of DeepSpeed, which would shard the next run in this process.
    """
    before = {name: os.environ.get(name) for name in VARIABLES}
    if fsdp:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ["FSDP_OFFLOAD_PARAMS"] = str(cpu_offload).lower()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "y", "on", "t")
