"""Our losses in the form that other projects call theirs: the engine's objectives on our kernels.

Letters: P rows, V vocabulary, S listed ids, D hidden size. p is the student, q the teacher. Each
call adds to CALLS, so that a case that never reaches our code is not counted as one that holds.
"""

from collections import Counter

import torch
from torch import Tensor

from logitcask.engine.objectives import Objective, current_topk, row_objective
from logitcask.engine.packing.targets import Targets
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.logit_transform import LogitTransform
from logitcask.kernels.objective_input import SparseLoss
from logitcask.kernels.row_grad import row_grad
from logitcask.kernels.row_stats import row_stats
from logitcask.kernels.sparse_kl import sparse_kl

CALLS: Counter[str] = Counter()
"""Name of our op -> calls."""


def objective(
    divergence: str, k: int, tail: str = "bucket", parameter: float | None = None
) -> Objective:
    """Return a divergence on the teacher's k ids."""
    return Objective(
        support="teacher",
        divergence=divergence,
        tail=tail,
        estimator="divergence",
        k=k,
        parameter=parameter,
    )


def jsd_objective(beta: float, k: int) -> Objective:
    """Return the generalised JSD of beta on all k ids; forward KL for 0 and reverse KL for 1."""
    if beta in (0, 1):
        return objective("reverse_kl" if beta else "forward_kl", k, "renormalize")
    return objective("jsd", k, "renormalize", float(beta))


def targets(ids: Tensor, log_q: Tensor, log_tail: Tensor | None = None) -> Targets:
    """Return the rows of a teacher with log-probs log_q [P, S] at ids [P, S], best first.

    log_tail: [P] log of its mass elsewhere; None: what the listed mass leaves.
    """
    log_q = log_q.detach().float()
    n_rows, n_ids = ids.shape
    if log_tail is None:
        log_tail = torch.log1p(-log_q.double().exp().sum(-1).clamp(max=1.0)).float()
    nothing = torch.full((n_rows,), torch.nan, device=ids.device)
    none = torch.zeros(n_rows, dtype=torch.int64, device=ids.device)
    order = torch.arange(n_ids, device=ids.device).expand(n_rows, n_ids).contiguous()
    return Targets(
        token=ids[:, 0],
        weight=torch.ones_like(nothing),
        ids=ids,
        q_log_p=log_q,
        q_rank=order,
        in_student=torch.zeros_like(ids, dtype=torch.bool),
        cached=torch.ones_like(ids, dtype=torch.bool),
        token_col=none,
        n_kept=torch.full_like(none, n_ids),
        q_log_tail=log_tail,
        q_entropy=nothing,
        student_entropy=nothing,
        student_logprobs=nothing,
        behavior_logprobs=nothing,
        teacher_logprobs=log_q[:, 0],
        version=none,
        sequence=none,
        position=torch.arange(n_rows, device=ids.device),
        student_topk_logprobs=torch.full_like(log_q, -torch.inf),
    )


def whole_vocabulary(log_q: Tensor) -> Targets:
    """Return the rows of a teacher whose log-probs [P, V] are all listed."""
    n_rows, n_vocab = log_q.shape
    ids = torch.arange(n_vocab, device=log_q.device).expand(n_rows, n_vocab).contiguous()
    return targets(ids, log_q, torch.full((n_rows,), -torch.inf, device=log_q.device))


def from_logits(
    logits: Tensor,
    rows: Targets,
    loss: Objective,
    weight: Tensor | None = None,
    temperature: float = 1.0,
) -> SparseLoss:
    """Return the loss of logits [P, V]; weight: [P] factors of the rows' losses, default 1."""
    CALLS["sparse_kl"] += 1
    return sparse_kl(
        logits.contiguous(),
        rows.ids,
        row_objective(loss, rows),
        k=current_topk(loss, logits.shape[1]),
        row_weight=weight,
        logit_transform=LogitTransform(temperature=temperature),
    )


def from_hidden(
    hidden: Tensor,
    head: Tensor,
    rows: Targets,
    loss: Objective,
    weight: Tensor | None = None,
    **transform: float | None,
) -> SparseLoss:
    """Return the loss of hidden states [P, D] and a head [V, D]; transform: as LogitTransform."""
    CALLS["linear_sparse_kl"] += 1
    settings = {name: value for name, value in transform.items() if value is not None}
    return linear_sparse_kl(
        hidden.contiguous(),
        head.to(hidden.dtype),
        rows.ids,
        row_objective(loss, rows),
        k=current_topk(loss, len(head)),
        row_weight=weight,
        logit_transform=LogitTransform(**settings),
    )


def jsd_from_logits(
    student: Tensor,
    teacher: Tensor,
    beta: float,
    weight: Tensor | None = None,
    temperature: float = 1.0,
) -> SparseLoss:
    """Return the generalised JSD of logits [P, V] of both, over the whole vocabulary."""
    z = teacher.detach().float() / temperature
    log_q = z - row_stats(z).log_sum_exp[:, None]
    loss = jsd_objective(beta, student.shape[1])
    return from_logits(student, whole_vocabulary(log_q), loss, weight, temperature)


def label_rows(labels: Tensor) -> Targets:
    """Return the rows of a teacher that gives each label [P] all of its mass."""
    nothing = torch.full((len(labels),), -torch.inf, device=labels.device)
    return targets(labels[:, None], torch.zeros_like(nothing)[:, None], nothing)


def mean_weight(labels: Tensor, ignored: int) -> Tensor:
    """Return [P] weights of a mean over the rows whose label is not `ignored`."""
    counted = labels != ignored
    return counted.float() / counted.sum().clamp(min=1)


class LogProbs(torch.autograd.Function):
    """Log-probs [P, K] at ids [P, K] of logits [P, V], by row_stats and row_grad.

    The ids of a row may repeat: row_grad, which takes each once, gets the sum of their gradients.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        CALLS["row_stats"] += 1
        lse = row_stats(logits).log_sum_exp
        ctx.save_for_backward(logits, ids, lse)
        return (logits.gather(1, ids).float() - lse[:, None]).to(logits.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        CALLS["row_grad"] += 1
        logits, ids, lse = ctx.saved_tensors
        grad, order = grad.float(), ids.sort(1)
        grad, ids = grad.gather(1, order.indices), order.values
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        slot = first.long().cumsum(1) - 1  # of each distinct id
        merged = torch.zeros_like(grad).scatter_add_(1, slot, grad)
        distinct = torch.full_like(ids, -1).scatter_(1, slot, ids)
        dense = -grad.sum(1)
        p = (logits.gather(1, distinct.clamp(min=0)).float() - lse[:, None]).exp()
        return row_grad(logits, lse, dense, distinct, merged + dense[:, None] * p), None
