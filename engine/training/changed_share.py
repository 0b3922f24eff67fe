"""Share of the trainable parameters that an update changed, from a strided sample.

Weights too coarse for the learning rate show here and nowhere else: the loss looks healthy.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitcask.engine.training.processes import gathered
from logitcask.engine.training.run_dir.shards import held
from logitcask.engine.training.sharding.zero3 import shape_of

CHANGED_SAMPLE = 1 << 20
"""Maximum number of elements that `train/changed_share` compares, over all shards."""


class ChangedShare(TrainerCallback):
    """Comparison of this process's parameters, or shards of them, around an update."""

    def __init__(self) -> None:
        self._before: list[Tensor] = []
        self._changed = torch.zeros((), dtype=torch.int64)
        self._compared = 0

    def share(self) -> float:
        """Return the share of the newest update over all processes; every process calls this."""
        counts = gathered((int(self._changed), self._compared))
        compared = sum(count for _, count in counts)
        return sum(changed for changed, _ in counts) / compared if compared else 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Not on_pre_optimizer_step: DeepSpeed has made its step by then.
        self._before = [part.clone() for part in _sample(kwargs["model"])]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        pairs = list(zip(self._before, _sample(kwargs["model"]), strict=True))
        counts = [(before != after).sum() for before, after in pairs]
        # The numbers stay on the device until a line is written.
        self._changed = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64)
        self._compared = sum(before.numel() for before, _ in pairs)
        self._before = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Every checkpoint has a line: a resumed run continues its sums.
        control.should_log = control.should_log or control.should_save


def _sample(model: nn.Module) -> list[Tensor]:
    """Return every n-th element of the trainable parameters, or of what this process holds."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    stride = -(-sum(shape_of(p).numel() for p in trainable) // CHANGED_SAMPLE)
    local = [held(p)[1].detach() for p in trainable]
    return [p.reshape(-1)[::stride] for p in local if p.numel()]
