"""Losses over spans from full logits in float64, written from their papers; and their targets.

Each formula maps one span of a `Case` to (loss, surrogate for autograd), over Python lists of ids.
They share no code with the engine.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from logitcask.engine.packing.targets import NOT_IN_TOPK, Targets

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """P rows of the student, Q of the teacher, with their full distributions; one response."""

    live: Tensor
    """[P, V] logits of the student in training."""
    teacher: Tensor
    """[Q, W] logits."""
    token: list[int]
    teacher_token: list[int]
    spans: list[tuple[list[int], list[int]]]
    """Rows of the student and of the teacher of each span."""
    twin: dict[int, int]
    """Id of the teacher -> id of the student."""
    old: Tensor
    """[P, V] logits of the student that sampled."""
    kept: list[int]
    """Of each span: how many of the teacher's best ids are stored."""
    student_k: int = 3
    """The teacher scored the twins of so many of the old student's best ids."""
    ends: bool = False
    """The stored ids are of the last row of each span."""
    weight: list[float] = field(default_factory=list)
    log_p: Tensor = field(init=False)
    """[P, V], differentiable by `leaf`."""
    leaf: Tensor = field(init=False)

    def __post_init__(self) -> None:
        leaf = self.live.clone().requires_grad_()
        object.__setattr__(self, "leaf", leaf)
        object.__setattr__(self, "log_p", leaf.log_softmax(-1))

    @property
    def log_q(self) -> Tensor:
        return self.teacher.log_softmax(-1)

    def row(self, g: int) -> tuple[int, int]:
        """Return the rows of the student and of the teacher that the stored ids are of."""
        at = -1 if self.ends else 0
        return self.spans[g][0][at], self.spans[g][1][at]

    def student(self, rows: Sequence[int]) -> Tensor:
        return torch.stack([self.log_p[r, self.token[r]] for r in rows] or [torch.zeros(())]).sum()

    def of_teacher(self, rows: Sequence[int]) -> Tensor:
        values = [self.log_q[r, self.teacher_token[r]] for r in rows]
        return torch.stack(values or [torch.zeros(())]).sum()

    def stored(self, g: int) -> tuple[list[int], list[int], list[int]]:
        """Return the student's listed ids, and the teacher's stored ones: kept, and the others."""
        r, j = self.row(g)
        back = {v: w for w, v in self.twin.items()}
        ours = ranking(self.old[r])[: self.student_k]
        kept = ranking(self.teacher[j])[: self.kept[g]]
        others = [back[v] for v in ours if v in back and back[v] not in kept]
        listed = ours + [self.twin[w] for w in kept if w in self.twin]
        listed = list(dict.fromkeys([*listed, self.token[r]]))
        return listed, kept, others

    def sides(self, g: int) -> tuple[list[tuple[int, int]], list[int], list[int]]:
        """Return the shared ids of the stored ones as pairs, the student's and the teacher's."""
        listed, kept, others = self.stored(g)
        of = {self.twin[w]: w for w in kept + others if w in self.twin}
        shared = [(v, of[v]) for v in listed if v in of]
        return shared, [v for v in listed if v not in of], [w for w in kept if w not in self.twin]


def ranking(z: Tensor) -> list[int]:
    """Return the ids of z [V], best first."""
    return [int(v) for v in z.detach().argsort(descending=True, stable=True)]


def advantage(case: Case, g: int, _: int, gamma: float) -> Pair:
    def a_of(s: int) -> Tensor:
        rows, others = case.spans[s]
        if case.weight and not all(case.weight[r] for r in rows):
            return torch.zeros(())
        return (case.of_teacher(others) - case.student(rows)).detach()

    rows = case.spans[g][0]
    to_go = sum(gamma ** (s - g) * a_of(s) for s in range(g, len(case.spans)))
    surrogate = -to_go * case.student(rows)
    if g:
        surrogate = surrogate - gamma * a_of(g - 1) * case.student(rows[:1])
    return -a_of(g), surrogate


