"""KL of student and teacher over the whole vocabulary, from the logits of both models.

    kl/forward    KL(q || p) = sum_v q_v (log q_v - log p_v)    nats
    kl/reverse    KL(p || q) = sum_v p_v (log p_v - log q_v)    nats

p is the student, q the teacher. The metrics kl/forward_bound and kl/reverse_bound are their lower
bounds from stored scores.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from logitcask.engine.models.forward import folded_head, inner_model
from logitcask.engine.models.logit_transform import logit_transform_of
from logitcask.kernels.logit_transform import LogitTransform

CHUNK_LOGITS = 1 << 23
"""Logits of one model in memory at once: 64 MiB in float64, and some copies of it."""


class HeadRows(NamedTuple):
    """Inputs of a model's logits on P rows."""

    states: Tensor
    """[P, D] hidden states."""
    head: Tensor
    """[V, D]; V may be padded beyond n_vocab."""
    logit_transform: LogitTransform

    def log_probs(self, rows: slice, n_vocab: int) -> Tensor:
        """Return [R, n_vocab] float64 log-probs of some rows, from logits in float32."""
        logits = self.states[rows].float() @ self.head[:n_vocab].float().T
        return self.logit_transform.apply(logits).double().log_softmax(-1)


def head_rows(model: nn.Module, states: Tensor) -> HeadRows:
    """Return the inputs of the logits at hidden states [P, D] of a model."""
    config = inner_model(model).config
    return HeadRows(*folded_head(model, states), logit_transform_of(config))


def full_kl(student: HeadRows, teacher: HeadRows, n_vocab: int) -> dict[str, Tensor]:
    """Return name -> [P] float64, nats, of the two divergences; infinite where they are.

    Both models must have the same ids below n_vocab. Rows are taken in chunks of CHUNK_LOGITS.
    """
    chunk = max(1, CHUNK_LOGITS // n_vocab)
    forward, reverse = [], []
    for start in range(0, len(student.states), chunk):
        rows = slice(start, start + chunk)
        log_p, log_q = (each.log_probs(rows, n_vocab) for each in (student, teacher))
        forward.append(_kl(log_q, log_p))
        reverse.append(_kl(log_p, log_q))
    return {"kl/forward": torch.cat(forward), "kl/reverse": torch.cat(reverse)}


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return KL(a || b) [R]; an id without mass in a counts 0."""
    terms = log_a.exp() * (log_a - log_b)
    return terms.masked_fill_(log_a == -torch.inf, 0.0).sum(-1)
