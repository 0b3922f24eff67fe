"""FusedObjectives of artificial cached rows, and the same objectives in plain torch.

The plain form is a loss of log p at the listed ids, so that it serves as an ObjectiveFn (by
autograd on K-sized tensors) and through log_softmax of whole rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from kernel_cases import list_top, make_ids
from kernel_objectives import Loss, objective
from torch import Tensor

from logitcask.engine.metrics.metrics import METRICS, compute_metrics
from logitcask.engine.packing.targets import NOT_IN_TOPK, Targets
from logitcask.kernels.fused_maths import TAIL_FLOOR
from logitcask.kernels.fused_objective import CUT, DIVERGENCES, TAILS, FusedObjective, OverlapSums
from logitcask.kernels.objective_input import ObjectiveGrad, ObjectiveInput

SUPPORTS = ("fixed", "overlap", "frozen", "union", "non_overlap", "sampled")
KINDS = [(d, o) for d in DIVERGENCES for o in TAILS if d in CUT.get(o, DIVERGENCES)]
SOME_KINDS = KINDS[::3]
"""Every divergence, and every tail, for tests of the interpreter that need not have all pairs."""
METRIC_K = 4


@dataclass(frozen=True)
class CachedRows:
    """A teacher's cached scores of P rows at S listed ids."""

    ids: Tensor
    log_q: Tensor
    log_tail: Tensor
    mask: Tensor
    known: Tensor
    q_rank: Tensor
    n_kept: Tensor
    live_k: int

    def to(self, dtype: torch.dtype) -> "CachedRows":
        return replace(self, log_q=self.log_q.to(dtype), log_tail=self.log_tail.to(dtype))


