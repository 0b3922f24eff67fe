"""Sharding of weights, gradients and moments over the processes of a run: FSDP2.

transformers' Trainer and accelerate do it, by `fully_shard` of each layer, of the embedding and of
the last norm with the head. Here is what they leave open: arguments that make the memory of a
process fall with the number of processes, weights that the first process alone loads, a check that
the parameters became DTensors, and the whole student for the save.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from logitcask.engine.config.training import Lora, Train
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.models.attention import attention_of
from logitcask.engine.models.check import CheckedPaths
from logitcask.engine.models.forward import inner_model
from logitcask.engine.models.load import empty_student, load_student, paths_of
from logitcask.engine.training.processes import on_first, rank
from logitcask.engine.training.run_dir.shards import (
    has_shards,
    load_optimizer,
    load_weights,
    save_shards,
)
from logitcask.engine.types import ModelRef

LAUNCHER = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""Variables by which `accelerate launch` asks for a kind of sharding."""
VARIABLES = ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS", "FSDP_CPU_RAM_EFFICIENT_LOADING")
"""Variables that accelerate and transformers set where a run is sharded."""
SCHEDULER = "scheduler.pt"
"""File of a checkpoint with the schedule of the learning rate."""
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
"""Optimizers whose moments have the shape of their parameter, so that they are sharded with it."""


def check_environment(settings: Train) -> None:
    """Raise ConfigError where [train] and the environment of a launcher ask for other sharding."""
    if settings.cpu_offload and settings.sharding == "none":
        raise ConfigError(
            "train.cpu_offload = true: only sharded weights are kept in the memory of the CPU",
            hint="set train.sharding = fsdp2 (--sharding fsdp2) too",
        )
    same = {"ACCELERATE_USE_FSDP": settings.sharding == "fsdp2"}
    for name in LAUNCHER:
        if _is_true(os.environ.get(name)) and not same.get(name, False):
            raise ConfigError(
                f"{name} = {os.environ[name]} in the environment, and train.sharding = "
                f"{settings.sharding}",
                hint="set train.sharding = fsdp2 for FSDP, or start without a configuration file "
                "of accelerate: torchrun, or `accelerate launch --multi_gpu`",
            )
    if settings.sharding == "none":
        return
    for name, value in {
        "FSDP_VERSION": "2",
        "FSDP_OFFLOAD_PARAMS": str(settings.cpu_offload).lower(),
    }.items():
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


