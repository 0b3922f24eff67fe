"""The launches of a FusedObjective: row_stats, topk_select with the objective's loss, row_grad."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitcask.kernels.fused_maths import (
    cut_loss,
    overlap_advantage,
    renormalized_loss,
    tail_loss,
)
from logitcask.kernels.fused_objective import WITH_PARAMETER, FusedObjective, OverlapSums
from logitcask.kernels.launch import compile_options, next_power_of_2, on_device
from logitcask.kernels.logit_transform import LN2, LogitTransform, softcapped
from logitcask.kernels.objective_input import ObjectiveGrad, ObjectiveInput
from logitcask.kernels.row_grad import grad_rows
from logitcask.kernels.row_stats import scan_rows
from logitcask.kernels.topk_select import COMPARED, group_size, select_arguments, select_row

NOT_IN_TOPK = tl.constexpr(1 << 30)
"""Rank of an id that is not in the student's live top-k."""


@triton.jit  # type: ignore[untyped-decorator]
def objective_kernel(  # type: ignore[no-untyped-def]
    logits,  # [P, V], row stride `stride`
    log_sum_exp,  # [P] float32
    group_max,  # [P, n_slots] float32
    kept_group,  # [P, K] int32 scratch
    kept_place,  # [P, K] int32 scratch
    kept_key,  # [P, K] int32 scratch
    ids,  # [P, n_ids] int64
    log_q,  # [P, n_ids] float32
    log_tail,  # [P] float32
    fixed_mask,  # [P, n_ids] uint8
    known,  # [P, n_ids] uint8
    q_rank,  # [P, n_ids] int64
    n_kept,  # [P] int64
    row_weight,  # [P] float32
    top_log_p,  # [P, k] float32, written, as all below
    top_ids,  # [P, k] int64
    log_p_at,  # [P, n_ids] float32
    loss,  # [P] float32, not weighted
    at_ids,  # [P, n_ids] float32: ObjectiveGrad's
    dense,  # [P]
    dense_at_ids,  # [P, n_ids]
    final_at_ids,  # [P, n_ids]: row_grad's, weighted
    final_dense,  # [P]
    sums,  # [7, P]: OverlapSums
    stride,
    n_vocab,
    n_groups,
    n_slots,
    n_ids,
    k,
    live_k,
    metric_k,
    inner,
    outer,
    slope,
    log_b,
    log_1b,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    SLOTS: tl.constexpr,  # n_ids, rounded up to a power of two
    DIVERGENCE: tl.constexpr,
    TAIL: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    # One program per row.
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    logits += row * stride
    lse = tl.load(log_sum_exp + row)
    x_k, id_k, rank = select_row(
        logits,
        group_max + row * n_slots,
        kept_group + row * K,
        kept_place + row * K,
        kept_key + row * K,
        n_vocab,
        n_groups,
        n_slots,
        K,
        GROUPS,
        GROUP,
        ZERO_BITS,
    )
    y_k = softcapped(x_k, inner) * (outer * LN2) if SOFTCAP else x_k * slope
    lp_k = y_k - lse
    is_top = rank < k
    tl.store(top_log_p + row * k + rank, lp_k, mask=is_top)
    tl.store(top_ids + row * k + rank, id_k.to(tl.int64), mask=is_top)

    slot = tl.arange(0, SLOTS)
    valid = slot < n_ids
    at = row * n_ids + slot
    v = tl.load(ids + at, mask=valid, other=-1)
    x = tl.load(logits + v, mask=(v >= 0) & (v < n_vocab), other=-float("inf")).to(tl.float32)
    if SOFTCAP:
        t = softcapped(x, inner)
        lp = t * (outer * LN2) - lse
        slope_at = (1.0 - t * t) * slope
    else:
        lp = x * slope - lse
        slope_at = tl.full((SLOTS,), 1.0, tl.float32) * slope
    lp = tl.where(v >= 0, lp, -float("inf"))
    lq = tl.load(log_q + at, mask=valid, other=-float("inf"))
    is_known = tl.load(known + at, mask=valid, other=0) != 0

    # Against the top-k in order of rank, a few at a time.
    metric_k = tl.minimum(metric_k, k)
    topk_index = tl.full((SLOTS,), NOT_IN_TOPK, tl.int32)
    uncached = 0.0
    step: tl.constexpr = K if K < COMPARED else COMPARED
    tl.debug_barrier()
    for start in range(0, K, step):
        r = start + tl.arange(0, step)
        id_r = tl.load(top_ids + row * k + r, mask=r < k, other=-2).to(tl.int32)
        lp_r = tl.load(top_log_p + row * k + r, mask=r < k, other=-float("inf"))
        same = v.to(tl.int32)[:, None] == id_r[None, :]  # [SLOTS, step]
        topk_index = tl.minimum(topk_index, tl.min(tl.where(same, r[None, :], NOT_IN_TOPK), 1))
        is_cached = tl.max((same & is_known[:, None]).to(tl.int32), 0)
        uncached += tl.sum(tl.where((r < metric_k) & (is_cached == 0), tl.exp(lp_r), 0.0), 0)

    # An id that either side excludes leaves the support; NaN stays.
    both_have = (lp != -float("inf")) & (lq != -float("inf"))
    mask = (tl.load(fixed_mask + at, mask=valid, other=0) != 0) & both_have
    mask = mask & ((topk_index < live_k) | (live_k == 0))
    if TAIL == "bucket":
        left = is_known & (mask == 0)
        row_loss, g, inside, outside = tail_loss(
            lp, lq, tl.load(log_tail + row), mask, left, log_b, log_1b, DIVERGENCE
        )
        coefficient = tl.where(mask, inside, outside)
    elif TAIL == "zero" or TAIL == "ignore":
        row_loss, g, outside = cut_loss(lp, lq, mask, log_b, log_1b, DIVERGENCE, TAIL == "zero")
        coefficient = tl.zeros((SLOTS,), tl.float32) + outside
    else:
        row_loss, g = renormalized_loss(lp, lq, mask, log_b, log_1b, DIVERGENCE)
        outside = 0.0
        coefficient = tl.zeros((SLOTS,), tl.float32)
    tl.store(loss + row, row_loss)
    tl.store(dense + row, outside)
    tl.store(log_p_at + at, lp, mask=valid)
    tl.store(at_ids + at, g, mask=valid)
    tl.store(dense_at_ids + at, coefficient, mask=valid)
    w = tl.load(row_weight + row)  # a row of weight 0 adds exactly 0, whatever it holds
    final = w * (g + coefficient * tl.exp(lp)) * slope_at
    tl.store(final_at_ids + at, tl.where(w != 0.0, final, 0.0), mask=valid)
    tl.store(final_dense + row, tl.where(w != 0.0, w * outside, 0.0))

    # S(p) and S(q) at k' = min(k, n_kept): only the kept part of the teacher's top-k is known.
    k_row = tl.minimum(tl.maximum(tl.load(n_kept + row).to(tl.int32), 1), metric_k)
    rank_q = tl.load(q_rank + at, mask=valid, other=NOT_IN_TOPK)
    both = (topk_index < k_row) & (rank_q < k_row)
    tl.store(sums + row, tl.sum(both.to(tl.int32), 0).to(tl.float32))
    tl.store(sums + n_rows + row, k_row.to(tl.float32))
    tl.store(sums + 2 * n_rows + row, tl.sum(tl.where(both, tl.exp(lp), 0.0), 0))
    tl.store(sums + 3 * n_rows + row, tl.sum(tl.where(both, tl.exp(lq), 0.0), 0))
    tl.store(sums + 4 * n_rows + row, overlap_advantage(lp, lq, both & both_have))
    tl.store(sums + 5 * n_rows + row, tl.sum(tl.where(is_known, tl.exp(lp), 0.0), 0))
    tl.store(sums + 6 * n_rows + row, uncached)


def fused_rows(
    objective: FusedObjective,
    logits: Tensor,
    ids: Tensor,
    weight: Tensor,
    k: int,
    out: Tensor | None,
    n_vocab: int,
    logit_transform: LogitTransform,
    first: int,
) -> ObjectiveGrad:
    """Evaluate `objective` on logits [C, V] at ids [C, S], rows `first` and on, without checks.

    The gradient, weighted by weight [C], goes to `out` [C, V], which may be logits.
    """
    n_rows, n_ids = ids.shape
    ids, weight = ids.contiguous(), weight.float().contiguous()
    group = group_size(logits, k, n_vocab)
    (lse, entropy), group_max = scan_rows(logits, n_vocab, group, logit_transform)
    assert group_max is not None
    log_p, at_ids, dense_at_ids, final_at_ids = (lse.new_empty(n_rows, n_ids) for _ in range(4))
    loss, dense, final_dense = lse.new_empty(3, n_rows)
    top_log_p = lse.new_empty(n_rows, k)
    top_ids = lse.new_empty(n_rows, k, dtype=torch.int64)
    sums = lse.new_empty(len(OverlapSums._fields), n_rows)
    inner, outer = logit_transform.factors()
    selection = select_arguments(logits, group_max, k, n_vocab, group)
    padded = next_power_of_2(n_ids)
    if n_rows:
        with on_device(logits):
            objective_kernel[(n_rows,)](
                logits,
                lse,
                ids=ids,
                **selection,
                **_objective_arguments(objective),
                row_weight=weight,
                top_log_p=top_log_p,
                top_ids=top_ids,
                log_p_at=log_p,
                loss=loss,
                at_ids=at_ids,
                dense=dense,
                dense_at_ids=dense_at_ids,
                final_at_ids=final_at_ids,
                final_dense=final_dense,
                sums=sums,
                n_ids=n_ids,
                inner=inner,
                outer=outer,
                slope=logit_transform.slope_at_0,
                SLOTS=padded,
                SOFTCAP=logit_transform.softcap is not None,
                **compile_options("objective_kernel", logits, selection["K"], padded),
            )
    if out is not None:
        grad_rows(logits, lse, final_dense, ids, final_at_ids, out, n_vocab, logit_transform)
    index = torch.arange(first, first + n_rows, device=logits.device)
    view = ObjectiveInput(index, log_p, top_ids, top_log_p, entropy)
    metrics = objective.name_metrics(view, OverlapSums(*sums.unbind(0)))
    return ObjectiveGrad(loss, at_ids, dense, dense_at_ids, metrics)


def _objective_arguments(objective: FusedObjective) -> dict[str, Any]:
    """Return the kernel's arguments that describe the objective."""
    mixed = objective.divergence in WITH_PARAMETER
    return {
        "log_q": objective.log_q.float().contiguous(),
        "log_tail": objective.log_tail.float().contiguous(),
        "fixed_mask": objective.mask.contiguous().view(torch.uint8),
        "known": objective.known.contiguous().view(torch.uint8),
        "q_rank": objective.q_rank.contiguous(),
        "n_kept": objective.n_kept.contiguous(),
        "live_k": objective.live_k,
        "metric_k": objective.metric_k,
        "log_b": math.log(objective.parameter) if mixed else 0.0,
        "log_1b": math.log1p(-objective.parameter) if mixed else 0.0,
        "DIVERGENCE": objective.divergence,
        "TAIL": objective.tail,
    }
