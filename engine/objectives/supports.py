"""Supports: the ids of a row that a loss compares, and the log-probs on them.

A support is a mask over the columns of Targets. p is the student, q the teacher; S(p) and S(q) are
their top-k.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.engine.packing.targets import Targets
from logitcask.kernels.objective_input import ObjectiveGrad

Support = Callable[[Tensor, Targets, int], Tensor]
"""(topk_index [C, S] of the columns in the current student's top ids, rows, k) -> [C, S] bool."""


def teacher(topk_index: Tensor, rows: Targets, k: int) -> Tensor:
    """Return S(q). It is fixed: no update of the student changes it."""
    return rows.q_rank < k


def student(topk_index: Tensor, rows: Targets, k: int) -> Tensor:
    """Return S(p) of the behaviour policy, frozen at its version. Its ids are the first columns."""
    column = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    return rows.in_student & (column < k)


def overlap(topk_index: Tensor, rows: Targets, k: int) -> Tensor:
    """Return S(p) & S(q) of the current student: all of its ids have a score."""
    return teacher(topk_index, rows, k) & (topk_index < k)


def union(topk_index: Tensor, rows: Targets, k: int) -> Tensor:
    """Return the scored ids of S(p) | S(q) of the current student: see cache/uncached_mass."""
    return rows.cached & (teacher(topk_index, rows, k) | (topk_index < k))


def non_overlap(topk_index: Tensor, rows: Targets, k: int) -> Tensor:
    """Return the scored ids that are in one of S(p) and S(q) alone, of the current student."""
    return rows.cached & (teacher(topk_index, rows, k) ^ (topk_index < k))


def sampled(topk_index: Tensor, rows: Targets, k: int) -> Tensor:
    """Return the sampled token alone; k is 1."""
    column = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    return column == rows.token_col[:, None]


def mc(topk_index: Tensor, rows: Targets, k: int) -> Tensor:
    """Return the ids that the behaviour policy drew in addition to its token; k is 1."""
    return rows.require("mc_count") > 0


def teacher_mc(topk_index: Tensor, rows: Targets, k: int) -> Tensor:
    """Return the ids that were drawn from the teacher; k is 1."""
    return rows.require("q_draws") > 0


SUPPORTS: dict[str, Support] = {
    "teacher": teacher,
    "student": student,
    "overlap": overlap,
    "union": union,
    "non_overlap": non_overlap,
    "sampled": sampled,
    "mc": mc,
    "teacher_mc": teacher_mc,
}
"""The supports of a row."""

SPANS = "spans"
"""The support of a loss over spans, which chooses among the columns for itself."""

CURRENT_SUPPORTS = frozenset({"overlap", "union", "non_overlap"})
"""Supports that depend on the top-k of the current student."""

SAMPLED_SUPPORTS = frozenset({"sampled", "mc", "teacher_mc"})
"""Supports that are draws, not a top-k."""


class LossTerms(NamedTuple):
    """Loss and gradient of C rows: an ObjectiveGrad without metrics."""

    loss: Tensor
    at_ids: Tensor
    dense: Tensor
    dense_at_ids: Tensor
    dense_log: Tensor | None = None

    @classmethod
    def of_log_p(cls, loss: Tensor, at_ids: Tensor) -> "LossTerms":
        """Return the terms of a loss [C] that depends on log p at S alone.

        at_ids: [C, S] its derivative by log p.
        """
        dense = -at_ids.sum(-1)
        return cls(loss, at_ids, dense, dense[:, None].expand_as(at_ids))

    def plus(self, other: "LossTerms", factor: Tensor) -> "LossTerms":
        """Add `factor` [C] times `other`."""
        by, dense_log = factor[:, None], self.dense_log
        if other.dense_log is not None:
            added = factor * other.dense_log
            dense_log = added if dense_log is None else dense_log + added
        return LossTerms(
            self.loss + factor * other.loss,
            self.at_ids + by * other.at_ids,
            self.dense + factor * other.dense,
            self.dense_at_ids + by * other.dense_at_ids,
            dense_log,
        )

    def with_metrics(self, metrics: dict[str, Tensor]) -> ObjectiveGrad:
        return ObjectiveGrad(**self._asdict(), metrics=metrics)


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportLogProbs:
    """Log-probs of C rows at S columns: the input of every loss."""

    log_p: Tensor
    """[C, S] of the current student."""
    log_q: Tensor
    """[C, S] of the target: the teacher's, or those that a modifier made from them."""
    mask: Tensor
    """[C, S] bool, the support; both log-probs are above -inf there."""
    log_q_tail: Tensor
    """[C], log of the teacher's mass outside the support."""
    topk_index: Tensor
    """[C, S] int64: index of each id in the current student's top-k, or NOT_IN_TOPK."""
    entropy: Tensor
    """[C] nats, of the current student; NaN if the kernel did not read the whole vocabulary."""
    rows: Targets
    """The same rows and columns."""
    support: str
    """Its name."""
    log_p_old: Tensor | None = None
    """[C, S] log p in a policy gradient's advantage, if not the current one: see modifiers.Clip."""

    def on(self, mask: Tensor) -> "SupportLogProbs":
        """Return the log-probs on another support; other scored ids are part of its tail."""
        return support_log_probs(self.rows, self.log_p, self.topk_index, self.entropy, mask)

    def behavior_log_p(self) -> Tensor:
        """Return [C, S] log-probs of the drawn ids under the distribution they were drawn from."""
        rows = self.rows
        if self.support == "mc":
            drawn = rows.require("mc_log_p")
        else:
            drawn = self._at_token(rows.behavior_logprobs)
        return drawn.to(self.log_p.dtype)

    def old_log_p(self) -> Tensor:
        """Return [C, S] log-probs of the behaviour policy at temperature 1.

        They are at the sampled token for support `sampled`, else at its stored top-k.
        """
        rows = self.rows
        if self.support == "sampled":
            stored = self._at_token(rows.student_logprobs)
        else:
            stored = rows.student_topk_logprobs
        return stored.to(self.log_p.dtype)

    def _at_token(self, per_row: Tensor) -> Tensor:
        column = torch.arange(self.log_p.shape[1], device=self.log_p.device)
        return torch.where(column == self.rows.token_col[:, None], per_row[:, None], -torch.inf)

    def with_target(self, log_q: Tensor, log_q_tail: Tensor | None = None) -> "SupportLogProbs":
        tail = self.log_q_tail if log_q_tail is None else log_q_tail
        return replace(self, log_q=log_q, log_q_tail=tail)


def support_log_probs(
    rows: Targets,
    log_p: Tensor,
    topk_index: Tensor,
    entropy: Tensor,
    mask: Tensor,
    support: str = "",
) -> SupportLogProbs:
    """Gather both models' log-probs of `rows` on the ids in `mask`.

    log_p: [C, S] of the current student; entropy: [C] of it. An id of log-prob -inf on either side
    leaves the support, because no finite update brings it closer; a tail bucket gets its mass.
    """
    log_q = rows.q_log_p.to(log_p.dtype)
    mask = mask & (log_p != -torch.inf) & (log_q != -torch.inf)
    left = torch.where(rows.cached & ~mask, log_q, -torch.inf)
    tail = rows.q_log_tail.to(log_p.dtype)[:, None]
    return SupportLogProbs(
        log_p=log_p,
        log_q=log_q,
        mask=mask,
        log_q_tail=torch.cat([tail, left], -1).logsumexp(-1),
        topk_index=topk_index,
        entropy=entropy,
        rows=rows,
        support=support,
    )
