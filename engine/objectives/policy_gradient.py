"""The policy-gradient estimator: -sum_S w A grad log p, A = log q - log p and w held fixed.

It follows the released code of arXiv 2604.13016 (compute_distillation_reward). The loss shown is
-sum_S w A. For the sampled token w = 1, and the mean over draws is the gradient of KL(p || q)
(Eq.3). For ids that were drawn several times w is an id's share of the draws (arXiv 2606.24143).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from logitcask.engine.metrics.metrics import renormalised
from logitcask.engine.objectives.modifiers import Modifier
from logitcask.engine.objectives.supports import LossTerms, SupportLogProbs


def student_p(inputs: SupportLogProbs, log_p: Tensor) -> Tensor:
    """Return p renormalised on S."""
    return renormalised(log_p, inputs.mask).exp()


def teacher_p(inputs: SupportLogProbs, log_p: Tensor) -> Tensor:
    """Return q renormalised on S."""
    return renormalised(inputs.log_q, inputs.mask).exp()


def none(inputs: SupportLogProbs, log_p: Tensor) -> Tensor:
    """Return 1 / |S|."""
    return inputs.mask.to(log_p.dtype) / inputs.mask.sum(-1, keepdim=True).clamp(min=1)


WEIGHTS: dict[str, Callable[[SupportLogProbs, Tensor], Tensor]] = {
    "student_p": student_p,
    "teacher_p": teacher_p,
    "none": none,
}
"""The released code's REWARD_WEIGHT_MODE."""


def policy_gradient(
    weights: str, modifiers: Sequence[Modifier], inputs: SupportLogProbs
) -> LossTerms:
    """Return the loss and gradient of C rows; `weights` is a key of WEIGHTS."""
    mask = inputs.mask
    log_p = inputs.log_p if inputs.log_p_old is None else inputs.log_p_old
    if inputs.support == "mc":
        counts = inputs.rows.require("mc_count").to(log_p.dtype)
        w = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    else:
        w = WEIGHTS[weights](inputs, log_p)
    a = torch.where(mask, inputs.log_q, 0.0) - torch.where(mask, log_p, 0.0)
    for modifier in modifiers:
        a = modifier.adjust_advantage(a, inputs)
    loss = g = torch.where(mask, -w * a, 0.0)
    for modifier in modifiers:
        loss, g = modifier.adjust_gradient(loss, g, inputs)
    return LossTerms.of_log_p(loss.sum(-1), g)
