"""The moving average of a student's weights, from model folders to a model folder.

average(n) = decay x average(n - 1) + (1 - decay) x student(n), n = 0, 1, ... the refreshes, and
average(0) = student(0): the form of TRL's SDFT and SDPO (trl.experimental.sdft.teacher_sync, once
every teacher_sync_steps), where 1 - decay is teacher_update_rate. The average is of the weights
that a folder holds, so with LoRA of merged ones; TRL averages the two factors of an adapter, from 0
on.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from logitcask.engine.errors import IntegrityError
from logitcask.engine.models.identity import METADATA_FILE
from logitcask.engine.models.weight_files import WEIGHTS, weight_files

PT = {"format": "pt"}
"""Metadata that transformers writes to weight files, and expects."""


def write_average(before: Path | None, student: Path, folder: Path, decay: float) -> None:
    """Write the model folder of the average after a refresh, without metadata.

    before: folder of the average before it; None = there is none, and the average is the student.
    All three are float32, and one file of them at a time is in memory. Raises IntegrityError where
    `before` holds other tensors than `student`.
    """
    for file in student.iterdir():
        if file.is_file() and file.name != METADATA_FILE and not file.match(WEIGHTS):
            shutil.copyfile(file, folder / file.name)
    for file in weight_files(student):
        tensors = load_file(file)
        if before is not None:
            _average_into(tensors, before / file.name, decay)
        save_file(tensors, folder / file.name, metadata=PT)


def _average_into(tensors: dict[str, torch.Tensor], before: Path, decay: float) -> None:
    try:
        with safe_open(before, framework="pt", device="cpu") as earlier:
            for name, tensor in tensors.items():
                old = earlier.get_tensor(name)
                if (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
                    raise ValueError(f"{name} has another shape or type")
                # What is no number, such as a mask, has no average.
                if tensor.is_floating_point():
                    tensors[name] = old.mul_(decay).add_(tensor, alpha=1.0 - decay)
    except (OSError, SafetensorError, ValueError) as error:
        raise IntegrityError(
            f"{before} is no earlier average of this student: {error}",
            hint="restore it from a copy, or start the loop again in a new folder",
        ) from error
