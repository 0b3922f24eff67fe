"""The presets with modifiers as formulas of one row, written from their papers.

Each maps the log-probs [V] of the whole vocabulary and the stored ids to (loss, surrogate for
autograd). They share no code with the engine; `full_rows.truth` has the other presets.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.engine.objectives.full_rows import entropy, ranking


@dataclass(frozen=True)
class Row:
    """One position: log-probs [V] in float64, those of the student differentiable."""

    p: Tensor
    q: Tensor
    b: Tensor
    """Of the base model."""
    old: Tensor
    """Of the student that sampled."""
    y: int
    """The sampled id."""
    scored: list[int]
    """Ids with a stored score."""
    kept: list[int]
    """The teacher's list."""
    draws: dict[int, int]
    """Ids that the student drew -> how often."""
    later: tuple[float, ...] = ()
    """log q - log old of the later sampled ids of the response."""

    def top(self, k: int) -> list[int]:
        """Return the scored ids of the current top-k, best first."""
        return [v for v in ranking(self.p.detach())[:k] if v in self.scored]

    def coarse(self, x: Tensor, ids: list[int]) -> Tensor:
        """Return the log-probs at ids, and that of all others together."""
        rest = [v for v in range(len(x)) if v not in ids]
        return torch.cat([x[ids], x[rest].logsumexp(0)[None]]) if rest else x[ids]


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum()


def drawn(row: Row, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return -A and its surrogate -sg[A] log p(y)."""
    return -a.detach(), -a.detach() * row.p[row.y]


def advantage(row: Row) -> Tensor:
    return row.q[row.y] - row.p[row.y]


def exopd(row: Row) -> tuple[Tensor, Tensor]:
    return drawn(row, 1.25 * row.q[row.y] - 0.25 * row.b[row.y] - row.p[row.y])


def vopd(row: Row) -> tuple[Tensor, Tensor]:
    ids = row.top(16)
    return drawn(row, advantage(row) + kl(row.p[ids].log_softmax(0), row.q[ids].log_softmax(0)))


def vopd_cached(row: Row) -> tuple[Tensor, Tensor]:
    return drawn(row, advantage(row) + kl(row.coarse(row.p, row.kept), row.coarse(row.q, row.kept)))


def eopd(row: Row) -> tuple[Tensor, Tensor]:
    a, ratio = row.q[row.y] - row.old[row.y], (row.p[row.y] - row.old[row.y]).exp()
    value = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    value = torch.minimum(value, -3 * a) if a < 0 else value
    if float(entropy(row.q[None])) > 0.8:
        ids = row.kept[:16]
        value = value + kl(row.coarse(row.q, ids), row.coarse(row.p, ids))
    return value.detach(), value


def veto(row: Row) -> tuple[Tensor, Tensor]:
    ids = row.kept[:16]
    target = (row.q[ids] + 0.3 * row.p[ids].detach()).log_softmax(0)
    value = kl(row.p[ids].log_softmax(0), target)
    return value.detach(), value


def reopold(row: Row) -> tuple[Tensor, Tensor]:
    return drawn(row, advantage(row).clamp(min=math.log(0.25)))


def async_mc(row: Row) -> tuple[Tensor, Tensor]:
    ids = list(row.draws)
    share = torch.tensor([row.draws[v] for v in ids]).double() / sum(row.draws.values())
    fixed = (share * (row.p - row.old)[ids].exp() * (row.p - row.q)[ids]).detach()
    return fixed.sum(), (fixed * row.p[ids]).sum()


def minillm(row: Row) -> tuple[Tensor, Tensor]:
    ids = ranking(row.old)[:16]
    single = kl(row.p[ids].log_softmax(0), row.q[ids].log_softmax(0))
    r = sum(row.later) / len(row.later) if row.later else 0.0
    return single.detach() - r, single - r * row.p[row.y]


def fixed_advantage(row: Row) -> tuple[Tensor, Tensor]:
    return torch.ones((), dtype=torch.float64), row.p[row.y]


def sft(row: Row) -> tuple[Tensor, Tensor]:
    return -row.p[row.y].detach(), -row.p[row.y]


FORMULAS: dict[str, Callable[[Row], tuple[Tensor, Tensor]]] = {
    "exopd": exopd,
    "vopd": vopd,
    "vopd_cached": vopd_cached,
    "eopd": eopd,
    "veto": veto,
    "reopold": reopold,
    "async_mc": async_mc,
    "minillm": minillm,
    "fixed_advantage": fixed_advantage,
    "sft": sft,
}