def alm(case: Case, g: int, _: int, tau: float) -> Pair:
    rows, others = case.spans[g]
    l_q, l_p = case.of_teacher(others), case.student(rows)
    if tau == math.inf:
        loss = l_q - l_p + l_q * torch.log(l_p / l_q)
        return loss, loss
    q, p = (l_q / tau).exp(), (l_p / tau).exp()
    loss = tau * (q * torch.log(q / p) + (1 - q) * torch.log((1 - q) / (1 - p)))
    return loss, loss


def sorted_l1(p: Tensor, q: Tensor) -> Tensor:
    """Return the sum of |p_(k) - q_(k)|; the shorter one is padded with 0."""
    size = max(len(p), len(q))
    p, q = (torch.cat([x, x.new_zeros(size - len(x))]).sort(descending=True)[0] for x in (p, q))
    return (p - q).abs().sum()


def uld(case: Case, g: int, k: int, _: float) -> Pair:
    r, j = case.row(g)
    listed, kept, _others = case.stored(g)
    best = ranking(case.live[r])[:k]
    known = next((i for i, v in enumerate(best) if v not in listed), len(best))
    count = min(known, len(kept))
    p, q = case.log_p[r, best[:count]].exp(), case.log_q[j, kept[:count]].exp()
    loss = (p - q).abs().sum() + ((1 - p.sum()) - (1 - q.sum())).abs()
    return loss, loss


def _hybrid(case: Case, g: int, beta: float) -> Pair:
    r, j = case.row(g)
    rows, others = case.spans[g]
    p = case.log_p[r].exp() * case.student([i for i in rows if i != r]).exp()
    q = case.log_q[j].exp() * case.of_teacher([i for i in others if i != j]).exp()
    shared, ours, theirs = case.sides(g)
    loss = sorted_l1(p[ours], q[theirs])
    for v, w in shared:
        m = beta * q[w] + (1 - beta) * p[v]
        loss = loss + beta * q[w] * torch.log(q[w] / m) + (1 - beta) * p[v] * torch.log(p[v] / m)
    return loss, loss


def gold(case: Case, g: int, _: int, beta: float) -> Pair:
    assert not case.ends
    return _hybrid(case, g, beta)


def gold_bayesian(case: Case, g: int, _: int, beta: float) -> Pair:
    assert case.ends
    return _hybrid(case, g, beta)


