"""ULD and GOLD: distributions at one row of each span, compared by sorted probabilities.

ULD, arXiv 2402.12030: sum_k |p_(k) - q_(k)|, probabilities in descending order, so that no map of
the vocabularies is needed. It does not see which ids they are of. The source pairs positions by
their index; here both are at the start of a span.

GOLD, TRL's experimental GOLDTrainer: the distributions of a span of several tokens are merged,

    observed  P(v) = P_first(v) prod of P(u_j) over the later tokens
    bayesian  P(v) = P_last(v) prod of P(u_j) over the earlier tokens

and compared by JSD_beta on the ids of equal bytes (`divergences.jsd` of the merged values, whose
sum is below 1) and by sorted L1 on the others. Both parts have weight 1, as in NeMo-RL's gold
mode; TRL's default weights are |matched| / V and the rest, of its vocabularies. `observed` as
released is one row late: it reads the probability that the token after u_j is u_j again, which no
cache of realised tokens has. Here row j predicts u_j. The source's clamps at 1e-8 are left out.
"""

import torch
from torch import Tensor

from logitcask.engine.objectives.divergences import jsd
from logitcask.engine.objectives.spans.log_probs import SpanLogProbs


def uld(x: SpanLogProbs, k: int, _: float) -> Tensor:
    """Return [G] the lower bound of the sorted L1 distance: see uld_bounds."""
    return uld_bounds(x, k)[0]


def uld_bounds(x: SpanLogProbs, k: int) -> tuple[Tensor, Tensor]:
    """Return [G] the lower bound of the sorted L1 distance, and the width to its upper bound.

    With K ranks of both known, and t_p, t_q the masses beyond:

        sum_k<=K |p_(k) - q_(k)| + |t_p - t_q| <= distance <= the same sum + t_p + t_q

    K <= k: the teacher's kept ids, and the best ids of the current student as far as they are
    columns. Probabilities, not nats.
    """
    at, rows = x.at(x.first), x.rows.at(x.first)
    live = x.topk_index[x.first].clamp(max=k)  # k for an id beyond
    is_listed = torch.zeros(len(live), k + 1, device=live.device, dtype=torch.int64)
    ranks = is_listed.scatter(1, live, 1)[:, :k].cumprod(1).sum(1).minimum(rows.n_kept)[:, None]
    p, q = at.log_p.exp(), at.log_q.exp()
    p = torch.where(live < ranks, p, 0.0).sort(1, descending=True).values
    q = torch.where(rows.q_rank < ranks, q, 0.0).sort(1, descending=True).values
    p_tail, q_tail = 1 - p.sum(1), 1 - q.sum(1)
    value = (p - q).abs().sum(1) + (p_tail - q_tail).abs()
    return value, 2 * p_tail.minimum(q_tail).clamp(min=0)


def gold(x: SpanLogProbs, _: int, beta: float) -> Tensor:
    """Return [G] the hybrid loss of `observed` merges, of the ids at the start of each span."""
    return _hybrid(x, x.first, beta)


def gold_bayesian(x: SpanLogProbs, _: int, beta: float) -> Tensor:
    """Return [G] the hybrid loss of `bayesian` merges, of the ids at the last row of each span."""
    return _hybrid(x, x.last, beta)


def _hybrid(x: SpanLogProbs, row: Tensor, beta: float) -> Tensor:
    at = x.at(row)
    # Log-probs of the span's other tokens.
    p_others = torch.where(x.known, x.student - x.token_log_p[row], 0.0)[:, None]
    q_row = x.rows.require("span_row_log_q")[row].to(x.log_p.dtype)
    q_others = torch.where(x.known, x.teacher - q_row, 0.0)[:, None]
    log_p, log_q = at.log_p + p_others, at.log_q + q_others
    matched = jsd(
        torch.where(at.shared, log_p, 0.0), torch.where(at.shared, log_q, 0.0), at.shared, beta
    )
    ours = torch.where(at.ours, log_p.exp(), 0.0).sort(1, descending=True).values
    theirs = torch.where(at.theirs, log_q.exp(), 0.0).sort(1, descending=True).values
    return matched + (ours - theirs).abs().sum(1)
