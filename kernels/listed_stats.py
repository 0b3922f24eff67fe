"""All that a scorer needs of rows of logits: top-k, log-sum-exp, entropy, log mass outside a list.

A GPU reads the logits once, by group_stats. A CPU selects the top-k first and then knows every
listed id, so that one more pass gives the rest, with one exponential a logit. With the shift m, the
maximum of the logits that are not listed, and y_v = z_v - m, that pass sums

    d = sum exp(y_v),   s = sum y_v exp(y_v),   v not listed

of which log d + m is the log mass outside the list. To them the listed ids are added, at the shift
M, the maximum of the row: with w = exp(m - M) and x_i = z_i - M

    D = w d + sum exp(x_i),   S = w (s + (m - M) d) + sum x_i exp(x_i)

    log-sum-exp = M + log D,   entropy = log D - S / D

All terms have one sign, so nothing cancels: a mass outside of 1e-30 is as exact as one of 1/2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.kernels.group_stats import FLOOR, group_stats
from logitcask.kernels.launch import (
    check_k,
    check_logits,
    compute_dtype,
    row_chunks,
    runs_triton,
)
from logitcask.kernels.row_stats import RowStats, row_stats_reference
from logitcask.kernels.topk_select import topk_select, topk_select_reference

CPU_CHUNK = 1 << 17
"""Logits per torch chunk on a CPU: with two copies they stay in a core's own cache."""

LEAST = -87.0
"""Least y: exp(y) is nothing next to a sum with a term of 1, and still a normal number, which takes
a CPU a twentieth of the time of one that is not."""


class ListedStats(NamedTuple):
    """Numbers of P rows; float32, or float64 for float64 logits."""

    values: Tensor
    """[P, k] the k largest logits, best first."""
    top_ids: Tensor
    """[P, k] their ids; among equal logits the lowest first."""
    log_sum_exp: Tensor
    """[P] nats."""
    entropy: Tensor
    """[P] nats."""
    log_outside: Tensor
    """[P] log of the sum of exp(z) over all ids that are neither listed nor among the k; -inf
    without such a mass."""


def listed_stats_reference(logits: Tensor, k: int, row: Tensor, ids: Tensor) -> ListedStats:
    """Return listed_stats in whole-tensor torch, which leaves the logits: its specification."""
    values, top_ids = topk_select_reference(logits, k)
    outside = logits.to(values.dtype).scatter(1, top_ids, -torch.inf)
    outside[row, ids] = -torch.inf
    stats = row_stats_reference(logits)
    return ListedStats(values, top_ids, *stats, outside.logsumexp(1))


def listed_stats(logits: Tensor, k: int, row: Tensor, ids: Tensor) -> ListedStats:
    """Return the top-k of the logits [P, V], and the statistics of all and of the other ids.

    logits: as in row_stats; overwritten by -inf at the top-k and the listed ids.
    row, ids: [A] int64 more ids, and their rows; repetitions count once.

    A row with a NaN or +inf logit, or of -inf alone, has statistics of NaN. Not differentiable.

    Raises ValueError or TypeError for a shape, layout, dtype or k that does not fit.
    """
    check_k(k, check_logits(logits, None))
    with torch.no_grad():
        if runs_triton(logits):
            return _by_groups(logits, k, row, ids)
        values, top_ids = topk_select(logits, k)
        logits.scatter_(1, top_ids, -torch.inf)
        others, share = _take(logits, row, ids)
        top, mass, moment = _sums(logits)
        log_outside = top + mass.log()
        highest = torch.maximum(top, values[:, 0])  # no other listed logit is higher
        gap = (top - highest).clamp_(min=FLOOR)
        w = gap.exp()
        mass, moment = w * mass, w * (moment + gap * mass)
        x = (values - highest[:, None]).clamp_(min=LEAST)
        e = x.exp()
        mass += e.sum(1)
        moment += x.mul_(e).sum(1)
        x = (others - highest[row]).clamp_(min=LEAST)
        e = x.exp().mul_(share)
        mass.index_add_(0, row, e)
        moment.index_add_(0, row, x.mul_(e))
        log_d = mass.log()
        stats = RowStats(highest + log_d, log_d - moment / mass)
        return ListedStats(values, top_ids, *stats, log_outside)


def _by_groups(logits: Tensor, k: int, row: Tensor, ids: Tensor) -> ListedStats:
    groups = group_stats(logits, k)
    values, top_ids = groups.topk(logits, k)
    of_top = torch.arange(len(logits), device=logits.device).repeat_interleave(k)
    listed = torch.cat([of_top, row]), torch.cat([top_ids.flatten(), ids])
    return ListedStats(
        values, top_ids, *groups.row_stats(), groups.log_mass_outside(logits, *listed)
    )


def _take(logits: Tensor, row: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits [A] at the ids, and 1 over the number of times that each is in the list.

    Writes -inf there.
    """
    dtype = compute_dtype(logits.dtype)
    if not len(row):
        return logits.new_empty(0, dtype=dtype), logits.new_empty(0, dtype=dtype)
    stride = logits.stride(0)
    # One index instead of two: twice as fast.
    flat = logits.as_strided(((len(logits) - 1) * stride + logits.shape[1],), (1,))
    at = row * stride + ids
    found = flat.index_select(0, at).to(dtype)
    counts = flat.index_fill_(0, at, 0.0).index_add_(0, at, flat.new_ones(len(at)))
    share = counts.index_select(0, at).to(dtype).reciprocal_()
    flat.index_fill_(0, at, -torch.inf)
    return found, share


def _sums(logits: Tensor) -> Tensor:
    """Return [3, P] maximum, sum of exp(y) and of y exp(y) of the rows; y is the logit less it."""
    n_rows, n_vocab = logits.shape
    dtype = compute_dtype(logits.dtype)
    found = logits.new_empty(3, n_rows, dtype=dtype)
    chunk = max(1, min(n_rows, CPU_CHUNK // n_vocab))
    copies = logits.new_empty(2, chunk, n_vocab, dtype=dtype)
    least = found.new_tensor(LEAST)
    for rows in row_chunks(n_rows, chunk):
        top, mass, moment = found[:, rows]
        y, e = copies[:, : len(top)]
        torch.amax(y.copy_(logits[rows]), 1, out=top)
        y.sub_(top.clamp(min=torch.finfo(dtype).min)[:, None])  # finite, where all are -inf
        torch.exp(torch.maximum(y, least, out=y), out=e)
        torch.sum(e, 1, out=mass)
        torch.sum(y.mul_(e), 1, out=moment)
    return found
