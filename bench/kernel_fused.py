"""The losses of kernel_losses as FusedObjectives, which the kernels compute in their launches.

On a CPU, and where the fused form does not apply, the closed forms run.
"""

import torch
from kernel_losses import LOSSES, Teacher
from torch import Tensor

from logitcask.kernels.fused_objective import FusedObjective, OverlapSums
from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveInput

PARTS = {
    "forward_kl_tail": ("forward_kl", "bucket"),
    "reverse_kl": ("reverse_kl", "renormalize"),
    "overlap": ("reverse_kl", "renormalize"),
}
FORMS = ("fused", "plain")


def make_objective(loss: str, teacher: Teacher, k: int, form: str = "fused") -> ObjectiveFn:
    """Return the loss with a live top-k of k ids; form is one of FORMS."""
    plain = LOSSES[loss].closed(teacher)
    if form == "plain":
        return plain
    divergence, tail = PARTS[loss]
    everywhere = torch.ones_like(teacher.ids, dtype=torch.bool)
    return FusedObjective(
        plain=plain,
        divergence=divergence,
        tail=tail,
        log_q=teacher.log_q,
        log_tail=teacher.log_tail,
        mask=everywhere,
        known=everywhere,
        live_k=k if loss == "overlap" else 0,
        q_rank=torch.zeros_like(teacher.ids),  # all of the teacher's ids count, as in kernel_losses
        n_kept=torch.full_like(teacher.ids[:, 0], k),
        metric_k=k,
        name_metrics=_name_metrics,
    )


def _name_metrics(view: ObjectiveInput, sums: OverlapSums) -> dict[str, Tensor]:
    return {
        "entropy": view.entropy,
        "overlap_ratio": sums.shared / sums.k,
        "mass_student": sums.mass_student,
        "mass_teacher": sums.mass_teacher,
    }