def make_cached(
    logits: Tensor, n_ids: int, support: str = "fixed", *, n_vocab: int | None = None, seed: int = 0
) -> CachedRows:
    """Make rows with the student's best ids first, so that the overlap is not empty."""
    z = logits.detach()[:, :n_vocab].float().cpu()
    n_rows, generator = len(z), torch.Generator().manual_seed(seed)
    ids = list_top(make_ids(n_rows, z.shape[1], n_ids, seed), z, min(2, n_ids))
    raw = torch.randn(n_rows, n_ids + 1, generator=generator) * 2
    raw[:, :-1].masked_fill_(ids < 0, -torch.inf)
    log_q = raw.log_softmax(-1)
    log_q, log_tail = log_q[:, :-1], log_q[:, -1]
    order = log_q.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    n_kept = torch.randint(1, n_ids + 1, (n_rows,), generator=generator)
    real = ids >= 0
    n_kept = torch.minimum(n_kept, real.sum(1))
    q_rank = torch.where(real & (order < n_kept[:, None]), order, NOT_IN_TOPK)
    column = torch.arange(n_ids)
    known = real & ((q_rank < NOT_IN_TOPK) | (column < n_ids // 2))
    student = real & (column < n_ids // 2)
    teacher = real & (q_rank < max(1, n_ids // 2))
    mask = {
        "fixed": teacher,
        "overlap": teacher,
        "frozen": student,
        "union": teacher | student,
        "non_overlap": teacher ^ student,
        "sampled": column.expand_as(ids) == 0,
    }[support]
    live_k = 3 if support == "overlap" else 0
    tensors = (ids, log_q, log_tail, mask, known, q_rank, n_kept)
    return CachedRows(*(t.to(logits.device) for t in tensors), live_k)


def plain_loss(cached: CachedRows, divergence: str, tail: str, parameter: float = 0.3) -> Loss:
    """Return the loss [C] as a function of log p [C, S], for autograd."""

    def loss(log_p: Tensor, index: Tensor, top_ids: Tensor) -> Tensor:
        log_q, mask = cached.log_q[index].to(log_p.dtype), cached.mask[index]
        if cached.live_k:
            top = top_ids[:, : cached.live_k]
            mask = mask & (cached.ids[index][:, :, None] == top[:, None, :]).any(-1)
        mask = mask & (log_p != -torch.inf) & (log_q != -torch.inf)
        left = torch.where(cached.known[index] & ~mask, log_q, -torch.inf)
        log_tail = cached.log_tail[index].to(log_p.dtype)[:, None]
        log_p, log_q_on = (torch.where(mask, x, -1e9) for x in (log_p, log_q))
        if tail == "bucket":
            r = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=TAIL_FLOOR.value)
            bucket = torch.cat([log_tail, left], -1).logsumexp(-1, keepdim=True)
            mask = torch.cat([mask, bucket > -torch.inf], -1)
            log_p = torch.cat([log_p, r.log()], -1)
            log_q_on = torch.cat([log_q_on, bucket], -1).log_softmax(-1)
        elif tail == "zero":  # one more id, to which the teacher gives next to nothing
            some, log_q_on = mask.any(-1, keepdim=True), log_q_on.log_softmax(-1)
            r = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-30)
            mask = torch.cat([mask, some], -1)
            log_p = torch.cat([log_p, r.log()], -1)
            log_q_on = torch.cat([log_q_on, torch.full_like(r, -1e4)], -1)
        elif tail == "renormalize":
            log_p, log_q_on = log_p.log_softmax(-1), log_q_on.log_softmax(-1)
        log_p, log_q_on = (torch.where(mask, x, 0.0) for x in (log_p, log_q_on))
        terms = COMPARED[divergence](log_p, log_q_on, torch.tensor(parameter, dtype=log_p.dtype))
        return torch.where(mask, terms, 0.0).sum(-1)

    return loss


def _mixed(log_p: Tensor, log_q: Tensor, b: Tensor) -> Tensor:
    return torch.logaddexp(log_q + b.log(), log_p + (1 - b).log())


def _jsd(log_p: Tensor, log_q: Tensor, b: Tensor) -> Tensor:
    m = _mixed(log_p, log_q, b)
    return b * log_q.exp() * (log_q - m) + (1 - b) * log_p.exp() * (log_p - m)


def _skew_reverse(log_p: Tensor, log_q: Tensor, b: Tensor) -> Tensor:
    return log_p.exp() * (log_p - _mixed(log_q, log_p, b))


def _alpha(log_p: Tensor, log_q: Tensor, b: Tensor) -> Tensor:
    power = (b * log_q + (1 - b) * log_p).exp()
    return (b * log_q.exp() + (1 - b) * log_p.exp() - power) / (b * (1 - b))


COMPARED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "reverse_kl": lambda log_p, log_q, _: log_p.exp() * (log_p - log_q),
    "forward_kl": lambda log_p, log_q, _: log_q.exp() * (log_q - log_p),
    "jsd": _jsd,
    "skew": lambda log_p, log_q, b: log_q.exp() * (log_q - _mixed(log_p, log_q, b)),
    "skew_reverse": _skew_reverse,
    "alpha": _alpha,
    "mixed_kl": lambda p, q, b: (b * q.exp() - (1 - b) * p.exp()) * (q - p),
}

ENGINE = {
    "overlap/ratio": lambda sums: sums.shared / sums.k,
    "overlap/mass_student": lambda sums: sums.mass_student,
    "overlap/mass_teacher": lambda sums: sums.mass_teacher,
    "overlap/advantage": lambda sums: sums.advantage,
    "overlap/empty_share": lambda sums: (sums.shared == 0).float(),
    "cache/coverage": lambda sums: sums.coverage,
    "cache/uncached_mass": lambda sums: sums.uncached_mass,
}
"""The engine's metrics that the fused sums give."""
assert METRICS.keys() >= ENGINE.keys()


def targets_of(cached: CachedRows) -> Targets:
    """Return the rows as the engine's Targets, with zeros where no support or sum reads."""
    row, none = cached.log_tail.new_zeros(len(cached.ids)), torch.zeros_like(cached.n_kept)
    return Targets(
        token=none,
        weight=row,
        ids=cached.ids,
        q_log_p=cached.log_q,
        q_rank=cached.q_rank,
        in_student=cached.known,
        cached=cached.known,
        token_col=none,
        n_kept=cached.n_kept,
        q_log_tail=cached.log_tail,
        q_entropy=row,
        student_entropy=row,
        student_logprobs=row,
        behavior_logprobs=row,
        teacher_logprobs=row,
        version=none,
        sequence=none,
        position=none,
        student_topk_logprobs=cached.log_q,
    )


def plain_metrics(cached: CachedRows, view: ObjectiveInput) -> dict[str, Tensor]:
    """Return the metrics of the engine's own functions."""
    metrics = compute_metrics(view, targets_of(cached).at(view.index), k=METRIC_K)
    return {name: metrics[name] for name in ENGINE} | {"entropy": view.entropy}


def named(view: ObjectiveInput, sums: OverlapSums) -> dict[str, Tensor]:
    return {name: f(sums) for name, f in ENGINE.items()} | {"entropy": view.entropy}


def fused(cached: CachedRows, divergence: str, tail: str, parameter: float = 0.3):
    """Return the FusedObjective and its plain form."""
    objective_fn = objective(plain_loss(cached, divergence, tail, parameter))

    def plain(view: ObjectiveInput) -> ObjectiveGrad:
        return objective_fn(view)._replace(metrics=plain_metrics(cached, view))

    fields = {name: value for name, value in vars(cached).items() if name != "ids"}
    fused_objective = FusedObjective(
        plain=plain,
        divergence=divergence,
        parameter=parameter,
        tail=tail,
        metric_k=METRIC_K,
        name_metrics=named,
        **fields,
    )
    return fused_objective, plain
