"""Targets cut from full distributions in float64, and the truth written from the formulas.

The truth walks row by row over Python lists of ids and lets autograd go through log_softmax of the
whole vocabulary. It shares no line with the engine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcask.engine.objectives import Objective, live_k, row_objective
from logitcask.engine.targets import BEYOND, Targets
from logitcask.kernels.sparse_kl import SparseLoss, sparse_kl_reference


@dataclass(frozen=True, kw_only=True)
class Full:
    """P rows of which everything is known; logits are [P, V] float64."""

    live: Tensor
    """Of the student that trains."""
    old: Tensor
    """Of the student that sampled."""
    teacher: Tensor
    targets: Targets


def ranking(z: Tensor) -> list[int]:
    """Ids of z [V], best first, the lower id first among equals."""
    return sorted(range(len(z)), key=lambda v: (-z[v].item(), v))


def make_full(
    live: Tensor,
    teacher: Tensor,
    *,
    old: Tensor | None = None,
    student_k: int = 4,
    kept: Sequence[int] | int = 5,
    token: Sequence[int] | int = 0,
) -> Full:
    """`kept` and `token` per row, or for all. `old` is `live` if not given."""
    old = live if old is None else old
    rows, vocab = live.shape
    log_old, log_q = old.log_softmax(-1), teacher.log_softmax(-1)
    kept_of = [kept] * rows if isinstance(kept, int) else list(kept)
    token_of = [token] * rows if isinstance(token, int) else list(token)
    kept_of = [min(n, vocab) for n in kept_of]
    lists: list[list[int]] = []
    cached_of: list[int] = []
    student_of: list[int] = []
    rank_of: list[dict[int, int]] = []
    for r in range(rows):
        ids = ranking(old[r])[:student_k]
        student_of.append(len(ids))
        ranks = {v: rank for rank, v in enumerate(ranking(teacher[r])[: kept_of[r]])}
        ids = ids + [v for v in ranks if v not in ids]
        cached_of.append(len(ids))
        rank_of.append(ranks)
        lists.append(ids if token_of[r] in ids else [*ids, token_of[r]])
    width = max(map(len, lists))
    ids_of = torch.full((rows, width), -1, dtype=torch.int64)
    q = torch.full((rows, width), -math.inf, dtype=live.dtype)
    rank = torch.full((rows, width), BEYOND, dtype=torch.int64)
    tail = torch.full((rows,), -math.inf, dtype=live.dtype)
    for r, ids in enumerate(lists):
        ids_of[r, : len(ids)] = torch.tensor(ids)
        q[r, : len(ids)] = log_q[r, ids]
        rank[r, : len(ids)] = torch.tensor([rank_of[r].get(v, BEYOND) for v in ids])
        rest = [v for v in range(vocab) if v not in ids[: cached_of[r]]]
        tail[r] = log_q[r, rest].logsumexp(-1)
    column = torch.arange(width)
    at_token = torch.tensor(token_of)
    row = torch.arange(rows)
    targets = Targets(
        token=at_token,
        weight=torch.ones(rows, dtype=live.dtype),
        ids=ids_of,
        q_log_p=q,
        q_rank=rank,
        in_student=column < torch.tensor(student_of)[:, None],
        cached=column < torch.tensor(cached_of)[:, None],
        token_col=torch.tensor([ids.index(t) for ids, t in zip(lists, token_of, strict=True)]),
        kept=torch.tensor(kept_of),
        q_log_tail=tail,
        q_entropy=entropy(log_q),
        s_entropy=entropy(log_old),
        s_lp=log_old[row, at_token],
        b_lp=log_old[row, at_token],
        q_token_lp=log_q[row, at_token],
        version=torch.zeros(rows, dtype=torch.int64),
    )
    return Full(live=live, old=old, teacher=teacher, targets=targets)


def entropy(log_x: Tensor) -> Tensor:
    return -torch.where(log_x == -math.inf, 0.0, log_x.exp() * log_x).sum(-1)


def run(objective: Objective, full: Full) -> tuple[SparseLoss, Tensor]:
    """The engine's loss and metrics, and d loss / d logits [P, V], summed over rows."""
    k = live_k(objective, full.live.shape[1])
    made = row_objective(objective, full.targets)
    return sparse_kl_reference(full.live, full.targets.ids, made, k=k)


def support(objective: Objective, full: Full, r: int) -> list[int]:
    """The ids of row r, from the full distributions."""
    k = objective.k
    teacher = ranking(full.teacher[r])[: min(k, int(full.targets.kept[r]))]
    ids = {
        "teacher": teacher,
        "student": ranking(full.old[r])[:k],
        "overlap": [v for v in ranking(full.live[r])[:k] if v in teacher],
        "sampled": [int(full.targets.token[r])],
    }[objective.support]
    return [v for v in ids if full.live[r, v] > -math.inf and full.teacher[r, v] > -math.inf]


def truth(objective: Objective, full: Full) -> tuple[Tensor, Tensor]:
    """(loss [P], its gradient by the live logits [P, V])."""
    z = full.live.clone().requires_grad_()
    log_p, log_q = z.log_softmax(-1), full.teacher.log_softmax(-1)
    losses, descended = [], []
    for r in range(len(z)):
        ids = support(objective, full, r)
        rest = [v for v in range(z.shape[1]) if v not in ids]
        loss, surrogate = _row(objective, log_p[r], log_q[r], ids, rest)
        losses.append(loss.detach())
        descended.append(surrogate)
    (grad,) = torch.autograd.grad(torch.stack(descended).sum(), z)
    return torch.stack(losses), grad


def _row(
    objective: Objective, log_p: Tensor, log_q: Tensor, ids: list[int], rest: list[int]
) -> tuple[Tensor, Tensor]:
    """(loss, what autograd descends) of one row."""
    nothing = log_p.nan_to_num(0, 0, 0).sum() * 0
    if not ids and objective.outside != "tail":
        return nothing, nothing
    p, q = log_p[ids], log_q[ids]
    if objective.form == "advantage":
        weight = p.softmax(-1).detach()
        fixed = weight * (p - q).detach()
        return fixed.sum(), (fixed * p).sum()
    if objective.outside == "renormalize":
        p, q = p - p.logsumexp(-1), q - q.logsumexp(-1)
    elif log_q[rest].exp().sum() > 0:
        tail_p, tail_q = log_p[rest].logsumexp(-1), log_q[rest].logsumexp(-1)
        p, q = torch.cat([p, tail_p[None]]), torch.cat([q, tail_q[None]])
    first, second = (p, q) if objective.divergence == "reverse_kl" else (q, p)
    loss = nothing + sum((a.exp() * (a - b) for a, b in zip(first, second, strict=True)), nothing)
    return loss, loss
