"""Rows of two models with other vocabularies, and our losses over their spans.

Made-up logits: the student's [P, V], the teacher's [Q, W]; row r predicts token r. A span is
(a0, a1, b0, b1): tokens [a0, a1) of the student spell the bytes of [b0, b1) of the teacher. All ids
of both are columns, so that nothing is left out of our losses.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from ours import CALLS
from torch import Tensor

from logitcask.engine.objectives.spans import SPAN_LOSSES, SpanLogProbs
from logitcask.engine.packing.targets import NOT_IN_TOPK, Targets

Span = tuple[int, int, int, int]
SPANS: tuple[Span, ...] = ((0, 1, 0, 1), (1, 3, 1, 2), (3, 4, 2, 4), (4, 6, 4, 7), (6, 7, 7, 8))
"""1:1, n:1, 1:n, n:m and 1:1 again."""
ONE_TO_ONE: tuple[Span, ...] = tuple((i, i + 1, i, i + 1) for i in range(7))
PAIRS = ((0, 3), (1, 1), (4, 0), (7, 9), (5, 5))
"""(student's id, teacher's id) of equal bytes."""


class Model(NamedTuple):
    """Logits [P, V] and tokens [P]."""

    z: Tensor
    ids: Tensor

    @property
    def log_probs(self) -> Tensor:
        """Return [P] log-probs of the tokens, nats."""
        return self.z.log_softmax(-1).gather(1, self.ids[:, None])[:, 0]


@dataclass(frozen=True)
class Rows:
    """Two models of one text."""

    student: Model
    teacher: Model
    spans: tuple[Span, ...]
    pairs: tuple[tuple[int, int], ...]


def rows(
    seed: int,
    spans: tuple[Span, ...] = SPANS,
    pairs: tuple[tuple[int, int], ...] = PAIRS,
    vocabularies: tuple[int, int] = (9, 11),
) -> Rows:
    """Return made-up rows in float64; the tokens of a 1:1 span are a pair of `pairs`."""
    generator = torch.Generator().manual_seed(seed)
    models = [
        Model(
            torch.randn(spans[-1][at], size, generator=generator, dtype=torch.float64) * 2,
            torch.randint(size, (spans[-1][at],), generator=generator),
        )
        for at, size in zip((1, 3), vocabularies, strict=True)
    ]
    for number, (a0, a1, b0, b1) in enumerate(spans):
        if a1 - a0 == b1 - b0 == 1:
            models[0].ids[a0], models[1].ids[b0] = map(int, pairs[number % len(pairs)])
    return Rows(models[0], models[1], spans, pairs)


def span_log_probs(made: Rows, z: Tensor, *, ends: bool = False) -> SpanLogProbs:
    """Return both models on the spans, the student with the logits z, which may take a gradient.

    ends: the columns of a span are those of its last row; else those of its first.
    """
    student, teacher = Model(z, made.student.ids), made.teacher
    ours, twins = z.shape[1], dict(made.pairs)
    theirs = [i for i in range(teacher.z.shape[1]) if i not in twins.values()]
    columns, values = [*twins, *range(ours, ours + len(theirs))], [*twins.values(), *theirs]
    log_q = teacher.z.log_softmax(-1)
    ids = torch.full((len(z), ours + len(theirs)), -1)
    ids[:, :ours] = torch.arange(ours)
    q = torch.full(ids.shape, -torch.inf, dtype=log_q.dtype)
    rank = torch.full(ids.shape, NOT_IN_TOPK)
    span, tokens = torch.full((len(z),), -1), torch.zeros(len(z), dtype=torch.int64)
    whole, of_row = q.new_zeros(len(z)), q.new_zeros(len(z))
    for number, (a0, a1, b0, b1) in enumerate(made.spans):
        at, there = (a1 - 1, b1 - 1) if ends else (a0, b0)
        q[at, columns] = log_q[there, values]
        rank[at, columns] = log_q[there].argsort(descending=True).argsort()[values]
        span[a0:a1], tokens[a0:a1] = number, b1 - b0
        whole[a0:a1] = teacher.log_probs[b0:b1].sum()
        of_row[a0:a1] = teacher.log_probs[there]
    nothing = q.new_zeros(len(z))
    none = torch.zeros(len(z), dtype=torch.int64)
    targets = Targets(
        token=student.ids,
        weight=nothing + 1,
        ids=ids,
        q_log_p=q,
        q_rank=rank,
        in_student=ids >= 0,
        cached=q > -torch.inf,
        token_col=student.ids,
        n_kept=none + teacher.z.shape[1],
        q_log_tail=nothing - torch.inf,
        q_entropy=nothing,
        student_entropy=nothing,
        student_logprobs=nothing,
        behavior_logprobs=nothing,
        teacher_logprobs=nothing,
        version=none,
        sequence=none,
        position=torch.arange(len(z)),
        student_topk_logprobs=q,
        span=span,
        span_log_q=whole,
        span_row_log_q=of_row,
        span_tokens=tokens,
    )
    log_p = torch.cat([z.log_softmax(-1), q.new_full((len(z), len(theirs)), -torch.inf)], dim=1)
    top_ids = log_p[:, :ours].detach().topk(ours).indices
    return SpanLogProbs(log_p, targets, targets.topk_index(top_ids))


def loss(
    name: str,
    made: Rows,
    z: Tensor,
    parameter: float = 0.0,
    *,
    k: int = 64,
    ends: bool = False,
    lower: float = 0.0,
) -> Tensor:
    """Return [G] our loss of that name. lower: nats to subtract from both log-probs of a span."""
    CALLS["spans"] += 1
    x = span_log_probs(made, z, ends=ends)
    if lower:
        # The student's first token and the teacher's whole span are lower by it.
        first = torch.zeros_like(x.log_p)
        first[x.first] = lower
        rows = replace(x.rows, span_log_q=x.rows.require("span_log_q") - lower)
        x = SpanLogProbs(x.log_p - first, rows, x.topk_index)
    return SPAN_LOSSES[name](x, k, parameter)
