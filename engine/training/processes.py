"""Exchange of values between the processes of a run."""

import os
import shlex
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def gathered(value: Any) -> list[Any]:
    """Return `value` of every process, by rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def on_first(run: Callable[[], T]) -> T:
    """Return run() of the first process in all; an error there is raised in all of them."""
    if not torch.distributed.is_initialized():
        return run()
    outcome: tuple[T | None, Exception | None] = (None, None)
    if rank() == 0:
        try:
            outcome = (run(), None)
        # The others wait for the outcome: without it they would wait for ever.
        except Exception as error:
            outcome = (None, error)
    value, failure = gathered(outcome)[0]
    if failure is not None:
        raise outcome[1] or failure
    result: T = value
    return result


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def command_line() -> str:
    """Return the command of this process; of one of several that of torchrun."""
    words = [word for word in sys.orig_argv[1:] if word != "-u"]
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) < 2:
        return shlex.join([sys.orig_argv[0], *words])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes)))
    launch = ["torchrun", "--nnodes", str(processes // local), "--nproc-per-node", str(local)]
    return shlex.join([*launch, *words])
