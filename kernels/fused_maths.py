"""The small maths of an objective on one row, inside a Triton program: loss, gradient, overlap.

The support S* is a mask over the S listed ids. With g_v = dL / d log p_v on it, and a tail bucket
r = 1 - sum_S* p with g_r = dL / d log r:

    renormalised   dL/dz_v = g_v - p~_v sum g                on S*, 0 elsewhere
    tail           dL/dz_v = g_v - (sum g + g_r) p_v         on S*
                           = (g_r / r - sum g - g_r) p_v     elsewhere

g in closed form, m the mixture of a divergence with parameter, b its share of the teacher:

    reverse_kl   KL(p || q)                         p (log p - log q + 1)
    forward_kl   KL(q || p)                         -q
    jsd          b KL(q || m) + (1 - b) KL(p || m)  (1 - b) p (log p - log m)
    skew         KL(q || m)                         -q (1 - b) p / m

p is the student, q the teacher, m = b q + (1 - b) p. jsd: GKD, arXiv 2306.13649. skew: DistiLLM,
arXiv 2402.03898, whose KL(p, a p + (1 - a) q_theta) has p for the teacher; the order is the same.
"""

import triton
import triton.language as tl

from logitcask.kernels.logit_transform import LN2, softcapped

TAIL_FLOOR = tl.constexpr(2.0**-18)
"""Least r that a tail is given: float32's spacing between 32 and 64, so about the error of
1 - sum p. Below it the loss sees log r no further down, on S* the gradient stays as it is, and the
pull on the ids outside is weaker than the true one."""

BEYOND = tl.constexpr(1 << 30)
"""The place of an id that is not in the live top-k."""


@triton.jit
def log_total(x, on):  # type: ignore[no-untyped-def]
    # log sum exp(x) over `on`; -inf where nothing is on.
    top = tl.max(tl.where(on, x, -float("inf")), 0)
    top = tl.where(top > -float("inf"), top, 0.0)
    return top + tl.log(tl.sum(tl.where(on, tl.exp(x - top), 0.0), 0))


@triton.jit
def log_add(a, b):  # type: ignore[no-untyped-def]
    # log(exp(a) + exp(b)), also where both are too small for a float; -inf where both are.
    top = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    top = tl.where(top == -float("inf"), 0.0, top)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))


