"""Targets cut from full distributions in float64, and the expected results from the formulas.

The expected results are computed row by row over Python lists of ids, with autograd through
log_softmax of the whole vocabulary. They share no code with the engine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcask.engine.objectives import Objective, current_topk, row_objective
from logitcask.engine.packing.targets import NOT_IN_TOPK, Targets
from logitcask.kernels.objective_input import SparseLoss
from logitcask.kernels.sparse_kl import sparse_kl_reference


@dataclass(frozen=True, kw_only=True)
class Full:
    """P rows with their full distributions; logits are [P, V] float64."""

    live: Tensor
    """Logits of the student in training."""
    old: Tensor
    """Logits of the student that sampled."""
    teacher: Tensor
    targets: Targets


def ranking(z: Tensor) -> list[int]:
    """Return the ids of z [V], best first, the lower id first among equals."""
    return sorted(range(len(z)), key=lambda v: (-z[v].item(), v))


def make_full(
    live: Tensor,
    teacher: Tensor,
    *,
    old: Tensor | None = None,
    student_k: int = 4,
    kept: Sequence[int] | int = 5,
    token: Sequence[int] | int = 0,
    mc: Sequence[Mapping[int, int]] | None = None,
    q_draws: Sequence[Mapping[int, int]] | None = None,
    base: Tensor | None = None,
) -> Full:
    """Return rows and their targets; `kept` and `token` are per row, or the same for all.

    `old` is `live` by default. `mc` and `q_draws` are the draws of the old student and of the
    teacher in each row, id -> count; with `q_draws` the teacher kept no list. `base` are logits of
    a base model, available at every column.
    """
    old = live if old is None else old
    rows, vocab = live.shape
    log_old, log_q = old.log_softmax(-1), teacher.log_softmax(-1)
    kept_of = [kept] * rows if isinstance(kept, int) else list(kept)
    token_of = [token] * rows if isinstance(token, int) else list(token)
    kept_of = [0 if q_draws else min(n, vocab) for n in kept_of]
    lists: list[list[int]] = []
    cached_of: list[int] = []
    student_of: list[int] = []
    rank_of: list[dict[int, int]] = []
    for r in range(rows):
        ids = ranking(old[r])[:student_k]
        student_of.append(len(ids))
        ranks = {v: rank for rank, v in enumerate(ranking(teacher[r])[: kept_of[r]])}
        ids = ids + [v for v in ranks if v not in ids]
        for drawn in (mc, q_draws):
            ids = ids + [v for v in (drawn[r] if drawn else ()) if v not in ids]
        cached_of.append(len(ids))
        rank_of.append(ranks)
        lists.append(ids if token_of[r] in ids else [*ids, token_of[r]])
    width = max(map(len, lists))
    ids_of = torch.full((rows, width), -1, dtype=torch.int64)
    q = torch.full((rows, width), -math.inf, dtype=live.dtype)
    rank = torch.full((rows, width), NOT_IN_TOPK, dtype=torch.int64)
    tail = torch.full((rows,), -math.inf, dtype=live.dtype)
    for r, ids in enumerate(lists):
        ids_of[r, : len(ids)] = torch.tensor(ids)
        q[r, : len(ids)] = log_q[r, ids]
        rank[r, : len(ids)] = torch.tensor([rank_of[r].get(v, NOT_IN_TOPK) for v in ids])
        rest = [v for v in range(vocab) if v not in ids[: cached_of[r]]]
        tail[r] = log_q[r, rest].logsumexp(-1)
    column = torch.arange(width)
    column_of = [{v: c for c, v in enumerate(ids)} for ids in lists]

    def counts(drawn: Sequence[Mapping[int, int]] | None) -> Tensor | None:
        if drawn is None:
            return None
        out = torch.zeros((rows, width), dtype=torch.int64)
        for r, row_draws in enumerate(drawn):
            for v, n in row_draws.items():
                out[r, column_of[r][v]] = n
        return out

    at_ids = ids_of.clamp(min=0)
    mc_count = counts(mc)
    old_at = torch.where(ids_of < 0, -math.inf, log_old.gather(1, at_ids))
    base_at = None if base is None else base.log_softmax(-1).gather(1, at_ids)
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
        n_kept=torch.tensor(kept_of),
        q_log_tail=tail,
        q_entropy=entropy(log_q),
        student_entropy=entropy(log_old),
        student_logprobs=log_old[row, at_token],
        behavior_logprobs=log_old[row, at_token],
        teacher_logprobs=log_q[row, at_token],
        version=torch.zeros(rows, dtype=torch.int64),
        sequence=torch.zeros(rows, dtype=torch.int64),
        position=row,
        student_topk_logprobs=torch.where(
            column < torch.tensor(student_of)[:, None], old_at, -math.inf
        ),
        mc_count=mc_count,
        mc_log_p=None if mc_count is None else torch.where(mc_count > 0, old_at, -math.inf),
        q_draws=counts(q_draws),
        base_log_p=base_at,
        base_token_lp=None if base is None else base.log_softmax(-1)[row, at_token],
    )
    return Full(live=live, old=old, teacher=teacher, targets=targets)


def entropy(log_x: Tensor) -> Tensor:
    return -torch.where(log_x == -math.inf, 0.0, log_x.exp() * log_x).sum(-1)


def run(objective: Objective, full: Full) -> tuple[SparseLoss, Tensor]:
    """Return the engine's loss and metrics, and d loss / d logits [P, V], summed over rows."""
    k = current_topk(objective, full.live.shape[1])
    objective_fn = row_objective(objective, full.targets)
    return sparse_kl_reference(full.live, full.targets.ids, objective_fn, k=k)


