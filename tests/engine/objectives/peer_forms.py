"""Losses of other libraries over spans, written from their code in float64 on full logits.

Row r of P + 1 rows of logits predicts token r; the last one is what follows. Spans are rows
(a0, a1, b0, b1): tokens [a0, a1) of the student and [b0, b1) of the teacher spell the same bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Span = tuple[int, int, int, int]
SPANS: tuple[Span, ...] = ((0, 1, 0, 1), (1, 3, 1, 2), (3, 4, 2, 4), (4, 6, 4, 7), (6, 7, 7, 8))
"""1:1, n:1, 1:n, n:m and 1:1 again."""


@dataclass(frozen=True)
class Side:
    """Logits [P + 1, V] and tokens [P] of one model."""

    z: Tensor
    ids: Tensor

    @property
    def log_probs(self) -> Tensor:
        """Return [P] log-probs of the tokens, nats."""
        return self.z[:-1].log_softmax(-1).gather(1, self.ids[:, None])[:, 0]


def side(seed: int, n_tokens: int, n_vocab: int) -> Side:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n_tokens + 1, n_vocab, generator=generator, dtype=torch.float64)
    return Side(z, torch.randint(n_vocab, (n_tokens,), generator=generator))


def merged(at: Side, groups: list[tuple[int, int]], rule: str) -> Tensor:
    """Return [G, V] of TRL's GOLDTrainer, _merge_probabilities_with_alignment_groups.

    bayesian: the last row times the probabilities of the earlier tokens. observed: the first row
    times those of the later tokens. released: observed on rows that are one too late, as the
    trainer hands them over, so that row r is compared with token r, and predicts token r + 1.
    """
    p = at.z.softmax(-1)[int(rule == "released") :]
    made = []
    for first, end in groups:
        row, others = (end - 1, range(first, end - 1)) if rule == "bayesian" else (first, ())
        if rule != "bayesian":
            others = range(first + 1, end)
        factor = torch.ones((), dtype=p.dtype)
        for j in others:
            factor = factor * p[j, at.ids[j]]
        made.append(p[row] * factor)
    return torch.stack(made)


def sorted_l1(p: Tensor, q: Tensor) -> Tensor:
    """Return [G] sum_k |p_(k) - q_(k)|, the shorter one padded: ULD, arXiv 2402.12030."""
    width = max(p.shape[-1], q.shape[-1])
    p, q = (
        functional.pad(x.sort(-1, descending=True).values, (0, width - x.shape[-1])) for x in (p, q)
    )
    return (p - q).abs().sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Return [G] beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q, as sums of
    values that need not sum to 1.
    """
    m = (1 - beta) * p + beta * q
    return (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1)


def gold(p: Tensor, q: Tensor, pairs: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """Return [G] of ULDLoss._compute_hybrid_uld_loss; pairs [M, 2]: (student's, teacher's id)."""
    ours, theirs = pairs.T
    rest_p = torch.ones(p.shape[-1], dtype=torch.bool)
    rest_q = torch.ones(q.shape[-1], dtype=torch.bool)
    rest_p[ours], rest_q[theirs] = False, False
    matched = jsd(p[:, ours], q[:, theirs], beta)
    return weights[0] * matched + weights[1] * sorted_l1(p[:, rest_p], q[:, rest_q])


def groups_of(which: int) -> list[tuple[int, int]]:
    """Return the token ranges of SPANS of the student (0) or the teacher (1)."""
    return [(span[2 * which], span[2 * which + 1]) for span in SPANS]
