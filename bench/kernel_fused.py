"""The losses of kernel_losses told by their parts, for the kernels to compute in their launches.

On a CPU, and where the fused form does not apply, the closed forms run.
"""

import torch
from kernel_losses import LOSSES, Teacher
from torch import Tensor

from logitcask.kernels.fused_objective import FusedObjective, OverlapSums
from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveInput

PARTS = {
    "forward_kl_tail": ("forward_kl", "tail"),
    "reverse_kl": ("reverse_kl", "renormalize"),
    "overlap": ("reverse_kl", "renormalize"),
}
FORMS = ("fused", "one program", "plain")


def told(loss: str, teacher: Teacher, k: int, form: str = "fused") -> ObjectiveFn:
    """The loss with a live top-k of k ids; one of FORMS."""
    plain = LOSSES[loss].closed(teacher)
    if form == "plain":
        return plain
    divergence, outside = PARTS[loss]
    everywhere = torch.ones_like(teacher.ids, dtype=torch.bool)
    return FusedObjective(
        plain=plain,
        divergence=divergence,
        outside=outside,
        log_q=teacher.log_q,
        log_tail=teacher.log_tail,
        on=everywhere,
        known=everywhere,
        live_k=k if loss == "overlap" else 0,
        q_rank=torch.zeros_like(teacher.ids),  # all of the teacher's ids count, as in kernel_losses
        kept=torch.full_like(teacher.ids[:, 0], k),
        metric_k=k,
        name_metrics=_named,
        one_program=form == "one program",
    )


def _named(view: ObjectiveInput, sums: OverlapSums) -> dict[str, Tensor]:
    return {
        "entropy": view.entropy,
        "overlap_ratio": sums.shared / sums.k,
        "mass_student": sums.mass_student,
        "mass_teacher": sums.mass_teacher,
    }