def fsdp_arguments(settings: Train, cpu: bool) -> dict[str, Any]:
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
            "train.sharding = fsdp2 with --device cpu: torch shards over the GPUs of this machine",
            hint='hide them with CUDA_VISIBLE_DEVICES="", or leave --device out',
        )
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
    if plugin is None:
        raise ConfigError(
            f"train.sharding = {settings.sharding}: this transformers does not shard by FSDP2",
            hint="install a newer transformers",
        )
    if str(getattr(args.optim, "value", args.optim)) not in OPTIMIZERS:
        raise ConfigError(
            f"train.optim = {args.optim} with train.sharding = fsdp2: its states are not divided "
            "as the weights are",
            hint=f"set train.optim to {' or '.join(OPTIMIZERS)}",
        )
    if args.bf16:
        # accelerate's own policy would round the loss and the sums of gradients too.
        plugin["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )


def is_sharded(args: TrainingArguments) -> bool:
    """Return True for the arguments of a sharded run."""
    return getattr(args, "fsdp_plugin_args", None) is not None


@contextmanager
def launcher_variables(sharded: bool, cpu_offload: bool = False) -> Iterator[None]:
    """Ask accelerate for sharding by its variables too, and restore the environment afterwards.

    It starts the processes' exchange with gloo for tensors of the CPU only if it finds them; and it
    sets them itself, which would shard the next run in this process.
    """
    before = {name: os.environ.get(name) for name in VARIABLES}
    if sharded:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ["FSDP_OFFLOAD_PARAMS"] = str(cpu_offload).lower()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def load_on_first(model: ModelRef, args: TrainingArguments, **options: Any) -> nn.Module:
    """Load a student in the first process, and build it without weights in the others.

    options: those of load_student. accelerate broadcasts the weights while it shards them. An error
    of the first process is raised in all of them.
    """
    loaded: list[nn.Module] = []

    def load() -> tuple[CheckedPaths, dict[str, Tensor], str]:
        student = load_student(model, **options)
        loaded.append(student)
        return paths_of(student), dict(student.named_buffers()), attention_of(inner_model(student))

    paths, buffers, attention = on_first(load)
    student = (
        loaded[0]
        if loaded
        else empty_student(
            model, paths, buffers, attention=attention, lora=options["lora"], seed=options["seed"]
        )
    )
    plugin: dict[str, Any] = args.fsdp_plugin_args or {}
    # accelerate raises for a name without a layer, such as that of a family's vision tower.
    named = set(getattr(inner_model(student), "_no_split_modules", None) or ())
    plugin["transformer_cls_names_to_wrap"] = sorted(
        named & {type(module).__name__ for module in student.modules()}
    )
    return student


class ShardCheck(TrainerCallback):
    """Check that the parameters of a student are shards, before the first update.

    Until then the buffers that it saves are hidden from accelerate, which would shard them.
    """

    def __init__(self, student: nn.Module) -> None:
        self._hidden = [
            (module._non_persistent_buffers_set, name)
            for module in student.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]
        for names, name in self._hidden:
            names.add(name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise ModelError if a parameter is whole."""
        for names, name in self._hidden:
            names.discard(name)
        parameters = dict(kwargs["model"].named_parameters())
        whole = [name for name, each in parameters.items() if not hasattr(each, "full_tensor")]
        if whole:
            raise ModelError(
                f"train.sharding = fsdp2 was not applied: {len(whole)} of {len(parameters)} "
                f"parameters, such as {whole[0]}, are whole in each process",
                hint="update accelerate and transformers, or leave --sharding out",
            )


class ShardingTrainer(Trainer):
    """A Trainer that shards where its arguments say so.

    The checkpoints of a sharded run fit any number of processes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if is_sharded(self.args):
            self.add_callback(ShardCheck(cast(nn.Module, self.model)))

    def create_accelerator_and_postprocess(self) -> None:
        """Build accelerate's Accelerator: one that shards, on CPUs too, if the arguments ask it."""
        with launcher_variables(is_sharded(self.args)):
            super().create_accelerator_and_postprocess()
        if is_sharded(self.args):
            _shard_on_cpu(self.accelerator, self.args)
            self.is_fsdp_enabled = True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.args):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        save_shards(Path(output_dir), cast(nn.Module, self.model), self.optimizer)
        if self.is_world_process_zero():
            torch.save(self.lr_scheduler.state_dict(), f"{output_dir}/{SCHEDULER}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._has_rows(resume_from_checkpoint):
            load_weights(Path(resume_from_checkpoint), cast(nn.Module, self.model))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._has_rows(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        load_optimizer(Path(checkpoint), cast(nn.Module, self.model), self.optimizer)
        state = torch.load(f"{checkpoint}/{SCHEDULER}", weights_only=True)
        self.lr_scheduler.load_state_dict(state)
        groups = self.optimizer.param_groups
        for group, rate in zip(groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _has_rows(self, checkpoint: str) -> bool:
        """Return True where one side is sharded: the checkpoint's run or this one."""
        return is_sharded(self.args) or has_shards(Path(checkpoint))


def _shard_on_cpu(accelerator: Any, args: TrainingArguments) -> None:
    """Make accelerate shard on CPUs: its state takes a plugin of FSDP for accelerators only.

    Without it accelerate 1.15 would train with DistributedDataParallel, and say nothing.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def whole_student(student: nn.Module, model: ModelRef, lora: Lora, seed: int) -> nn.Module | None:
    """Return a sharded student with whole weights on the CPU of the first process; None elsewhere.

    Every process calls this; the others hold one whole tensor at a time.
    """
    state: dict[str, Tensor] = {}
    found: dict[int, Tensor] = {}
    for name, tensor in student.state_dict(keep_vars=True).items():
        # A tied weight has several names.
        if id(tensor) not in found:
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            found[id(tensor)] = whole.detach().cpu() if rank() == 0 else torch.empty(0)
        state[name] = found[id(tensor)]
    if rank() != 0:
        return None
    copy = empty_student(
        model,
        paths_of(student),
        dict(student.named_buffers()),
        attention=attention_of(inner_model(student)),
        lora=lora,
        seed=seed,
    )
    copy.load_state_dict(state, assign=True)
    inner_model(copy).tie_weights()
    return copy.eval()


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "y", "on", "t")
