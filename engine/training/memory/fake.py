"""A student without data, and a count of the tensors that it makes.

torch's FakeTensorMode computes shapes alone. What depends on data, or on a choice that a kernel
makes, is replaced: attention, and the loss.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from logitcask.engine.config.training import Lora
from logitcask.engine.models.adapters import wrap
from logitcask.engine.models.attention import HOST_EDGES, cuts_packs, use_packed
from logitcask.engine.models.forward import inner_model
from logitcask.engine.models.load import checkpoint_layers, set_mode
from logitcask.engine.training.memory.shapes import LossShape
from logitcask.kernels.linear_sparse_kl import default_chunk_rows

SDPA = "scaled_dot_product_attention"


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that exist, of those made since the start."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """Begin to count; `known` are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


class _Fused(torch.autograd.Function):
    """Attention as fused kernels keep it: inputs, output and one number per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        b, h, length, _ = query.shape
        out = query.new_empty(b, length, h, value.shape[3]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(b, h, length))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """Return the shape of sdpa, whose choice of a kernel shapes alone do not tell."""
    if (groups := query.shape[1] // key.shape[1]) > 1:  # sdpa repeats them too
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out: Tensor = _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out


class Loss(torch.autograd.Function):
    """The tensors of pack_loss: chunks of logits, gradients of states and head."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, n_vocab: int, loss: LossShape) -> Tensor:
        ctx.dense, ctx.head = loss.dense, (head.shape, head.dtype)
        ctx.needs = hidden.requires_grad, head.requires_grad
        cast = head.to(hidden.dtype)  # the same tensor in float32
        rows = len(hidden) if loss.dense else int(len(hidden) * loss.measured)
        if rows:
            chunk = min(rows, default_chunk_rows(n_vocab, hidden[:rows]))
            hidden.new_empty(chunk, -(-n_vocab // 16) * 16)
        del cast
        d_hidden = torch.empty_like(hidden)
        d_head = head.new_empty(head.shape) if loss.dense and head.requires_grad else None
        ctx.grads = d_hidden, d_head
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (d_hidden, d_head), ctx.grads = ctx.grads, None
        if not ctx.dense and ctx.needs[1]:
            d_head = d_hidden.new_empty(ctx.head[0], dtype=ctx.head[1])
        return d_hidden, d_head, None, None


def pack_edges(model: nn.Module, lengths: Iterable[int]) -> dict[str, Any]:
    """Return the arguments of a forward pass that name the lengths of a pack's sequences."""
    # Of numpy, because a tensor of this mode has no values.
    return {HOST_EDGES: np.cumsum([0, *lengths])} if cuts_packs(inner_model(model)) else {}


@contextmanager
def fake_student(path: Path, lora: Lora, checkpointing: bool) -> Iterator[nn.Module]:
    """Yield the student of a folder without data, in the mode of training."""
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    factory: Any = transformers.AutoModelForCausalLM
    functional: Any = F
    with torch.device("meta"):
        model = factory.from_config(config, dtype=torch.float32)
        use_packed(model)
        if lora.r:
            model = wrap(model, lora)
    with FakeTensorMode(), ExitStack() as stack:
        stack.callback(setattr, functional, SDPA, getattr(functional, SDPA))
        setattr(functional, SDPA, _fused)
        _on_cpu(model)
        if checkpointing:
            checkpoint_layers(model, dropout=False)
        set_mode(model, dropout=False)
        yield model


def _on_cpu(model: nn.Module) -> None:
    """Give parameters and buffers on the device meta, which has no autocast, the shape of a CPU's.

    Shared ones stay shared.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        slots: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in slots:
            for name, old in tensors.items():
                if old is None:
                    continue
                new = made.get(id(old))
                if new is None:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    made[id(old)] = new
                tensors[name] = new
