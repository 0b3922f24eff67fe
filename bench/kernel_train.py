"""The loss that `train` runs on a known support, with and without an update's metrics.

It needs the engine and what that imports; the other providers need torch and Triton alone.
"""

import torch
from kernel_calls import Call, Make, Results, leaves
from kernel_losses import Teacher
from kernel_shapes import Case


def trained(*, frozen: bool = False, measured: bool = False) -> Make:
    """Return calls of pack_loss; measured: with the metrics of one update in STEPS."""

    def make(case: Case) -> Call:
        from logitcask.engine.objectives import Objective
        from logitcask.engine.training.metric_sampling import ROWS
        from logitcask.engine.training.pack_loss import pack_loss

        objective = Objective(
            support="teacher",
            divergence="reverse_kl",
            tail="renormalize",
            estimator="divergence",
            k=case.shape.K,
        )
        targets, fraction = _targets(case.teacher), 0.0
        if measured:
            fraction = min(1.0, ROWS / case.shape.T)

        def call() -> Results:
            inputs = leaves(case.hidden, None if frozen else case.weight)
            head = case.weight if frozen else inputs[1]
            assert head is not None
            loss = pack_loss(
                objective, inputs[0], head, targets, n_vocab=len(head), metrics_fraction=fraction
            ).loss
            return loss, *torch.autograd.grad(loss, inputs)

        return call

    return make


def _targets(teacher: Teacher) -> object:
    """Return the engine's targets of a teacher's rows; the token is the best id."""
    from logitcask.engine.packing.targets import Targets

    ids, log_q = teacher.ids, teacher.log_q
    number, value = ids[:, 0].contiguous(), log_q[:, 0].contiguous()
    none, every = torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    return Targets(
        token=number,
        weight=torch.ones_like(value),
        ids=ids,
        q_log_p=log_q,
        q_rank=torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous(),
        in_student=none,
        cached=every,
        token_col=torch.zeros_like(number),
        n_kept=torch.full_like(number, ids.shape[1]),
        q_log_tail=teacher.log_tail,
        q_entropy=torch.zeros_like(value),
        student_entropy=torch.zeros_like(value),
        student_logprobs=value,
        behavior_logprobs=value,
        teacher_logprobs=value,
        version=torch.zeros_like(number),
        sequence=torch.zeros_like(number),
        position=torch.arange(len(ids), device=ids.device),
        student_topk_logprobs=torch.full_like(log_q, -torch.inf),
    )
