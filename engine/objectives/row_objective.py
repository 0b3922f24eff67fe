"""An objective at work: from what is seen of C rows to their loss and its gradient.

Gradients come from autograd on [C, S] tensors: a divergence is its formula and nothing else.
With g_v = dL / d log p_v, and a tail bucket r = 1 - sum_S p with g_r = dL / d log r:

    no tail    dL/dz_v = g_v [v in S] - (sum g) p_v
    tail       dL/dz_v = g_v - (sum g + g_r) p_v              v in S
                       = (g_r / r - sum g - g_r) p_v          elsewhere

The terms near 1/r are only where they belong: for forward KL dL/dz_v is exactly p_v - q_v on S.

An id whose log-prob is -inf on either side leaves the support: no finite step of the student brings
it closer. With a tail its mass goes there. NaN stays NaN, so a broken student shows in its loss.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.metrics import METRIC_K, renormalised, row_metrics
from logitcask.engine.objectives.divergences import DIVERGENCES, Divergence
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.supports import SUPPORTS
from logitcask.engine.targets import BEYOND, Targets
from logitcask.kernels.sparse_kl import RowGrad, RowObjective, RowView

TAIL_FLOOR = {torch.float32: 2.0**-18, torch.float64: 1e-14}
"""Least r that a tail is given, about the error of 1 - sum p: log p = z - log-sum-exp is rounded at
the size of z, and 2^-18 is float32's spacing between 32 and 64.

Below it the loss sees log r no further down, on S the gradient stays as it is, and the pull on the
ids outside, p_v (g_r / r - ...), is weaker than the true one. A lower floor would let rounding make
it many times stronger: g_r is the teacher's tail, and r may be 10 times what is left of it.
"""


class Columns(NamedTuple):
    """C rows as a form sees them."""

    log_p: Tensor
    """[C, S] of the live student."""
    log_q: Tensor
    """[C, S]"""
    on: Tensor
    """[C, S] bool, the support; both log-probs are above -inf there."""
    log_q_outside: Tensor
    """[C], log of the teacher's mass outside the support."""


class Step(NamedTuple):
    """A RowGrad without metrics."""

    loss: Tensor
    at_ids: Tensor
    dense: Tensor
    dense_at_ids: Tensor


def live_k(objective: Objective, n_vocab: int, *, metric_k: int = METRIC_K) -> int:
    """How many live top ids a RowView must hold for this objective and the metrics."""
    wanted = objective.k if objective.support == "overlap" else 1
    return min(max(wanted, metric_k), n_vocab)


def row_objective(
    objective: Objective, targets: Targets, *, metric_k: int = METRIC_K
) -> RowObjective:
    """`objective` on the rows of `targets`, as the kernels call it; `view.index` picks the rows.

    The kernels' k must be `live_k(objective, n_vocab)`; a smaller one raises ObjectiveError.
    """
    support = SUPPORTS[objective.support]
    divergence = DIVERGENCES[objective.divergence]
    step = OUTSIDE[objective.outside]

    def answer(view: RowView) -> RowGrad:
        rows = targets.at(view.index)
        if objective.support == "overlap":
            _check_live(objective, view, rows)
        log_q = rows.q_log_p.to(view.log_p.dtype)
        places = rows.places(view.top_ids)
        on = support(places, rows, objective.k)
        on = on & (view.log_p != -torch.inf) & (log_q != -torch.inf)
        left = torch.where(rows.cached & ~on, log_q, -torch.inf)
        tail = rows.q_log_tail.to(log_q.dtype)[:, None]
        log_q_outside = torch.cat([tail, left], -1).logsumexp(-1)
        made = step(divergence, Columns(view.log_p, log_q, on, log_q_outside))
        return RowGrad(*made, metrics=row_metrics(view, rows, k=metric_k, places=places))

    return answer


def is_renormalised(objective: Objective) -> bool:
    """Whether it sees log p up to a constant of the row, so that its gradient sums to zero over the
    support. Its form proves it: no advantage does so, that of `opd_released` included.
    """
    return objective.form == "divergence" and objective.outside == "renormalize"


def has_known_support(objective: Objective) -> bool:
    """Whether the store alone says which ids it looks at; else the live student has a say."""
    return objective.support != "overlap"


