"""Weights and moments in the checkpoint of a sharded run, readable by any number of processes.

OUT/checkpoints/checkpoint-N/
    shard-RANK.safetensors   the rows that a process holds: `weight/NAME` of a parameter in
                             training, `STATE/NAME` of each state of the optimizer for it, and the
                             first row of each tensor in the header

Not torch.distributed.checkpoint: its index is a pickle, and reading one can run code.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from logitcask.engine.errors import IntegrityError
from logitcask.engine.training.processes import rank
from logitcask.engine.training.run_dir.files import RESTORE

SHARDS = "shard-*.safetensors"
WEIGHT = "weight"
FIRST = "first_row"
"""Key of the header: name of a tensor -> its first row."""


def save_shards(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Write what this process holds of the trained parameters and of their optimizer states."""
    reshard(model)
    tensors: dict[str, Tensor] = {}
    first: dict[str, int] = {}
    for name, parameter in trained(model):
        states = {WEIGHT: parameter.detach(), **optimizer.state.get(parameter, {})}
        for kind, tensor in states.items():
            start, local = _held(tensor)
            if local.numel():
                tensors[f"{kind}/{name}"] = local.cpu().contiguous()
                first[f"{kind}/{name}"] = start
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        tensors, folder / f"shard-{rank():05d}.safetensors", metadata={FIRST: json.dumps(first)}
    )


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward without a backward has left gathered.

    While they are, the model has whole parameters, which its optimizer does not know.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def has_shards(folder: Path) -> bool:
    return any(folder.glob(SHARDS))


@torch.no_grad()
def load_weights(folder: Path, model: nn.Module) -> None:
    """Read the trained parameters of a checkpoint, whole or what this process holds of them."""
    with _Shards(folder) as shards:
        for name, parameter in trained(model):
            start, local = _held(parameter)
            local.copy_(shards.rows(f"{WEIGHT}/{name}", start, local))


@torch.no_grad()
def load_optimizer(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Read the states of the optimizer of a checkpoint for what this process holds."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    with _Shards(folder) as shards:
        for name, parameter in trained(model):
            # The fused optimizers count their steps on the device.
            moved = any(groups[id(parameter)].get(each) for each in ("fused", "capturable"))
            for kind in shards.states(name):
                state = _state(shards, f"{kind}/{name}", parameter)
                optimizer.state[parameter][kind] = state.to(parameter.device) if moved else state


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of the parameters that are trained, a tied one once."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _held(tensor: Tensor) -> tuple[int, Tensor]:
    """Return (first row, rows) that this process holds of a tensor; the first one holds scalars."""
    local: Tensor | None = getattr(tensor, "_local_tensor", None)
    if local is not None:
        # FSDP2 divides rows as torch.chunk does.
        size = -(-tensor.shape[0] // tensor.device_mesh.size())  # type: ignore[attr-defined]
        return min(size * rank(), tensor.shape[0]), local
    return 0, tensor if rank() == 0 or tensor.ndim else tensor.new_empty(0)


def _state(shards: "_Shards", key: str, parameter: nn.Parameter) -> Tensor:
    """Return a state of the optimizer, divided as its parameter is; a scalar on the CPU."""
    if (scalar := shards.scalar(key)) is not None:
        return scalar
    part = shards.rows(key, *_held(parameter)).to(parameter.device)
    if not hasattr(parameter, "_local_tensor"):
        return part
    from torch.distributed.tensor import DTensor

    whole: Any = parameter
    return DTensor.from_local(
        part,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


class _Shards:
    """The files of a sharded checkpoint, opened for slices of their tensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._parts: dict[str, list[tuple[int, Any]]] = {}
        self._kinds: dict[str, list[str]] = {}

    def __enter__(self) -> "_Shards":
        try:
            for path in sorted(self._folder.glob(SHARDS)):
                file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                for key, first in json.loads(file.metadata()[FIRST]).items():
                    self._parts.setdefault(key, []).append((int(first), file))
        except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
            self._stack.close()
            raise self._damaged(f"{path.name}: {error}") from error
        for key in self._parts:
            kind, _, name = key.partition("/")
            self._kinds.setdefault(name, []).append(kind)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def states(self, name: str) -> list[str]:
        """Return the states of the optimizer for a parameter."""
        return [kind for kind in self._kinds.get(name, []) if kind != WEIGHT]

    def scalar(self, key: str) -> Tensor | None:
        """Return a tensor [] of the first process; None for a tensor of rows."""
        tensor: Tensor = self._parts[key][0][1].get_slice(key)[...]
        return None if tensor.ndim else tensor

    def rows(self, key: str, start: int, like: Tensor) -> Tensor:
        """Return rows start .. start + len(like) - 1 of a tensor, in the shape of `like`."""
        found = torch.empty(like.shape, dtype=like.dtype)
        end, count = start + len(like), 0
        for first, file in self._parts.get(key, []):
            part = file.get_slice(key)
            a, b = max(start, first), min(end, first + part.get_shape()[0])
            if a < b:
                found[a - start : b - start] = part[a - first : b - first]
                count += b - a
        if count != len(like):
            raise self._damaged(f"it holds {count} of {len(like)} rows of {key}")
        return found

    def _damaged(self, cause: str) -> IntegrityError:
        return IntegrityError(f"{self._folder} is damaged: {cause}", hint=RESTORE)