def support(objective: Objective, full: Full, r: int) -> list[int]:
    """Return the support of row r, from the full distributions."""
    k = objective.k
    teacher = ranking(full.teacher[r])[: min(k, int(full.targets.n_kept[r]))]
    current = ranking(full.live[r])[:k]
    cached = full.targets.ids[r][full.targets.cached[r]].tolist()
    ids = {
        "teacher": teacher,
        "student": ranking(full.old[r])[:k],
        "overlap": [v for v in current if v in teacher],
        "union": [v for v in cached if v in teacher or v in current],
        "non_overlap": [v for v in cached if (v in teacher) != (v in current)],
        "sampled": [int(full.targets.token[r])],
        "mc": _drawn(full.targets.mc_count, full, r),
        "teacher_mc": _drawn(full.targets.q_draws, full, r),
    }[objective.support]
    return [v for v in ids if full.live[r, v] > -math.inf and full.teacher[r, v] > -math.inf]


def _drawn(count: Tensor | None, full: Full, r: int) -> list[int]:
    return [] if count is None else full.targets.ids[r][count[r] > 0].tolist()


def truth(objective: Objective, full: Full) -> tuple[Tensor, Tensor]:
    """Return the loss [P] and its gradient by the live logits [P, V]."""
    z = full.live.clone().requires_grad_()
    log_p, log_q = z.log_softmax(-1), full.teacher.log_softmax(-1)
    losses, surrogates = [], []
    for r in range(len(z)):
        ids = support(objective, full, r)
        rest = [v for v in range(z.shape[1]) if v not in ids]
        count = full.targets.mc_count if objective.support == "mc" else full.targets.q_draws
        draws = None
        if objective.support in ("mc", "teacher_mc"):
            assert count is not None
            all_ids = full.targets.ids[r].tolist()
            draws = count[r, [all_ids.index(v) for v in ids]].double() / count[r].sum()
        loss, surrogate = _row(objective, log_p[r], log_q[r], ids, rest, draws)
        losses.append(loss.detach())
        surrogates.append(surrogate)
    (grad,) = torch.autograd.grad(torch.stack(surrogates).sum(), z)
    return torch.stack(losses), grad


def _row(
    objective: Objective,
    log_p: Tensor,
    log_q: Tensor,
    ids: list[int],
    rest: list[int],
    draws: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of one row and its surrogate for autograd."""
    nothing = log_p.nan_to_num(0, 0, 0).sum() * 0
    if not ids and objective.tail != "bucket":
        return nothing, nothing
    p, q = log_p[ids], log_q[ids]
    if objective.estimator == "policy_gradient":
        weight = {
            "student_p": p.softmax(-1).detach(),
            "teacher_p": q.softmax(-1),
            "none": torch.full_like(q, 1 / len(ids)),
        }[objective.weights]
        weight = weight if draws is None else draws
        fixed = weight * (p - q).detach()
        return fixed.sum(), (fixed * p).sum()
    if draws is not None:
        loss = (draws * (q - p)).sum()
        return loss, loss
    if objective.temperature != 1:
        p, q = p / objective.temperature, q / objective.temperature
    if objective.tail == "renormalize":
        p, q = p - p.logsumexp(-1), q - q.logsumexp(-1)
    elif objective.tail == "zero":  # the whole vocabulary, the teacher's probability 0 outside S
        cut = torch.zeros_like(log_q).index_put((torch.tensor(ids),), q.softmax(-1))
        return (loss := _divergence(objective, log_p.exp(), cut)), loss
    elif objective.tail == "bucket" and log_q[rest].exp().sum() > 0:
        tail_p, tail_q = log_p[rest].logsumexp(-1), log_q[rest].logsumexp(-1)
        p, q = torch.cat([p, tail_p[None]]), torch.cat([q, tail_q[None]])
    loss = nothing + objective.temperature**2 * _divergence(objective, p.exp(), q.exp())
    return loss, loss


def _divergence(objective: Objective, p: Tensor, q: Tensor) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum()

    t = objective.parameter or 0.0
    if objective.divergence == "reverse_kl":
        return kl(p, q)
    if objective.divergence == "forward_kl":
        return kl(q, p)
    if objective.divergence == "mixed_kl":
        return t * kl(q, p) + (1 - t) * kl(p, q)
    if objective.divergence == "skew_reverse":
        return kl(p, t * p + (1 - t) * q)
    if objective.divergence == "alpha":
        # Both sums are 1, but for a part of the ids.
        sums = t * q.sum() + (1 - t) * p.sum() if objective.tail == "ignore" else 1.0
        return (sums - (q**t * p ** (1 - t)).sum()) / (t * (1 - t))
    m = t * q + (1 - t) * p
    return kl(q, m) if objective.divergence == "skew" else t * kl(q, m) + (1 - t) * kl(p, m)
