"""Log-probs of both models on spans: the input of every loss over spans.

p is the student, q the teacher. G spans of a pack, P rows, C columns. A span has one row with
columns of the teacher, its first (or its last, by the scores): the row of the student that is
conditioned on the same bytes.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from logitcask.engine.packing.targets import Targets


@dataclass(frozen=True)
class SpanLogProbs:
    """P rows of a pack, with the log-probs of the current student."""

    log_p: Tensor
    """[P, C] of the student at `rows.ids`; -inf where the id is -1. Differentiable."""
    rows: Targets
    """The same rows, with spans: see Targets.spanned."""

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
    def student(self) -> Tensor:
        """Return [G] log-prob of each span by the student: the sum over its tokens, nats."""
        return self.sums(self.token_log_p)

    @cached_property
    def teacher(self) -> Tensor:
        """Return [G] log-prob of each span by the teacher, nats."""
        return self.rows.require("span_log_q")[self.first].to(self.log_p.dtype)

    @cached_property
    def tokens(self) -> Tensor:
        """Return [G] int64, the student's tokens of each span."""
        return self.sums(torch.ones_like(self.rows.token))

    def sums(self, values: Tensor) -> Tensor:
        """Return [G] sums of values [P] over the rows of each span."""
        zero = values.new_zeros(self.count + 1)
        return zero.index_add(0, self.span, values)[: self.count]

    def _at_span(self, values: Tensor, reduce: str) -> Tensor:
        out = values.new_zeros(self.count + 1)
        found = out.scatter_reduce(0, self.span, values, reduce, include_self=False)
        return found[: self.count]
