"""C rows as a loss sees them, whatever its form."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.engine.packing.targets import Targets
from logitcask.kernels.objective_input import ObjectiveGrad


class LossTerms(NamedTuple):
    """A RowGrad without metrics."""

    loss: Tensor
    at_ids: Tensor
    dense: Tensor
    dense_at_ids: Tensor
    dense_log: Tensor | None = None

    @classmethod
    def of_log_p(cls, loss: Tensor, at_ids: Tensor) -> "LossTerms":
        """Of a loss [C] of {log p at S} alone, by its derivative [C, S]."""
        dense = -at_ids.sum(-1)
        return cls(loss, at_ids, dense, dense[:, None].expand_as(at_ids))

    def plus(self, other: "LossTerms", factor: Tensor) -> "LossTerms":
        """This and `factor` [C] times the other."""
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

    def answer(self, metrics: dict[str, Tensor]) -> ObjectiveGrad:
        return ObjectiveGrad(**self._asdict(), metrics=metrics)


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportLogProbs:
    """C rows, S columns."""

    log_p: Tensor
    """[C, S] of the live student."""
    log_q: Tensor
    """[C, S] what it is held against: the teacher's, or what a modifier made of it."""
    on: Tensor
    """[C, S] bool, the support; both log-probs are above -inf there."""
    log_q_outside: Tensor
    """[C], log of the teacher's mass outside the support."""
    places: Tensor
    """[C, S] int64: where the ids stand in the live top-k; BEYOND where not at all."""
    entropy: Tensor
    """[C] nats, of the live student; NaN where the op has not seen the whole vocabulary."""
    rows: Targets
    """The same rows and columns."""
    support: str
    """Its name."""
    log_p_then: Tensor | None = None
    """[C, S] what an advantage takes for log p, if not the live one: see modifiers.Clip."""

    def only(self, on: Tensor) -> "SupportLogProbs":
        """On another support; what is known of the teacher and not on it is outside."""
        return columns_on(self.rows, self.log_p, self.places, self.entropy, on)

    def log_p_drawn(self) -> Tensor:
        """[C, S] log-prob of the drawn ids under the law that they were drawn from."""
        rows = self.rows
        drawn = rows.held("mc_log_p") if self.support == "mc" else self._at_token(rows.b_lp)
        return drawn.to(self.log_p.dtype)

    def log_p_stored(self) -> Tensor:
        """[C, S] of the student that sampled, at temperature 1: at the sampled token, else at its
        stored list."""
        rows = self.rows
        stored = self._at_token(rows.s_lp) if self.support == "sampled" else rows.s_log_p
        return stored.to(self.log_p.dtype)

    def _at_token(self, of_rows: Tensor) -> Tensor:
        column = torch.arange(self.log_p.shape[1], device=self.log_p.device)
        return torch.where(column == self.rows.token_col[:, None], of_rows[:, None], -torch.inf)

    def with_target(self, log_q: Tensor, log_q_outside: Tensor | None = None) -> "SupportLogProbs":
        outside = self.log_q_outside if log_q_outside is None else log_q_outside
        return replace(self, log_q=log_q, log_q_outside=outside)


def columns_on(
    rows: Targets, log_p: Tensor, places: Tensor, entropy: Tensor, on: Tensor, support: str = ""
) -> SupportLogProbs:
    """`rows` against log_p [C, S] of a student of this entropy [C] on the ids in `on`.

    An id whose log-prob is -inf on either side leaves the support: no finite step of the student
    brings it closer. With a tail its mass goes there.
    """
    log_q = rows.q_log_p.to(log_p.dtype)
    on = on & (log_p != -torch.inf) & (log_q != -torch.inf)
    left = torch.where(rows.cached & ~on, log_q, -torch.inf)
    tail = rows.q_log_tail.to(log_p.dtype)[:, None]
    return SupportLogProbs(
        log_p=log_p,
        log_q=log_q,
        on=on,
        log_q_outside=torch.cat([tail, left], -1).logsumexp(-1),
        places=places,
        entropy=entropy,
        rows=rows,
        support=support,
    )
