"""A transformers.Trainer of shards: FSDP2 by accelerate, ZeRO-3 by DeepSpeed.

They do the work; here is what they leave open: sharding on CPUs, a check that the parameters became
shards, and checkpoints without a pickle that fit any number of processes.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from logitcask.engine.errors import ModelError
from logitcask.engine.training.run_dir.shards import (
    has_shards,
    load_optimizer,
    load_weights,
    save_shards,
)
from logitcask.engine.training.sharding import zero3
from logitcask.engine.training.sharding.settings import (
    is_sharded,
    is_zero3,
    launcher_variables,
)

SCHEDULER = "scheduler.pt"
"""File of a checkpoint with the schedule of the learning rate."""


class ShardCheck(TrainerCallback):
    """Check that the parameters of a student are shards, and that updates are not skipped.

    Until the first update the buffers that it saves are hidden from accelerate, which would shard
    them.
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
        whole = [
            name
            for name, each in parameters.items()
            if not hasattr(each, "full_tensor") and not zero3.is_kept_divided(each)
        ]
        if whole:
            raise ModelError(
                f"train.sharding was not applied: {len(whole)} of {len(parameters)} parameters, "
                f"such as {whole[0]}, are whole in each process",
                hint="update accelerate and transformers, or leave --sharding out",
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise ModelError for a skipped update: DeepSpeed says nothing of it."""
        if kwargs["optimizer"].step_was_skipped:
            raise ModelError(
                f"update {state.global_step + 1}: the gradients are not finite",
                hint="lower --learning-rate; the checkpoints before this update are kept",
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        zero3.restore_linear()


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
        sharded, zero = is_sharded(self.args), is_zero3(self.args)
        with launcher_variables(sharded and not zero):
            super().create_accelerator_and_postprocess()
        if sharded:
            _shard_on_cpu(self.accelerator, self.args)
            self.is_fsdp_enabled, self.is_deepspeed_enabled = not zero, zero
        if zero:
            zero3.load_models_whole()
            # DeepSpeed counts micro-batches; a difference makes accelerate warn.
            self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        prepare: Any = super()._prepare_for_training
        if not is_zero3(self.args):
            return prepare(max_steps, train_dataloader, resume_from_checkpoint)
        # Trainer would look for a checkpoint of DeepSpeed's, which holds pickles.
        prepared = prepare(max_steps, train_dataloader, None)
        zero3.restore(cast(nn.Module, self.model), resumed=resume_from_checkpoint is not None)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model of a checkpoint, in which shards are saved with their optimizer."""
        if not is_zero3(self.args):
            super().save_model(output_dir, _internal_call)

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
    """Make accelerate shard on CPUs: its state takes a plugin for accelerators only.

    Without it accelerate 1.15 would train with DistributedDataParallel, and say nothing.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    if state.distributed_type != DistributedType.MULTI_CPU:
        return
    if is_zero3(args):
        state.deepspeed_plugins = args.deepspeed_plugin
        state.deepspeed_plugins.set_mixed_precision("bf16" if args.bf16 else "no")
        state.deepspeed_plugins.select(_from_accelerator_state=True)
        accelerator.native_amp = False  # DeepSpeed computes in the type of the weights
        state.distributed_type = DistributedType.DEEPSPEED
    else:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = state.distributed_type
