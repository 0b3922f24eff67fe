"""Weights and moments in the checkpoint of a sharded run, readable by any number of processes.

OUT/checkpoints/checkpoint-N/
    shard-RANK.safetensors   what a process holds: `weight/NAME` of a parameter in training,
                             `STATE/NAME` of each state of the optimizer for it, and the first row
                             of each tensor in the header

A tensor is saved in rows by FSDP2. ZeRO-3 divides it flat: a row of the file is then an element.

Not torch.distributed.checkpoint: its index is a pickle, and reading one can run code.
"""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from logitcask.engine.errors import IntegrityError
from logitcask.engine.training.processes import rank
from logitcask.engine.training.run_dir.files import RESTORE
from logitcask.engine.training.sharding import zero3
from logitcask.engine.training.sharding.zero3 import WEIGHT

SHARDS, OPTIMIZER = "shard-*.safetensors", "optimizer.pt"
"""Files of a sharded run; the file of Trainer's in a run without shards."""
FIRST = "first_row"
"""Key of the header: name of a tensor -> its first row."""


def save_shards(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Write what this process holds of the trained parameters and of their optimizer states."""
    reshard(model)
    tensors: dict[str, Tensor] = {}
    first: dict[str, int] = {}
    for name, parameter in trained(model):
        for kind, (start, local) in _held_states(parameter, optimizer).items():
            if local.numel() if local.ndim else rank() == 0:
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
    with _opened(folder, model) as rows:
        for name, parameter in trained(model):
            start, local = held(parameter)
            local.copy_(rows.read(f"{WEIGHT}/{name}", start, local))
            if zero3.is_divided(parameter):
                zero3.written(parameter)


@torch.no_grad()
def load_optimizer(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Read the states of the optimizer of a checkpoint for what this process holds."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    with _opened(folder, model, optimizer) as rows:
        for name, parameter in trained(model):
            # The fused optimizers count their steps on the device.
            moved = any(groups.get(id(parameter), {}).get(each) for each in ("fused", "capturable"))
            for kind in rows.states(name):
                if zero3.is_divided(parameter):
                    zero3.add_state(parameter, kind, rows.scalar(f"{kind}/{name}"))
                    start, local = zero3.states(parameter)[kind]
                    if local.ndim:
                        local.copy_(rows.read(f"{kind}/{name}", start, local))
                    continue
                state = _state(rows, f"{kind}/{name}", parameter)
                optimizer.state[parameter][kind] = state.to(parameter.device) if moved else state


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of the parameters that are trained, a tied one once."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def held(tensor: Tensor) -> tuple[int, Tensor]:
    """Return (first row, rows) that this process holds of a tensor; of ZeRO-3 elements [E]."""
    if zero3.is_divided(tensor):
        return zero3.states(tensor)[WEIGHT]
    local: Tensor | None = getattr(tensor, "_local_tensor", None)
    if local is not None:
        # FSDP2 divides rows as torch.chunk does.
        size = -(-tensor.shape[0] // tensor.device_mesh.size())  # type: ignore[attr-defined]
        return min(size * rank(), tensor.shape[0]), local
    return 0, tensor


def _held_states(parameter: nn.Parameter, optimizer: Any) -> dict[str, tuple[int, Tensor]]:
    """Return kind -> (first row, rows) of a parameter and of its states in the optimizer."""
    if zero3.is_divided(parameter):
        return zero3.states(parameter)
    states = {WEIGHT: parameter.detach(), **optimizer.state.get(parameter, {})}
    return {kind: held(tensor) for kind, tensor in states.items()}


def _state(rows: "_Rows", key: str, parameter: nn.Parameter) -> Tensor:
    """Return a state of the optimizer, divided as its parameter is; a scalar on the CPU."""
    if (scalar := rows.scalar(key)) is not None:
        return scalar
    part = rows.read(key, *held(parameter)).to(parameter.device)
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


class _Rows:
    """Tensors of a checkpoint, each in parts of consecutive rows that are read when needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: dict[str, list[tuple[int, Any]]] = {}
        self._kinds: dict[str, list[str]] = {}

    def add(self, key: str, first: int, part: Any) -> None:
        """Add a part that begins at row `first`: a tensor, or a slice of a safetensors file."""
        if key not in self._parts:
            kind, _, name = key.partition("/")
            self._kinds.setdefault(name, []).append(kind)
        self._parts.setdefault(key, []).append((first, part))

    def states(self, name: str) -> list[str]:
        """Return the states of the optimizer for a parameter."""
        return [kind for kind in self._kinds.get(name, []) if kind != WEIGHT]

    def scalar(self, key: str) -> Tensor | None:
        """Return a tensor []; None for a tensor of rows."""
        part = self._parts[key][0][1]
        return None if _shape(part) else torch.as_tensor(part[...])

    def read(self, key: str, start: int, like: Tensor) -> Tensor:
        """Return rows start .. start + len(like) - 1 of a tensor, in the shape of `like`."""
        found = torch.empty(like.shape, dtype=like.dtype)
        width = math.prod(like.shape[1:])
        start, end, count = start * width, start * width + like.numel(), 0
        for first, part in self._parts.get(key, []):
            # In elements: the rows of a part may be wider, or elements themselves.
            wide = math.prod(_shape(part)[1:])
            a, b = max(start, first * wide), min(end, (first + _shape(part)[0]) * wide)
            if a < b:
                row = a // wide - first
                rows = part[row : -(-b // wide) - first].reshape(-1)
                skipped = a - (first + row) * wide
                found.view(-1)[a - start : b - start] = rows[skipped : skipped + b - a]
                count += b - a
        if count != like.numel():
            cause = f"it holds {count // width} of {len(like)} rows of {key}"
            raise damaged(self._folder, cause)
        return found


def _shape(part: Any) -> list[int]:
    return list(part.shape if isinstance(part, Tensor) else part.get_shape())


def damaged(folder: Path, cause: str) -> IntegrityError:
    return IntegrityError(f"{folder} is damaged: {cause}", hint=RESTORE)


@contextmanager
def _opened(folder: Path, model: nn.Module, optimizer: Any = None) -> Iterator[_Rows]:
    """Open a checkpoint, also one of a run without shards: its model, or its optimizer if given."""
    rows = _Rows(folder)
    with ExitStack() as stack:
        if has_shards(folder):
            _add_shards(rows, folder, stack)
        elif optimizer is None:
            # peft leaves the name of the adapter out.
            names = {name.replace(".default.", "."): name for name, _ in trained(model)}
            for path in sorted(folder.glob("*.safetensors")):
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                for key in names.keys() & set(file.keys()):
                    rows.add(f"{WEIGHT}/{names[key]}", 0, file.get_slice(key))
        else:
            saved = torch.load(folder / OPTIMIZER, "cpu", weights_only=True, mmap=True)
            own = {id(parameter): name for name, parameter in trained(model)}
            order = [own[id(p)] for p in zero3.in_order(optimizer)]
            theirs = [index for group in saved["param_groups"] for index in group["params"]]
            for name, index in zip(order, theirs, strict=True):
                for kind, tensor in saved["state"][index].items():
                    rows.add(f"{kind}/{name}", 0, tensor)
        yield rows


def _add_shards(rows: _Rows, folder: Path, stack: ExitStack) -> None:
    for path in sorted(folder.glob(SHARDS)):
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            for key, first in json.loads(file.metadata()[FIRST]).items():
                rows.add(key, int(first), file.get_slice(key))
        except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
            raise damaged(folder, f"{path.name}: {error}") from error
