"""Loss, gradient and overlap sums of an objective on one row, inside a Triton program.

The support S* is a mask over the S listed ids. With g_v = dL / d log p_v on it, and a tail bucket
r = 1 - sum_S* p with g_r = dL / d log r:

    renormalize    dL/dz_v = g_v - p~_v sum g                on S*, 0 elsewhere
    bucket         dL/dz_v = g_v - (sum g + g_r) p_v         on S*
                           = (g_r / r - sum g - g_r) p_v     elsewhere
    zero, ignore   dL/dz_v = g_v - p_v sum g                 on S*
                           = -p_v sum g                      elsewhere

zero renormalizes q on S*, and the student's mass elsewhere costs c; ignore takes q as it is.

g in closed form, b the parameter of a divergence:

    reverse_kl    KL(p || q)                            p (log p - log q + 1)
    forward_kl    KL(q || p)                            -q
    jsd           b KL(q || m) + (1 - b) KL(p || m)     (1 - b) p (log p - log m)
    skew          KL(q || m)                            -q (1 - b) p / m
    skew_reverse  KL(p || n)                            p (log p - log n + (1 - b) q / n)
    alpha         (b q + (1 - b) p - a) / (b (1 - b))   (p - a) / b
    mixed_kl      b KL(q || p) + (1 - b) KL(p || q)     (1 - b) p (log p - log q + 1) - b q

    m = b q + (1 - b) p,   n = b p + (1 - b) q,   a = q^b p^(1 - b)
    c = 0 for forward_kl and skew, -(1 - b) log(1 - b) for jsd, -log b for skew_reverse, 1 / b for
    alpha, infinite for the others

p is the student, q the teacher. jsd: GKD, arXiv 2306.13649. skew, skew_reverse: DistiLLM, arXiv
2402.03898, where p is the teacher and q_theta the student. alpha: Amari's. mixed_kl: NeMo-RL's.
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
    # the logs of b and 1 - b.
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
    elif DIVERGENCE == "mixed_kl":
        b = tl.exp(log_b)
        of_p = tl.exp(lp + log_1b)
        term = (b * q - of_p) * (lq - lp)
        g = of_p * (lp - lq + 1.0) - b * q
    elif DIVERGENCE == "alpha":
        b = tl.exp(log_b)
        power = tl.exp(b * lq + tl.exp(log_1b) * lp)
        term = (b * q + tl.exp(lp + log_1b) - power) * tl.exp(-log_b - log_1b)
        g = (p - power) / b
    elif DIVERGENCE == "skew_reverse":
        of_q = lq + log_1b
        ln = log_add(of_q, lp + log_b)
        term = p * (lp - ln)
        g = term + p * tl.exp(of_q - ln)
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


@triton.jit  # type: ignore[untyped-decorator]
def cut_loss(log_p, log_q, mask, log_b, log_1b, DIVERGENCE: tl.constexpr, ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    # Loss, derivative by log p, and the coefficient of p_v everywhere, of tails zero and ignore.
    lq = log_q
    if ZERO:
        lq = log_q - masked_logsumexp(log_q, mask)
    term, g = divergence_terms(log_p, lq, mask, log_b, log_1b, DIVERGENCE)
    loss = tl.sum(term, 0)
    if ZERO:
        cost = 0.0
        if DIVERGENCE == "jsd":
            cost = -tl.exp(log_1b) * log_1b
        elif DIVERGENCE == "skew_reverse":
            cost = -log_b
        elif DIVERGENCE == "alpha":
            cost = tl.exp(-log_b)
        p = tl.where(mask, tl.exp(log_p), 0.0)
        some = tl.max(mask.to(tl.int32), 0) > 0  # without any id there is no teacher
        loss += tl.where(some, cost * (1.0 - tl.sum(p, 0)), 0.0)
        g -= cost * p
    return loss, g, -tl.sum(g, 0)


@triton.jit
def overlap_advantage(log_p, log_q, mask):  # type: ignore[no-untyped-def]
    # (1 / |I|) sum_I p~_v (log q~_v - log p~_v), renormalized on I = `mask`; 0 if it is empty.
    # Rethinking On-Policy Distillation, arXiv 2604.13016, Eq.7.
    lp = log_p - masked_logsumexp(log_p, mask)
    lq = log_q - masked_logsumexp(log_q, mask)
    total = tl.sum(tl.where(mask, tl.exp(lp) * (lq - lp), 0.0), 0)
    return total / tl.maximum(tl.sum(mask.to(tl.int32), 0), 1).to(tl.float32)
