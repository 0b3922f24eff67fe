"""Log-probs of both models on spans: the input of every loss over spans.

p is the student, q the teacher. G spans of a pack, P rows, C columns. A span has one row with
columns of the teacher, its first (or its last, by the scores): the row of the student that is
conditioned on the same bytes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.engine.packing.targets import Targets


class Columns(NamedTuple):
    """Both models at the columns [G, C] of one row of each span."""

    log_p: Tensor
    """-inf where the student has no such id. Differentiable."""
    log_q: Tensor
    """-inf where the teacher's log-prob is not stored."""
    shared: Tensor
    """Bool: ids of both, with a stored log-prob."""
    ours: Tensor
    """Bool: ids of the student alone."""
    theirs: Tensor
    """Bool: ids of the teacher alone."""


@dataclass(frozen=True)
class SpanLogProbs:
    """P rows of a pack, with the log-probs of the current student."""

    log_p: Tensor
    """[P, C] of the student at `rows.ids`; -inf where the id is -1. Differentiable."""
    rows: Targets
    """The same rows, with spans: see Targets.spanned."""
    topk_index: Tensor
    """[P, C] int64: index of each column's id in the current student's top-k, or NOT_IN_TOPK."""

    @cached_property
    def span(self) -> Tensor:
        """Return [P] int64, the span of each row; the number of spans for a row in none."""
        span = self.rows.require("span")
        return torch.where(span < 0, self.count, span)

    @cached_property
    def count(self) -> int:
        """Return the number of spans G."""
        return int(self.rows.require("span").max()) + 1 if len(self.rows) else 0

    @cached_property
    def first(self) -> Tensor:
        """Return [G] int64, the first row of each span."""
        return self._at_span(torch.arange(len(self.rows), device=self.span.device), "amin")

    @cached_property
    def last(self) -> Tensor:
        """Return [G] int64, the last row of each span."""
        return self._at_span(torch.arange(len(self.rows), device=self.span.device), "amax")

    @cached_property
    def token_log_p(self) -> Tensor:
        """Return [P] log p(y) of the stored token, nats."""
        return self.log_p.gather(1, self.rows.token_col[:, None])[:, 0]

    @cached_property
    def known(self) -> Tensor:
        """Return [G] bool: neither model excludes the span. No update brings others closer."""
        return self._teacher.isfinite() & (self.sums(self.token_log_p.detach()) != -torch.inf)

    @cached_property
    def student(self) -> Tensor:
        """Return [G] log-prob of each span by the student: the sum over its tokens, nats.

        0 where a model excludes the span.
        """
        return torch.where(self.known, self.sums(self.token_log_p), 0.0)

    @cached_property
    def teacher(self) -> Tensor:
        """Return [G] log-prob of each span by the teacher, nats; 0 where a model excludes it."""
        return torch.where(self.known, self._teacher, 0.0)

    @cached_property
    def _teacher(self) -> Tensor:
        return self.rows.require("span_log_q")[self.first].to(self.log_p.dtype)

    @cached_property
    def tokens(self) -> Tensor:
        """Return [G] int64, the student's tokens of each span."""
        return self.sums(torch.ones_like(self.rows.token))

    @cached_property
    def trained(self) -> Tensor:
        """Return [G] bool: every row is trained on, and neither model excludes the span.

        A span that is partly trained on has no log-prob of the part.
        """
        masked = self.sums((self.rows.weight == 0).to(self.log_p.dtype)) > 0
        return self.known & ~masked

    @cached_property
    def trained_rows(self) -> Tensor:
        """Return [P] bool: the row is in a span that is trained on."""
        return torch.cat([self.trained, self.trained.new_zeros(1)])[self.span]

    def at(self, row: Tensor) -> Columns:
        """Return both models at the columns of one row of each span; row: [G] int64."""
        ids, log_q = self.rows.ids[row], self.rows.q_log_p[row].to(self.log_p.dtype)
        log_p, known = self.log_p[row], log_q != -torch.inf
        has = (ids >= 0) & (log_p.detach() != -torch.inf)
        return Columns(log_p, log_q, has & known, has & ~known, known & (ids < 0))

    def sums(self, values: Tensor) -> Tensor:
        """Return [G] sums of values [P] over the rows of each span."""
        zero = values.new_zeros(self.count + 1)
        return zero.index_add(0, self.span, values)[: self.count]

    def _at_span(self, values: Tensor, reduce: str) -> Tensor:
        out = values.new_zeros(self.count + 1)
        found = out.scatter_reduce(0, self.span, values, reduce, include_self=False)
        return found[: self.count]
