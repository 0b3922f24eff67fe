"""The losses of the kernel benchmark, twice: in closed form for our kernels, and in plain torch.

p is the student, q the teacher, S the listed ids, r = 1 - sum_S p, q_t the teacher's mass outside
S, ~ renormalized. Made-up rows have no padding, so neither form masks any. Eager peers run the
plain form, and in float64 it is the reference of every gradient.

  forward_kl_tail   sum_S q log(q / p) + q_t log(q_t / r)             dz = (1 - q_t / r) p outside S
  reverse_kl        KL(p~ || q~) on S                                 dz = 0 outside S
  overlap           KL(p~ || q~) on S & the student's live top-k      dz = 0 outside S

Letters: C rows of a chunk, V vocabulary, K ids of the teacher, k live ids of the student.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveGrad, ObjectiveInput

SMALLEST_TAIL = 1e-7
"""Floor of r, which is a difference of float32 numbers near 1."""
OFF = -1e9
"""Replaces -inf at ids outside a row's support: the softmax of an empty support stays finite."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A teacher's cached scores of T rows."""

    ids: Tensor
    """[T, K] int64, best first."""
    log_q: Tensor
    """[T, K] float32, nats."""
    log_tail: Tensor
    """[T] float32: log of the mass outside ids."""

    def rows(self, rows: slice | Tensor) -> "Teacher":
        """Return some of the rows."""
        return Teacher(self.ids[rows], self.log_q[rows], self.log_tail[rows])

    def double(self) -> "Teacher":
        """Return the rows in float64."""
        return Teacher(self.ids, self.log_q.double(), self.log_tail.double())


def forward_kl_tail(teacher: Teacher) -> ObjectiveFn:
    """Return forward KL with a tail bucket."""

    def evaluate(view: ObjectiveInput) -> ObjectiveGrad:
        rows = teacher.rows(view.index)
        q, q_t = rows.log_q.exp(), rows.log_tail.exp()
        r = (1 - view.log_p.exp().sum(-1)).clamp(min=SMALLEST_TAIL)
        loss = (q * (rows.log_q - view.log_p)).sum(-1) + q_t * (rows.log_tail - r.log())
        # dz = p - q at the listed ids: the terms near 1/r have cancelled before they are rounded.
        return ObjectiveGrad(loss, -q, 1 - q_t / r, torch.ones_like(q), _metrics(view, rows))

    return evaluate


def reverse_kl(teacher: Teacher) -> ObjectiveFn:
    """Return reverse KL renormalized on the listed ids."""

    def evaluate(view: ObjectiveInput) -> ObjectiveGrad:
        rows = teacher.rows(view.index)
        loss, at_ids = _reverse_kl(view.log_p, rows.log_q)
        known = _metrics(view, rows) if view.top_ids.shape[1] else {}
        return ObjectiveGrad(loss, at_ids, torch.zeros_like(loss), torch.zeros_like(at_ids), known)

    return evaluate


def overlap(teacher: Teacher) -> ObjectiveFn:
    """Return reverse KL renormalized on the listed ids of the live top-k."""

    def evaluate(view: ObjectiveInput) -> ObjectiveGrad:
        rows = teacher.rows(view.index)
        off = ~_live(rows.ids, view.top_ids)
        loss, at_ids = _reverse_kl(
            view.log_p.masked_fill(off, OFF), rows.log_q.masked_fill(off, OFF)
        )
        at_ids = at_ids.masked_fill(off, 0.0)
        zeros = torch.zeros_like(at_ids)
        return ObjectiveGrad(loss, at_ids, torch.zeros_like(loss), zeros, _metrics(view, rows))

    return evaluate


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p~ || q~) [C] and its derivative by log p [C, K], p~ (log p~ - log q~ - KL)."""
    log_p = log_p.log_softmax(-1)
    p, ratio = log_p.exp(), log_p - log_q.log_softmax(-1)
    loss = (p * ratio).sum(-1)
    return loss, p * (ratio - loss[:, None])


def _metrics(view: ObjectiveInput, rows: Teacher) -> dict[str, Tensor]:
    return metrics(view.log_p, view.entropy, view.top_ids, rows)


def metrics(log_p: Tensor, entropy: Tensor, top_ids: Tensor, rows: Teacher) -> dict[str, Tensor]:
    """Return the metrics of C rows; log_p [C, K] at the teacher's ids, top_ids [C, k]."""
    live = _live(rows.ids, top_ids)
    return {
        "entropy": entropy,
        "overlap_ratio": live.sum(-1) / top_ids.shape[1],
        "mass_student": torch.where(live, log_p.exp(), 0.0).sum(-1),
        "mass_teacher": torch.where(live, rows.log_q.exp(), 0.0).sum(-1),
    }


def _live(ids: Tensor, top_ids: Tensor) -> Tensor:
    """Return [C, K] bool: whether a teacher's id is in the student's live top-k."""
    return (ids[:, :, None] == top_ids[:, None, :]).any(-1)


# The same in plain torch, for autograd.


def plain(name: str, logits: Tensor, rows: Teacher, k: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss [C] by log_softmax of logits [C, V], and metrics unless k = 0."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    log_p = z.log_softmax(-1)  # [C, V]
    at = log_p.gather(1, rows.ids)
    top_ids, found = rows.ids[:, :0], {}
    if k:
        with torch.no_grad():
            top_ids = _top_ids(log_p, k)
            found = metrics(at, -(log_p.exp() * log_p).sum(-1), top_ids, rows)
    return LOSSES[name].plain(at, rows, top_ids), found


def _top_ids(log_p: Tensor, k: int) -> Tensor:
    """Return the top-k ids [C, k].

    In float64, the reference, the lowest id of equals: half-precision logits tie all the time.
    """
    if log_p.dtype == torch.float64:
        return log_p.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return log_p.topk(k).indices


def _plain_forward_kl_tail(log_p: Tensor, rows: Teacher, top_ids: Tensor) -> Tensor:
    rest = (1 - log_p.exp().sum(-1)).clamp(min=SMALLEST_TAIL).log()
    listed = (rows.log_q.exp() * (rows.log_q - log_p)).sum(-1)
    return listed + rows.log_tail.exp() * (rows.log_tail - rest)


def plain_reverse_kl(log_p: Tensor, rows: Teacher, top_ids: Tensor) -> Tensor:
    """Return KL(p~ || q~) [C] on the listed ids."""
    log_p = log_p.log_softmax(-1)
    return (log_p.exp() * (log_p - rows.log_q.log_softmax(-1))).sum(-1)


def _plain_overlap(log_p: Tensor, rows: Teacher, top_ids: Tensor) -> Tensor:
    off = ~_live(rows.ids, top_ids)
    masked = Teacher(rows.ids, rows.log_q.masked_fill(off, OFF), rows.log_tail)
    return plain_reverse_kl(log_p.masked_fill(off, OFF), masked, top_ids)


class Loss(NamedTuple):
    """One loss in both forms."""

    closed: Callable[[Teacher], ObjectiveFn]
    plain: Callable[[Tensor, Teacher, Tensor], Tensor]
    """(log_p [C, K], teacher, top_ids [C, k]) -> [C]"""


LOSSES = {
    "forward_kl_tail": Loss(forward_kl_tail, _plain_forward_kl_tail),
    "reverse_kl": Loss(reverse_kl, plain_reverse_kl),
    "overlap": Loss(overlap, _plain_overlap),
}
