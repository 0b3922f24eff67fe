"""Exchange of values between the processes of a run."""

from typing import Any

import torch


def gathered(value: Any) -> list[Any]:
    """Return `value` of every process, by rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