def gold_released(probs: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return TRL's `observed` merge of a span as it is released.

    probs: [n + 1, V], row k predicts token k. The release reads row k + 1 in place of row k, so
    each factor is the probability that the token after u_j is u_j again.
    """
    merged = probs[1]
    for j in range(1, len(tokens)):
        merged = merged * probs[j + 1, tokens[j]]
    return merged


def simct(case: Case, g: int, _: int, __: float) -> Pair:
    r, j = case.row(g)
    rows, others = case.spans[g]
    shared = [pair for pair in case.sides(g)[0] if len(rows) > 1 or pair[0] != case.token[r]]
    p = torch.stack([*(case.log_p[r, v] for v, _ in shared), case.student(rows)])
    q = torch.stack([*(case.log_q[j, w] for _, w in shared), case.of_teacher(others)])
    p, q = p.log_softmax(0), q.log_softmax(0)
    return (loss := (p.exp() * (p - q)).sum()), loss


def x_token(case: Case, g: int, _: int, temperature: float) -> Pair:
    r, j = case.row(g)
    shared = case.sides(g)[0]
    if not shared:
        return (nothing := case.log_p.sum() * 0), nothing
    p = (case.log_p[r, [v for v, _ in shared]] / temperature).log_softmax(0)
    q = (case.log_q[j, [w for _, w in shared]] / temperature).log_softmax(0)
    loss = temperature**2 * (q.exp() * (q - p)).sum()
    return loss, loss


FORMULAS: dict[str, Callable[[Case, int, int, float], Pair]] = {
    "advantage": advantage,
    "alm": alm,
    "uld": uld,
    "gold": gold,
    "gold_bayesian": gold_bayesian,
    "simct": simct,
    "x_token": x_token,
}


def targets_of(case: Case) -> Targets:
    """Return the targets of a case, as the store gives them."""
    rows = len(case.token)
    lists: list[list[tuple[int, float, int]]] = [[] for _ in range(rows)]
    ours, n_kept, tail = [0] * rows, [0] * rows, [0.0] * rows
    span, whole, own, tokens = [-1] * rows, [math.nan] * rows, [math.nan] * rows, [0] * rows
    for g, (of_student, of_teacher) in enumerate(case.spans):
        r, j = case.row(g)
        for i in of_student:
            span[i], tokens[i] = g, len(of_teacher)
            whole[i] = float(case.of_teacher(of_teacher))
            own[i] = float(case.of_teacher([j]))
        listed, kept, others = case.stored(g)
        back = {v: w for w, v in case.twin.items()}
        stored = {w: kept.index(w) if w in kept else NOT_IN_TOPK for w in kept + others}
        ours[r], n_kept[r] = case.student_k, len(kept)
        named = [(v, back.get(v, -1)) for v in listed]
        named += [(-1, w) for w in kept if w not in case.twin]
        for v, w in named:
            q = float(case.log_q[j, w]) if w in stored else -math.inf
            lists[r].append((v, q, stored.get(w, NOT_IN_TOPK)))
        left = [w for w in range(case.teacher.shape[1]) if w not in stored]
        tail[r] = float(case.log_q[j, left].logsumexp(0)) if left else -math.inf
    for r, y in enumerate(case.token):
        if all(v != y for v, _, _ in lists[r]):
            lists[r].append((y, -math.inf, NOT_IN_TOPK))
    return build_targets(
        token=case.token,
        lists=lists,
        ours=ours,
        n_kept=n_kept,
        tail=tail,
        old=case.old.log_softmax(-1),
        weight=case.weight or [1.0] * rows,
        span=span,
        span_log_q=whole,
        span_row_log_q=own,
        span_tokens=tokens,
    )


def build_targets(
    *,
    token: list[int],
    lists: list[list[tuple[int, float, int]]],
    ours: list[int],
    n_kept: list[int],
    tail: list[float],
    old: Tensor,
    weight: list[float],
    span: list[int],
    span_log_q: list[float],
    span_row_log_q: list[float],
    span_tokens: list[int],
    sequence: list[int] | None = None,
    position: list[int] | None = None,
) -> Targets:
    """Return targets of rows with columns (id, log q, rank); old: [P, V] log-probs, or [P] of y."""
    rows, width = len(token), max(map(len, lists)) + 1
    ids = torch.full((rows, width), -1)
    q = torch.full((rows, width), -math.inf, dtype=torch.float64)
    rank = torch.full((rows, width), NOT_IN_TOPK)
    for r, columns in enumerate(lists):
        for c, values in enumerate(columns):
            ids[r, c], q[r, c], rank[r, c] = values
    column = torch.arange(width)
    at_token = old if old.dim() == 1 else old[torch.arange(rows), torch.tensor(token)]
    number = torch.tensor(sequence or [0] * rows)
    nan = torch.full((rows,), math.nan)
    return Targets(
        token=torch.tensor(token),
        weight=torch.tensor(weight, dtype=torch.float64),
        ids=ids,
        q_log_p=q,
        q_rank=rank,
        in_student=column < torch.tensor(ours)[:, None],
        cached=(ids >= 0) & (q > -math.inf),
        token_col=(ids == torch.tensor(token)[:, None]).long().argmax(1),
        n_kept=torch.tensor(n_kept),
        q_log_tail=torch.tensor(tail, dtype=torch.float64),
        q_entropy=nan,
        student_entropy=nan,
        student_logprobs=at_token,
        behavior_logprobs=at_token,
        teacher_logprobs=nan.double(),
        version=torch.zeros(rows, dtype=torch.int64),
        sequence=number,
        position=torch.tensor(position or list(range(rows))),
        student_topk_logprobs=torch.full((rows, width), -math.inf),
        span=torch.tensor(span),
        span_log_q=torch.tensor(span_log_q, dtype=torch.float64),
        span_row_log_q=torch.tensor(span_row_log_q, dtype=torch.float64),
        span_tokens=torch.tensor(span_tokens),
    )
