"""Statistics of every group of neighboring logits: one read, from which all scores follow.

With a group's maximum m as its own shift, y_v = z_v - m:

    d = sum exp(y_v),   s = sum y_v exp(y_v)

A row's statistics are sums over its groups, with the row's maximum M and w = exp(m - M), all of
whose terms have one sign, so that nothing cancels:

    D = sum w d,   S = sum w (s + (m - M) d),   log-sum-exp = M + log D,   entropy = log D - S / D

The top-k follow from the maxima (topk_select). The log mass outside listed ids follows too: groups
without a listed id keep their d, the few others are summed again without these ids. A difference
1 - (mass of the ids) would cancel; this is as exact at 1e-30 as at 1/2.

A NaN or +inf logit makes its row's statistics NaN, and so does a row of -inf alone. Single -inf
logits are legal.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitcask.kernels.launch import (
    TILE,
    check_k,
    check_logits,
    compile_options,
    compute_dtype,
    next_power_of_2,
    num_warps,
    on_device,
    runs_triton,
)
from logitcask.kernels.logit_transform import LOG2E
from logitcask.kernels.row_stats import RowStats
from logitcask.kernels.topk_select import group_size, read_groups, select_rows

FLOOR = -1e4
"""Least y: exp(y) = 0 and y exp(y) = 0, where -inf would give NaN."""


class GroupStats(NamedTuple):
    """Statistics of the groups of P rows; float32, or float64 for float64 logits."""

    width: int
    """Logits of a group; the last may have fewer."""
    top: Tensor
    """[P, N] maximum; -inf for groups past the last, where N exceeds their number."""
    mass: Tensor
    """[P, N] sum of exp(z - top), 0 for a group of -inf alone."""
    moment: Tensor
    """[P, N] sum of (z - top) exp(z - top)."""

    def row_stats(self) -> RowStats:
        """Return log-sum-exp and entropy of the rows."""
        top = self.top.amax(1, keepdim=True)
        gap = (self.top - top).clamp_(min=FLOOR)
        w = gap.exp()
        d = (w * self.mass).sum(1)
        s = (w * torch.addcmul(self.moment, gap, self.mass)).sum(1)
        log_d = d.log()
        return RowStats(top[:, 0] + log_d, log_d - s / d)

    def topk(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return topk_select of the logits [P, V] that these are the statistics of."""
        n_vocab = logits.shape[1]
        few = self.top.shape[1] < k  # the top k groups are all of them
        return select_rows(logits, None if few else self.top, k, n_vocab, self.width)

    def log_mass_outside(self, logits: Tensor, row: Tensor, ids: Tensor) -> Tensor:
        """Return [P] the log of the sum of exp(z) over the ids that are not listed.

        logits: [P, V], those of these statistics; overwritten by -inf at the listed ids.
        row, ids: [A] the listed ids and their rows; repetitions count once. -inf for a row with no
        mass outside.
        """
        logits[row, ids] = -torch.inf
        listed = torch.zeros_like(self.top, dtype=torch.bool)
        listed[row, ids // self.width] = True
        row, group = listed.nonzero().unbind(1)
        top, mass = self.top.clone(), self.mass.clone()
        if len(logits):
            z = read_groups(logits, row, group, self.width).to(top.dtype)
            best = z.amax(1)
            top[row, group] = best
            mass[row, group] = z.sub_(_shift(best)[:, None]).exp_().sum(1)
        best = top.amax(1, keepdim=True)
        w = top.sub_(_shift(best)).clamp_(min=FLOOR).exp_()
        return best[:, 0] + (w * mass).sum(1).log()


def _shift(top: Tensor) -> Tensor:
    """Return the shift of logits with these maxima: finite, where all are -inf."""
    return top.clamp(min=torch.finfo(top.dtype).min)


def group_stats_reference(logits: Tensor, width: int) -> GroupStats:
    """Return group_stats in whole-tensor torch: its specification."""
    z = logits.to(compute_dtype(logits.dtype))
    z = torch.nn.functional.pad(z, (0, -z.shape[1] % width), value=-torch.inf)
    z = z.view(len(z), z.shape[1] // width, width)
    top = z.amax(2)
    y = z - _shift(top)[..., None]
    moment = torch.where(y == -torch.inf, 0.0, y * y.exp())
    return GroupStats(width, top, y.exp().sum(2), moment.sum(2))


@triton.jit  # type: ignore[untyped-decorator]
def group_kernel(  # type: ignore[no-untyped-def]
    logits,  # [P, V], row stride `stride`
    top,  # [P, n_slots] float32, as the two below
    mass,
    moment,
    stride,
    n_vocab,
    n_slots,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    # One program per tile of ROWS groups of a row.
    row = tl.program_id(0).to(tl.int64)  # P * V passes 2^31 at a few thousand rows
    first = tl.program_id(1) * ROWS
    slots = first + tl.arange(0, ROWS)
    o = slots[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits += row * stride
    if (first + ROWS) * GROUP <= n_vocab:
        x = tl.load(logits + o).to(tl.float32)
    else:
        x = tl.load(logits + o, mask=o < n_vocab, other=-float("inf")).to(tl.float32)
    best = tl.max(x, 1)
    y = x - tl.where(best == -float("inf"), 0.0, best)[:, None]
    # Clamped, so that -inf adds exp2(-216) = 0 and 0 * -150 = 0; NaN goes through.
    y = tl.maximum(y, -150.0, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(y * LOG2E)
    at = row * n_slots + slots
    inside = slots < n_slots
    tl.store(top + at, best, mask=inside)
    tl.store(mass + at, tl.sum(e, 1), mask=inside)
    tl.store(moment + at, tl.sum(y * e, 1), mask=inside)


def scan_groups(logits: Tensor, width: int) -> GroupStats:
    """Compute group_stats of [P, V] logits without checks, for groups of `width` logits."""
    # A CPU scores by listed_stats, which needs no groups.
    return (_scan_triton if runs_triton(logits) else group_stats_reference)(logits, width)


def _scan_triton(logits: Tensor, width: int) -> GroupStats:
    n_rows, n_vocab = logits.shape
    n_groups = -(-n_vocab // width)
    tile = min(TILE, max(next_power_of_2(n_vocab), width))
    # Rows start on 64-byte lines, so that they are written and read in wide words. Groups past the
    # last have no mass.
    n_slots = -(-n_groups // 16) * 16
    found = torch.empty(3, n_rows, n_slots, device=logits.device)
    if n_rows:
        with on_device(logits):
            group_kernel[(n_rows, -(-n_slots * width // tile))](
                logits,
                *found,
                logits.stride(0),
                n_vocab,
                n_slots,
                ROWS=tile // width,
                GROUP=width,
                num_warps=num_warps(tile),
                **compile_options("group_kernel", logits),
            )
    return GroupStats(width, *found)


def group_stats(logits: Tensor, k: int) -> GroupStats:
    """Return the statistics of groups of neighboring logits [P, V], in one read of them.

    logits: as in row_stats. k: `GroupStats.topk` will select so many; groups have a width that
    suits it. Not differentiable.

    Raises ValueError or TypeError for a shape, layout, dtype or k that does not fit.
    """
    n_vocab = check_logits(logits, None)
    check_k(k, n_vocab)
    with torch.no_grad():
        return scan_groups(logits, group_size(logits, k, n_vocab) or 32)
