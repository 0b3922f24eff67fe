"""Loss, gradient and overlap sums of an objective on one row, inside a Triton program.

The support S* is a mask over the S listed ids. With g_v = dL / d log p_v on it, and a tail bucket
r = 1 - sum_S* p with g_r = dL / d log r:

    renormalize    dL/dz_v = g_v - p~_v sum g                on S*, 0 elsewhere
    bucket         dL/dz_v = g_v - (sum g + g_r) p_v         on S*
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

TAIL_FLOOR = tl.constexpr(2.0**-18)
"""Least r of a tail: float32's spacing between 32 and 64, about the error of 1 - sum p. Below it
the loss uses this r, the gradient on S* stays exact, and the gradient elsewhere is too small."""


@triton.jit
def masked_logsumexp(x, mask):  # type: ignore[no-untyped-def]
    # log sum exp(x) over `mask`; -inf for an empty mask.
    top = tl.max(tl.where(mask, x, -float("inf")), 0)
    top = tl.where(top > -float("inf"), top, 0.0)
    return top + tl.log(tl.sum(tl.where(mask, tl.exp(x - top), 0.0), 0))


@triton.jit
def log_add(a, b):  # type: ignore[no-untyped-def]
    # log(exp(a) + exp(b)), also where both are too small for a float; -inf where both are.
    top = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    top = tl.where(top == -float("inf"), 0.0, top)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))


@triton.jit  # type: ignore[untyped-decorator]
def divergence_terms(log_p, log_q, mask, log_b, log_1b, DIVERGENCE: tl.constexpr):  # type: ignore[no-untyped-def]
    # Terms of the loss and their derivatives by log p, both 0 outside `mask`. log_b and log_1b are
    # logs of the mixture's shares of the teacher and of the student.
    lp = tl.where(mask, log_p, 0.0)
    lq = tl.where(mask, log_q, 0.0)
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
    return tl.where(mask, term, 0.0), tl.where(mask, g, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def renormalized_loss(log_p, log_q, mask, log_b, log_1b, DIVERGENCE: tl.constexpr):  # type: ignore[no-untyped-def]
    # Loss, derivative by log p.
    lp = log_p - masked_logsumexp(log_p, mask)
    lq = log_q - masked_logsumexp(log_q, mask)
    term, g = divergence_terms(lp, lq, mask, log_b, log_1b, DIVERGENCE)
    chained = g - tl.exp(lp) * tl.sum(g, 0)
    return tl.sum(term, 0), tl.where(mask, chained, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def tail_loss(log_p, log_q, log_tail, mask, left, log_b, log_1b, DIVERGENCE: tl.constexpr):  # type: ignore[no-untyped-def]
    # Loss, derivative by log p, and the coefficients of p_v on the support and elsewhere. The
    # teacher's bucket is log_tail and its mass at the ids in `left`.
    r = 1.0 - tl.sum(tl.where(mask, tl.exp(log_p), 0.0), 0)
    r = tl.maximum(r, TAIL_FLOOR, propagate_nan=tl.PropagateNan.ALL)
    log_q_tail = log_add(log_tail, masked_logsumexp(log_q, left))
    # The bucket is left out where the teacher has no mass outside the support at all.
    has_tail = log_q_tail != -float("inf")
    # Stored log-probs are rounded, so their mass with the tail is 1 to some 1e-4; divide by it.
    log_all = log_add(masked_logsumexp(log_q, mask), log_q_tail)
    term, g = divergence_terms(log_p, log_q - log_all, mask, log_b, log_1b, DIVERGENCE)
    term_r, g_r = divergence_terms(
        tl.log(r), log_q_tail - log_all, has_tail, log_b, log_1b, DIVERGENCE
    )
    inside = -(tl.sum(g, 0) + g_r)
    return tl.sum(term, 0) + term_r, g, inside, g_r / r + inside


@triton.jit
def overlap_advantage(log_p, log_q, mask):  # type: ignore[no-untyped-def]
    # (1 / |I|) sum_I p~_v (log q~_v - log p~_v), renormalized on I = `mask`; 0 if it is empty.
    # Rethinking On-Policy Distillation, arXiv 2604.13016, Eq.7.
    lp = log_p - masked_logsumexp(log_p, mask)
    lq = log_q - masked_logsumexp(log_q, mask)
    total = tl.sum(tl.where(mask, tl.exp(lp) * (lq - lp), 0.0), 0)
    return total / tl.maximum(tl.sum(mask.to(tl.int32), 0), 1).to(tl.float32)