@triton.jit  # type: ignore[untyped-decorator]
def compared(log_p, log_q, on, log_b, log_1b, DIVERGENCE: tl.constexpr):  # type: ignore[no-untyped-def]
    # The terms of the loss, and its derivative by log p; both 0 where not on. log_b and log_1b are
    # logs of the mixture's shares of the teacher and of the student.
    lp = tl.where(on, log_p, 0.0)
    lq = tl.where(on, log_q, 0.0)
    p = tl.exp(lp)
    q = tl.exp(lq)
    if DIVERGENCE == "reverse_kl":
        term = p * (lp - lq)
        g = term + p
    elif DIVERGENCE == "forward_kl":
        term = q * (lq - lp)
        g = -q
    else:
        of_q = lq + log_b
        of_p = lp + log_1b
        lm = log_add(of_q, of_p)
        if DIVERGENCE == "jsd":
            g = tl.exp(of_p) * (lp - lm)
            term = tl.exp(of_q) * (lq - lm) + g
        else:
            term = q * (lq - lm)
            g = -q * tl.exp(of_p - lm)
    return tl.where(on, term, 0.0), tl.where(on, g, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def renormalised_loss(log_p, log_q, on, log_b, log_1b, DIVERGENCE: tl.constexpr):  # type: ignore[no-untyped-def]
    # Loss, derivative by log p.
    lp = log_p - log_total(log_p, on)
    lq = log_q - log_total(log_q, on)
    term, g = compared(lp, lq, on, log_b, log_1b, DIVERGENCE)
    chained = g - tl.exp(lp) * tl.sum(g, 0)
    return tl.sum(term, 0), tl.where(on, chained, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def tail_loss(log_p, log_q, log_tail, on, left, log_b, log_1b, DIVERGENCE: tl.constexpr):  # type: ignore[no-untyped-def]
    # Loss, derivative by log p, and the coefficients of p_v on the support and elsewhere. The
    # teacher's bucket holds log_tail and what it gives to the ids in `left`.
    r = 1.0 - tl.sum(tl.where(on, tl.exp(log_p), 0.0), 0)
    r = tl.maximum(r, TAIL_FLOOR, propagate_nan=tl.PropagateNan.ALL)
    log_q_tail = log_add(log_tail, log_total(log_q, left))
    # The bucket is left out where the teacher has no mass outside the support at all.
    has_tail = log_q_tail != -float("inf")
    # Stored log-probs are rounded, so their mass with the tail is 1 to some 1e-4; divide by it.
    log_all = log_add(log_total(log_q, on), log_q_tail)
    term, g = compared(log_p, log_q - log_all, on, log_b, log_1b, DIVERGENCE)
    term_r, g_r = compared(tl.log(r), log_q_tail - log_all, has_tail, log_b, log_1b, DIVERGENCE)
    inside = -(tl.sum(g, 0) + g_r)
    return tl.sum(term, 0) + term_r, g, inside, g_r / r + inside


@triton.jit
def overlap_advantage(log_p, log_q, on):  # type: ignore[no-untyped-def]
    # (1 / |I|) sum_I p-(v) [log q-(v) - log p-(v)], renormalised on I = `on`; 0 where it is empty.
    # Rethinking On-Policy Distillation, arXiv 2604.13016, Eq.7.
    lp = log_p - log_total(log_p, on)
    lq = log_q - log_total(log_q, on)
    total = tl.sum(tl.where(on, tl.exp(lp) * (lq - lp), 0.0), 0)
    return total / tl.maximum(tl.sum(on.to(tl.int32), 0), 1).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def objective_row(  # type: ignore[no-untyped-def]
    logits,  # [V], one row
    row,  # its number among P rows
    n_rows,  # P
    lse,
    x_k,  # [K], select_row's three
    id_k,
    rank,
    ids,  # [P, n_ids] int64
    log_q,  # [P, n_ids] float32
    log_tail,  # [P] float32
    listed_on,  # [P, n_ids] uint8
    known,  # [P, n_ids] uint8
    q_rank,  # [P, n_ids] int64
    kept,  # [P] int64
    row_weight,  # [P] float32
    top_log_p,  # [P, k] float32, written, as all below
    top_ids,  # [P, k] int64
    log_p_at,  # [P, n_ids] float32
    loss,  # [P] float32, not weighted
    at_ids,  # [P, n_ids] float32: RowGrad's
    dense,  # [P]
    dense_at_ids,  # [P, n_ids]
    final_at_ids,  # [P, n_ids]: row_grad's, weighted
    final_dense,  # [P]
    sums,  # [7, P]: OverlapSums
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
    SLOTS: tl.constexpr,  # n_ids, rounded up to a power of two
    DIVERGENCE: tl.constexpr,
    TAIL: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    # Returns final_dense of the row.
    y_k = softcapped(x_k, inner) * (outer * LN2) if SOFTCAP else x_k * slope
    lp_k = y_k - lse
    is_top = rank < k
    tl.store(top_log_p + row * k + rank, lp_k, mask=is_top)
    tl.store(top_ids + row * k + rank, id_k.to(tl.int64), mask=is_top)

    slot = tl.arange(0, SLOTS)
    here = slot < n_ids
    at = row * n_ids + slot
    v = tl.load(ids + at, mask=here, other=-1)
    x = tl.load(logits + v, mask=(v >= 0) & (v < n_vocab), other=-float("inf")).to(tl.float32)
    if SOFTCAP:
        t = softcapped(x, inner)
        lp = t * (outer * LN2) - lse
        slope_at = (1.0 - t * t) * slope
    else:
        lp = x * slope - lse
        slope_at = tl.full((SLOTS,), 1.0, tl.float32) * slope
    lp = tl.where(v >= 0, lp, -float("inf"))
    lq = tl.load(log_q + at, mask=here, other=-float("inf"))
    is_known = tl.load(known + at, mask=here, other=0) != 0

    same = (v.to(tl.int32)[:, None] == id_k[None, :]) & is_top[None, :]  # [SLOTS, K]
    place = tl.min(tl.where(same, rank[None, :], BEYOND), 1)
    top_known = tl.max((same & is_known[:, None]).to(tl.int32), 0)

    # An id that either side excludes leaves the support; NaN stays.
    both_have = (lp != -float("inf")) & (lq != -float("inf"))
    on = (tl.load(listed_on + at, mask=here, other=0) != 0) & both_have
    on = on & ((place < live_k) | (live_k == 0))
    if TAIL:
        left = is_known & (on == 0)
        row_loss, g, inside, outside = tail_loss(
            lp, lq, tl.load(log_tail + row), on, left, log_b, log_1b, DIVERGENCE
        )
        coefficient = tl.where(on, inside, outside)
    else:
        row_loss, g = renormalised_loss(lp, lq, on, log_b, log_1b, DIVERGENCE)
        outside = 0.0
        coefficient = tl.zeros((SLOTS,), tl.float32)
    tl.store(loss + row, row_loss)
    tl.store(dense + row, outside)
    tl.store(log_p_at + at, lp, mask=here)
    tl.store(at_ids + at, g, mask=here)
    tl.store(dense_at_ids + at, coefficient, mask=here)
    w = tl.load(row_weight + row)  # a row of weight 0 adds exactly 0, whatever it holds
    final = w * (g + coefficient * tl.exp(lp)) * slope_at
    tl.store(final_at_ids + at, tl.where(w != 0.0, final, 0.0), mask=here)
    weighted = tl.where(w != 0.0, w * outside, 0.0)
    tl.store(final_dense + row, weighted)

    # S(p) and S(q) at k' = min(k, kept): the teacher's top-k is known for its kept entries only.
    k_seen = tl.minimum(metric_k, k)
    k_row = tl.minimum(tl.maximum(tl.load(kept + row).to(tl.int32), 1), k_seen)
    rank_q = tl.load(q_rank + at, mask=here, other=BEYOND)
    both = (place < k_row) & (rank_q < k_row)
    missed = (rank < k_seen) & (top_known == 0)
    tl.store(sums + row, tl.sum(both.to(tl.int32), 0).to(tl.float32))
    tl.store(sums + n_rows + row, k_row.to(tl.float32))
    tl.store(sums + 2 * n_rows + row, tl.sum(tl.where(both, tl.exp(lp), 0.0), 0))
    tl.store(sums + 3 * n_rows + row, tl.sum(tl.where(both, tl.exp(lq), 0.0), 0))
    tl.store(sums + 4 * n_rows + row, overlap_advantage(lp, lq, both & both_have))
    tl.store(sums + 5 * n_rows + row, tl.sum(tl.where(is_known, tl.exp(lp), 0.0), 0))
    tl.store(sums + 6 * n_rows + row, tl.sum(tl.where(missed, tl.exp(lp_k), 0.0), 0))
    return weighted
