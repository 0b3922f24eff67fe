"""The launches of a FusedObjective: K1, K2 with the small maths at its end, K3; or all in one.

Three launches read a row twice and write it once, and so does the one. There the second read comes
soon after the first, by the same program, and may find the row in L2: bench/NOTES.md has the sizes.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitcask.kernels.fused_maths import objective_row
from logitcask.kernels.fused_objective import WITH_PARAMETER, FusedObjective, OverlapSums
from logitcask.kernels.launch import TILE, next_power_of_2, on_device
from logitcask.kernels.logit_transform import LogitTransform
from logitcask.kernels.objective_input import ObjectiveGrad, ObjectiveInput
from logitcask.kernels.row_grad import grad_row, grad_rows
from logitcask.kernels.row_stats import scan_row, scan_rows
from logitcask.kernels.topk_select import ZERO_BITS, group_size, select_row

WHOLE_WARPS = 8
"""Of the one program for a whole row. 16 would have 64 registers a thread, which spill."""


@triton.jit  # type: ignore[untyped-decorator]
def objective_kernel(  # type: ignore[no-untyped-def]
    logits,  # [P, V], row stride `stride`
    out,  # [P, V], row stride `out_stride`, may be logits itself; unused unless WHOLE
    log_sum_exp,  # [P] float32; read, or with WHOLE written
    entropy,  # [P] float32; written with WHOLE, else unused
    group_max,  # [P, n_slots] float32; likewise
    kept_group,  # [P, K] int32 scratch
    kept_value,  # [P, K] float32 scratch
    kept_id,  # [P, K] int32 scratch
    ids,  # as in objective_row, down to `sums`
    log_q,
    log_tail,
    listed_on,
    known,
    q_rank,
    kept,
    row_weight,
    top_log_p,
    top_ids,
    log_p_at,
    loss,
    at_ids,
    dense,
    dense_at_ids,
    final_at_ids,
    final_dense,
    sums,
    stride,
    out_stride,
    n_vocab,
    n_columns,
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
    SLOTS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TAIL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCAN_ROWS: tl.constexpr,  # with WHOLE: groups per step of the scan
    GRAD_TILE: tl.constexpr,  # and logits per step of the gradient; 0: it is not written
    WHOLE: tl.constexpr,
):
    # One program per row.
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    group_max += row * n_slots
    if WHOLE:
        lse, h = scan_row(
            logits, group_max, n_vocab, n_slots, inner, outer, SCAN_ROWS, GROUP, True, SOFTCAP
        )
        tl.store(log_sum_exp + row, lse)
        tl.store(entropy + row, h)
        tl.debug_barrier()  # the maxima were stored by other threads than read them
    else:
        lse = tl.load(log_sum_exp + row)
    x_k, id_k, rank = select_row(
        logits,
        group_max,
        kept_group + row * K,
        kept_value + row * K,
        kept_id + row * K,
        n_vocab,
        n_groups,
        K,
        GROUPS,
        GROUP,
        ZERO_BITS,
    )
    weighted = objective_row(
        logits,
        row,
        tl.num_programs(0),
        lse,
        x_k,
        id_k,
        rank,
        ids,
        log_q,
        log_tail,
        listed_on,
        known,
        q_rank,
        kept,
        row_weight,
        top_log_p,
        top_ids,
        log_p_at,
        loss,
        at_ids,
        dense,
        dense_at_ids,
        final_at_ids,
        final_dense,
        sums,
        n_ids,
        n_vocab,
        k,
        live_k,
        metric_k,
        inner,
        outer,
        slope,
        log_b,
        log_1b,
        SLOTS,
        DIVERGENCE,
        TAIL,
        SOFTCAP,
    )
    if GRAD_TILE > 0:
        tl.debug_barrier()  # all logits at listed ids are read before the gradient overwrites them
        grad_row(
            logits,
            out + row * out_stride,
            lse,
            weighted,
            0.0,  # no objective that the kernels know looks at the entropy
            ids + row * n_ids,
            final_at_ids + row * n_ids,
            n_vocab,
            n_columns,
            n_ids,
            inner,
            outer,
            slope,
            GRAD_TILE,
            SLOTS,
            SOFTCAP,
            False,
        )


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
    """Evaluate `objective` on logits [C, V] at ids [C, S], without checks. Its rows are these C,
    rows `first` and on of the call.

    The gradient, weighted by weight [C], goes to `out` [C, V], which may be logits.
    """
    n_rows, n_ids = ids.shape
    ids, weight = ids.contiguous(), weight.float().contiguous()
    log_p = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    at_ids, dense_at_ids, final_at_ids = (torch.empty_like(log_p) for _ in range(3))
    top_log_p = log_p.new_empty(n_rows, k)
    top_ids = torch.empty(n_rows, k, dtype=torch.int64, device=logits.device)
    loss, dense, final_dense = log_p.new_empty(3, n_rows)
    sums = log_p.new_empty(len(OverlapSums._fields), n_rows)
    group = group_size(logits, k, n_vocab)
    tile = min(TILE, max(next_power_of_2(n_vocab), group))
    n_groups = -(-n_vocab // group)
    k_padded = next_power_of_2(k)
    kept_value = log_p.new_empty(n_rows, k_padded)
    kept_group, kept_id = kept_value.to(torch.int32), kept_value.to(torch.int32)
    whole = objective.one_program
    if whole:
        lse, entropy = log_p.new_empty(2, n_rows)
        group_max = log_p.new_empty(n_rows, -(-n_vocab // (16 * group)) * 16)
    else:
        (lse, entropy), maxima = scan_rows(logits, n_vocab, group, logit_transform)
        assert maxima is not None
        group_max = maxima
    grad_tile = min(TILE, next_power_of_2(logits.shape[1])) if whole and out is not None else 0
    if n_rows:
        with on_device(logits):
            objective_kernel[(n_rows,)](
                logits,
                logits if out is None else out,
                lse,
                entropy,
                group_max,
                kept_group,
                kept_value,
                kept_id,
                ids,
                **_kernel_arguments(objective),
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
                stride=logits.stride(0),
                out_stride=0 if out is None else out.stride(0),
                n_vocab=n_vocab,
                n_columns=logits.shape[1],
                n_groups=n_groups,
                n_slots=group_max.shape[1],
                n_ids=n_ids,
                k=k,
                inner=logit_transform.factors()[0],
                outer=logit_transform.factors()[1],
                slope=logit_transform.slope_at_0,
                K=k_padded,
                GROUPS=max(next_power_of_2(n_groups), k_padded),
                GROUP=group,
                ZERO_BITS=ZERO_BITS[logits.dtype],
                SLOTS=next_power_of_2(n_ids),
                SOFTCAP=logit_transform.softcap is not None,
                SCAN_ROWS=tile // group,
                GRAD_TILE=grad_tile,
                WHOLE=whole,
                num_warps=WHOLE_WARPS if whole else 4 if k_padded <= 64 else 8,
                enable_fp_fusion=True,  # the default differs between versions of Triton
            )
    if out is not None and not whole:
        grad_rows(logits, lse, final_dense, ids, final_at_ids, out, n_vocab, logit_transform)
    index = torch.arange(first, first + n_rows, device=logits.device)
    view = ObjectiveInput(index, log_p, top_ids, top_log_p, entropy)
    metrics = objective.name_metrics(view, OverlapSums(*sums.unbind(0)))
    return ObjectiveGrad(loss, at_ids, dense, dense_at_ids, metrics)


def _kernel_arguments(objective: FusedObjective) -> dict[str, Any]:
    """Return the kernel's arguments of an objective."""
    mixed = objective.divergence in WITH_PARAMETER
    return {
        "log_q": objective.log_q.float().contiguous(),
        "log_tail": objective.log_tail.float().contiguous(),
        "listed_on": objective.on.contiguous().view(torch.uint8),
        "known": objective.known.contiguous().view(torch.uint8),
        "q_rank": objective.q_rank.contiguous(),
        "kept": objective.kept.contiguous(),
        "live_k": objective.live_k,
        "metric_k": objective.metric_k,
        "log_b": math.log(objective.parameter) if mixed else 0.0,
        "log_1b": math.log1p(-objective.parameter) if mixed else 0.0,
        "DIVERGENCE": objective.divergence,
        "TAIL": objective.outside == "tail",
    }
