"""A loss with gradients that its forward pass computed.

Backward hands them over, times the incoming gradient, in the memory that they are in: nothing of
their size is made a second time, and where that gradient is 1, as it is when the loss itself is
what backward is called on, they are not even read. So they can be given once.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitcask.kernels.launch import TILE, on_device, runs_triton

PROGRAMS = 2048
"""At most, each with many tiles: where there is nothing to do, that is all it costs."""


@triton.jit  # type: ignore[untyped-decorator]
def scale_kernel(  # type: ignore[no-untyped-def]
    x,  # [n_elements], in place
    by,  # [] float32
    n_elements,
    TILE: tl.constexpr,
):
    # To ask on the host whether the factor is 1 would make it wait for the GPU.
    factor = tl.load(by)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * TILE
        start = tl.program_id(0).to(tl.int64) * TILE
        while start < n_elements:
            o = start + tl.arange(0, TILE)
            value = tl.load(x + o, mask=o < n_elements, other=0.0).to(tl.float32) * factor
            tl.store(x + o, value.to(x.dtype.element_ty), mask=o < n_elements)
            start += step


def scale_(x: Tensor, by: Tensor) -> Tensor:
    """Multiply contiguous x by `by` [] in place."""
    if not runs_triton(x):
        return x if bool(by == 1) else x.mul_(by)
    n_tiles = -(-x.numel() // TILE)
    if n_tiles:
        with on_device(x):
            scale_kernel[(min(n_tiles, PROGRAMS),)](
                x, by.float(), x.numel(), TILE=TILE, num_warps=8
            )
    return x


class _PrecomputedGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: Sequence[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise ValueError(
                "backward runs a second time through a loss whose gradient was made in its forward "
                "pass and has been handed over; compute the loss again, or add losses up before "
                "one backward"
            )
        grads, ctx.grads = ctx.grads, None
        return (None, None, *(g if g is None else scale_(g, grad_out) for g in grads))


def attach_grads(loss: Tensor, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    """Attach gradients of `inputs` to `loss` []. They must be contiguous and not shared; None where
    an input needs none. Backward through it a second time raises ValueError.
    """
    attached: Tensor = _PrecomputedGrad.apply(loss, grads, *inputs)  # type: ignore[no-untyped-call]
    return attached
