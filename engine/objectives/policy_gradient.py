"""The advantage form: -sum_S w A grad log p, A = log q - log p and w held fixed, as the released
code of arXiv 2604.13016 has it (compute_distillation_reward). The loss shown is -sum_S w A.

On the sampled token w = 1, and the mean over draws is the gradient of KL(p || q) (Eq.3). On ids
drawn m times in all w is an id's share of the draws (arXiv 2606.24143).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from logitcask.engine.metrics.metrics import renormalised
from logitcask.engine.objectives.modifier import Modifier
from logitcask.engine.objectives.support_log_probs import LossTerms, SupportLogProbs


def student_p(columns: SupportLogProbs, log_p: Tensor) -> Tensor:
    """p renormalised on S."""
    return renormalised(log_p, columns.on).exp()


def teacher_p(columns: SupportLogProbs, log_p: Tensor) -> Tensor:
    """q renormalised on S."""
    return renormalised(columns.log_q, columns.on).exp()


def none(columns: SupportLogProbs, log_p: Tensor) -> Tensor:
    """1 / |S|."""
    return columns.on.to(log_p.dtype) / columns.on.sum(-1, keepdim=True).clamp(min=1)


WEIGHTS: dict[str, Callable[[SupportLogProbs, Tensor], Tensor]] = {
    "student_p": student_p,
    "teacher_p": teacher_p,
    "none": none,
}
"""The released code's REWARD_WEIGHT_MODE."""


def advantage(weights: str, modifiers: Sequence[Modifier], columns: SupportLogProbs) -> LossTerms:
    on = columns.on
    log_p = columns.log_p if columns.log_p_then is None else columns.log_p_then
    if columns.support == "mc":
        count = columns.rows.held("mc_count").to(log_p.dtype)
        w = count / count.sum(-1, keepdim=True).clamp(min=1)
    else:
        w = WEIGHTS[weights](columns, log_p)
    a = torch.where(on, columns.log_q, 0.0) - torch.where(on, log_p, 0.0)
    for modifier in modifiers:
        a = modifier.advantage(a, columns)
    loss = g = torch.where(on, -w * a, 0.0)
    for modifier in modifiers:
        loss, g = modifier.terms(loss, g, columns)
    return LossTerms.of_log_p(loss.sum(-1), g)
