"""ALM: the likelihoods of chunks as yes or no, compared by a binary divergence.

arXiv 2503.20083; tokenkit, training/losses.py, compute_alm_loss, diff functions `binary_ce` and
`binary_kl_temp_limit`. With l_q, l_p the log-probs of a span, Q = exp(l_q / tau), P = exp(l_p /
tau):

    tau [Q log(Q / P) + (1 - Q) log((1 - Q) / (1 - P))]      tau < inf
    (l_q - l_p) + l_q log(l_p / l_q)                         its limit for tau -> inf

The source's binary_ce is this without the factor tau, plus the entropy of Q, which no student
changes: one gradient, up to tau. With the factor both lines are one function of tau.

Left out: the log mass of tokens that begin with a space, which the source adds at the end of a
chunk on both sides (`append_space`), and chunks merged by a bias (`alm_unbiased`): both need the
vocabularies. Chunks are the finest common spans.
"""

import math

import torch
from torch import Tensor

from logitcask.engine.objectives.spans.log_probs import SpanLogProbs

LEAST = 1e-6
"""Log-probs are at most -LEAST nats, as in the source: 1 - Q is never 0."""


def alm(x: SpanLogProbs, _: int, tau: float) -> Tensor:
    """Return [G] the binary divergence of each span; tau in (0, inf]."""
    q, p = x.teacher.clamp(max=-LEAST), x.student.clamp(max=-LEAST)
    if tau == math.inf:
        return q - p + q * (torch.log(-p) - torch.log(-q))
    q, p = q / tau, p / tau
    no_q, no_p = torch.log(-torch.expm1(q)), torch.log(-torch.expm1(p))
    return tau * (q.exp() * (q - p) - torch.expm1(q) * (no_q - no_p))