def support_objective(objective: Objective, targets: Targets) -> tuple[Tensor, RowObjective]:
    """A renormalised objective on a known support: the support's ids [P, S], -1 where a row has
    fewer, and the objective on them, without metrics, as indexed_linear calls it.
    """
    divergence = DIVERGENCES[objective.divergence]
    nowhere = torch.full_like(targets.ids, BEYOND)
    on = SUPPORTS[objective.support](nowhere, targets, objective.k) & (targets.ids >= 0)
    first = on.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : objective.k]
    ids = torch.where(on, targets.ids, -1).gather(1, first)
    log_q_at = torch.where(on, targets.q_log_p, -torch.inf).gather(1, first)

    def answer(view: RowView) -> RowGrad:
        log_q = log_q_at[view.index].to(view.log_p.dtype)
        on = (view.log_p != -torch.inf) & (log_q != -torch.inf)
        outside = log_q.new_full((len(log_q),), torch.nan)  # a renormalised loss never looks there
        return RowGrad(*_renormalize(divergence, Columns(view.log_p, log_q, on, outside)), {})

    return ids, answer


def _renormalize(divergence: Divergence, columns: Columns) -> Step:
    """D(p~, q~), both renormalised on S. It does not see the mass on S, so sum g = 0 exactly."""
    log_q = renormalised(columns.log_q, columns.on)
    loss, g = _derive(
        lambda log_p: divergence(renormalised(log_p, columns.on), log_q, columns.on), columns.log_p
    )
    return Step(loss, g, torch.zeros_like(loss), torch.zeros_like(g))


def _tail(divergence: Divergence, columns: Columns) -> Step:
    """D of the two distributions coarsened to S and one bucket; a lower bound of the full D.

    The bucket is one more column. It is left out where the teacher has no mass outside S at all.
    """
    on = columns.on
    p = torch.where(on, columns.log_p.exp(), 0.0)
    r = (1 - p.sum(-1, keepdim=True)).clamp(min=TAIL_FLOOR[p.dtype])
    log_q_tail = columns.log_q_outside[:, None]
    on_all = torch.cat([on, log_q_tail != -torch.inf], -1)
    log_p_all = torch.where(on_all, torch.cat([columns.log_p, r.log()], -1), 0.0)
    log_q_all = torch.where(on_all, torch.cat([columns.log_q, log_q_tail], -1), -torch.inf)
    # Stored log-probs are rounded: their mass with the tail is 1 to some 1e-4, and a law's is 1.
    log_q_all = torch.where(on_all, log_q_all - log_q_all.logsumexp(-1, keepdim=True), 0.0)
    loss, g_all = _derive(lambda log_p: divergence(log_p, log_q_all, on_all), log_p_all)
    at_ids, g_r = g_all[:, :-1], g_all[:, -1:]
    inside = -g_all.sum(-1, keepdim=True)
    outside = g_r / r + inside
    return Step(loss, at_ids, outside[:, 0], torch.where(on, inside, outside))


def _advantage(_: Divergence, columns: Columns) -> Step:
    """-sum_S A grad log p, A = -w (log p - log q) held fixed, w = p renormalised on S. The loss is
    -sum_S A. On one id w = 1. From the released code of arXiv 2604.13016; see presets.
    """
    on = columns.on
    w = renormalised(columns.log_p, on).exp()
    ratio = torch.where(on, columns.log_p, 0.0) - torch.where(on, columns.log_q, 0.0)
    g = torch.where(on, w * ratio, 0.0)
    loss = g.sum(-1)
    return Step(loss, g, -loss, (-loss)[:, None].expand_as(g))


OUTSIDE: dict[str, Callable[[Divergence, Columns], Step]] = {
    "renormalize": _renormalize,
    "tail": _tail,
    "ignore": _advantage,
}
"""What an objective does outside its support decides its gradient; `ignore` is the advantage."""


def _derive(loss_of: Callable[[Tensor], Tensor], log_p: Tensor) -> tuple[Tensor, Tensor]:
    """loss [C] and its derivative by log_p [C, S]; the kernels call with gradients off."""
    with torch.enable_grad():
        leaf = log_p.detach().requires_grad_()
        loss = loss_of(leaf)
        (g,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), g


def _check_live(objective: Objective, view: RowView, rows: Targets) -> None:
    have = view.top_ids.shape[1]
    # A vocabulary smaller than k is no mistake; there no teacher keeps more than `have` ids.
    if have < objective.k and bool((rows.kept > have).any()):
        raise ObjectiveError(
            f"the kernel selects {have} live ids, and the objective's overlap needs {objective.k}",
            remedy="pass k = live_k(objective, n_vocab) to the kernel",
        )
