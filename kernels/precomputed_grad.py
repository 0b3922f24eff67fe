"""A loss whose gradients its forward pass computed.

The backward pass hands them over, times the incoming gradient, in their own memory: nothing of
their size is allocated again, and they are not even read where that gradient is 1, as in
`loss.backward()`. So they can be handed over once.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitcask.kernels.launch import TILE, compile_options, num_warps, on_device, runs_triton

PROGRAMS = 2048
"""Largest number of programs, each with many tiles: the whole cost if the factor is 1."""


@triton.jit  # type: ignore[untyped-decorator]
def scale_kernel(  # type: ignore[no-untyped-def]
    x,  # [n_elements], in place
    factor,  # [] float32
    n_elements,
    TILE: tl.constexpr,
):
    # A test for 1 on the host would make it wait for the GPU.
    by = tl.load(factor)
    if by != 1.0:
        step = tl.num_programs(0).to(tl.int64) * TILE
        start = tl.program_id(0).to(tl.int64) * TILE
        while start < n_elements:
            o = start + tl.arange(0, TILE)
            value = tl.load(x + o, mask=o < n_elements, other=0.0).to(tl.float32) * by
            tl.store(x + o, value.to(x.dtype.element_ty), mask=o < n_elements)
            start += step


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply contiguous x by `factor` [] in place."""
    if not runs_triton(x):
        return x if bool(factor == 1) else x.mul_(factor)
    n_tiles = -(-x.numel() // TILE)
    if n_tiles:
        with on_device(x):
            scale_kernel[(min(n_tiles, PROGRAMS),)](
                x,
                factor.float(),
                x.numel(),
                TILE=TILE,
                num_warps=num_warps(TILE),
                **compile_options("scale_kernel", x),
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
                "backward runs a second time through a loss whose gradients its first backward has "
                "handed over; compute the loss again, or add losses up before one backward"
            )
        grads, ctx.grads = ctx.grads, None
        return (None, None, *(g if g is None else scale_(g, grad_out) for g in grads))


def attach_grads(loss: Tensor, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    """Attach gradients of `inputs` to `loss` []; None for an input that needs none.

    They must be contiguous and not shared. A second backward raises ValueError.
    """
    attached: Tensor = _PrecomputedGrad.apply(loss, grads, *inputs)  # type: ignore[no-untyped-call]
    return attached
