"""Losses of other projects: their package if it is installed, else their formula in eager torch.

verl, TRL, DistillKit: eager torch on logits. Liger-Kernel, Apple's Cut Cross-Entropy, fla and torch
have fused kernels, but with dense targets or one label: none of them has a loss on K ids.
`computes` names the results of each, and the missing parts.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
from kernel_calls import Call, Make, Results, leaves
from kernel_losses import metrics
from kernel_providers import from_hidden, from_logits, with_whole_head
from kernel_shapes import Case
from torch import Tensor
from torch.nn import functional as F

CHUNK_ROWS = 4096
"""Default of verl's chunked form."""
CLAMP = -10.0
"""verl's default floor of both log-probs; it also cuts the gradient."""


# In eager torch, from logits or from hidden states and the whole head.


def _inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """Return the leaves of a case, and its logits as a function of them."""
    inputs = leaves(case.logits) if case.logits is not None else leaves(case.hidden, case.weight)
    return inputs, inputs[0] if len(inputs) == 1 else F.linear(*inputs)


def _verl(case: Case) -> Call:
    """Return a call of verl's earlier forward_kl_topk: log_softmax in the logits' dtype."""

    def call() -> Results:
        inputs, z = _inputs(case)
        return _verl_loss(case, inputs, z, z.log_softmax(-1).gather(1, case.teacher.ids))

    return call


def _verl_chunked(case: Case) -> Call:
    """Return a call of the present one: float32 log-sum-exp of CHUNK_ROWS a chunk."""

    def call() -> Results:
        inputs, z = _inputs(case)
        parts = []
        for start in range(0, case.shape.T, CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            wide = z[rows].float()
            at = wide.gather(1, case.teacher.ids[rows])
            parts.append((at - wide.logsumexp(-1, keepdim=True)).to(z.dtype))
        return _verl_loss(case, inputs, z, torch.cat(parts))

    return call


def _verl_loss(case: Case, inputs: list[Tensor], z: Tensor, log_p: Tensor) -> Results:
    teacher = case.teacher
    with torch.no_grad():
        top_ids = z.topk(case.shape.k).indices
        # Overlap and masses; any [C] replaces the entropy, which verl has not.
        metrics(log_p.float(), teacher.log_tail, top_ids, teacher)
    low, log_q = log_p.float().clamp_min(CLAMP), teacher.log_q.clamp_min(CLAMP)
    mean = (log_q.exp() * (log_q - low)).sum(-1).mean()
    return mean, *torch.autograd.grad(mean, inputs)


def _trl(case: Case) -> Call:
    """Return a call: log_softmax, gather, and a tail bucket from the listed log-probs."""

    def with_tail(log_p: Tensor) -> Tensor:
        mass = log_p.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
        return torch.cat([log_p, (-torch.expm1(mass)).log()], 1)

    def call() -> Results:
        inputs, z = _inputs(case)
        log_p = with_tail(z.float().log_softmax(-1).gather(1, case.teacher.ids))
        log_q = with_tail(case.teacher.log_q)
        mean = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        return mean, *torch.autograd.grad(mean, inputs)

    return call


def _trl_jsd(case: Case) -> Call:
    """Return a call of a generalized JSD, both sides by log_softmax over the vocabulary."""
    # The time does not depend on the values.
    assert case.logits is not None
    log_q = case.logits.flip(1).log_softmax(-1)

    def call() -> Results:
        (z,) = leaves(case.logits)
        log_p = z.log_softmax(-1)
        middle = torch.logaddexp(log_p, log_q) - math.log(2)
        by = partial(F.kl_div, middle, reduction="sum", log_target=True)
        mean = (by(log_p) + by(log_q)) / (2 * case.shape.T)
        return mean, *torch.autograd.grad(mean, [z])

    return call


def _distillkit(case: Case) -> Call:
    """Return a call: gather, log-sum-exp rounded to the logits' dtype, the teacher renormalized."""

    def call() -> Results:
        inputs, z = _inputs(case)
        lse = z.float().logsumexp(-1, keepdim=True).to(z.dtype)
        log_p = (z.gather(1, case.teacher.ids) - lse).float()
        log_q = case.teacher.log_q.log_softmax(-1)
        mean = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        return mean, *torch.autograd.grad(mean, inputs)

    return call


def _dense_target(case: Case) -> Tensor:
    """Return [T, V] in the case's dtype: the teacher's entries among zeros, without the tail."""
    teacher = case.teacher
    target = torch.zeros(case.shape.T, case.shape.V, dtype=case.dtype, device=case.device)
    return target.scatter_(1, teacher.ids, teacher.log_q.exp().to(case.dtype))


def _liger_kl_div(case: Case) -> Call:
    from liger_kernel.transformers.functional import liger_kl_div

    target = _dense_target(case)

    def call() -> Results:
        (z,) = leaves(case.logits)
        loss = liger_kl_div(z.log_softmax(-1), target, reduction="batchmean")
        return loss, *torch.autograd.grad(loss, [z])

    return call


def _liger_jsd(case: Case) -> Call:
    from liger_kernel.transformers.functional import liger_jsd

    # The time does not depend on the values.
    assert case.logits is not None
    target = case.logits.flip(1).log_softmax(-1)

    def call() -> Results:
        (z,) = leaves(case.logits)
        loss = liger_jsd(z.log_softmax(-1), target)
        return loss, *torch.autograd.grad(loss, [z])

    return call


def _liger_ce(case: Case) -> Call:
    from liger_kernel.transformers.functional import liger_cross_entropy

    labels = case.labels

    def call() -> Results:
        (z,) = leaves(case.logits)
        loss = liger_cross_entropy(z.clone(), labels)
        return loss, *torch.autograd.grad(loss, [z])

    return call


# From hidden states, fused.

FusedLoss = Callable[[Tensor, Tensor], Tensor]
"""(hidden [T, H], weight [V, H]) -> loss []"""


def _fused(loss_of: Callable[[Case], FusedLoss]) -> Make:
    """Return calls of a fused loss with gradients by hidden states and head."""

    def make(case: Case) -> Call:
        run = loss_of(case)

        def call() -> Results:
            inputs = leaves(case.hidden, case.weight)
            loss = run(*inputs)
            return loss, *torch.autograd.grad(loss, inputs)

        return call

    return make


def _other_hidden(case: Case) -> Tensor:
    """Return hidden states [T, H] of a teacher with the same head."""
    assert case.hidden is not None
    return case.hidden.flip(0).contiguous()


def _liger_linear_ce(const: int) -> Callable[[Case], FusedLoss]:
    def loss_of(case: Case) -> FusedLoss:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as run

        parameters = inspect.signature(run).parameters
        if "chunk_mem_const" not in parameters and const != 1:
            raise RuntimeError("this version of liger_kernel has no chunk_mem_const")
        options = {"chunk_mem_const": const} if "chunk_mem_const" in parameters else {}
        labels = case.labels
        return lambda hidden, weight: run(hidden, weight, labels, **options)

    return loss_of


def _liger_linear_kl_div(case: Case) -> FusedLoss:
    from liger_kernel.transformers.functional import liger_fused_linear_kl_div

    target = _dense_target(case)
    return lambda hidden, weight: liger_fused_linear_kl_div(hidden, weight, target)


def _liger_linear_jsd(case: Case) -> FusedLoss:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    other = _other_hidden(case)
    return lambda hidden, weight: liger_fused_linear_jsd(hidden, weight, other, weight.detach())


def _cce(case: Case) -> FusedLoss:
    from cut_cross_entropy import linear_cross_entropy

    labels = case.labels
    return lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, impl="cce")


def _fla_ce(case: Case) -> FusedLoss:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    labels = case.labels
    return lambda hidden, weight: fused_linear_cross_entropy_loss(hidden, labels, weight)


def _fla_kl_div(case: Case) -> FusedLoss:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    other = _other_hidden(case)
    return lambda hidden, weight: fused_kl_div_loss(hidden, other, weight, weight.detach())


def _torch_ce(case: Case) -> FusedLoss:
    labels, options = case.labels, torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight: F.linear_cross_entropy(hidden, weight, labels, options=options)


VERL = (
    "truncated forward KL, gradient; live top-k, overlap, masses; no tail, no entropy; float32 "
    "log-sum-exp of 4096 rows at a time"
)
TRL = "forward KL with the tail rebuilt from the listed mass, gradient; no metrics"
DISTILLKIT = "truncated forward KL to the renormalized teacher, gradient; no metrics"
LABEL = "cross-entropy of one label, gradients; no support, no metrics"
DENSE_TARGET = "forward KL to a dense [T, V] target made before"
SAME_HEAD = "a teacher's hidden states and head, product of both in the time; no metrics"


liger_logits = partial(from_logits, needs="liger_kernel", gpu_only=True)
liger = partial(from_hidden, needs="liger_kernel", gpu_only=True)
fla = partial(from_hidden, needs="fla", gpu_only=True)
PEERS = [
    from_logits(name="verl", computes=VERL, make=_verl_chunked),
    from_logits(
        name="verl-softmax",
        computes="its earlier form, log_softmax in the logits' dtype",
        make=_verl,
    ),
    from_logits(name="trl", computes=TRL, make=_trl, loss="forward_kl_tail"),
    from_logits(
        name="trl-jsd",
        computes="JSD to dense log-probs made before, gradient; no metrics",
        make=_trl_jsd,
    ),
    from_logits(name="distillkit", computes=DISTILLKIT, make=_distillkit),
    with_whole_head(name="verl", computes=VERL, make=_verl_chunked),
    with_whole_head(name="trl", computes=TRL, make=_trl),
    with_whole_head(name="distillkit", computes=DISTILLKIT, make=_distillkit),
    liger_logits(
        name="liger-kl-div",
        computes=f"{DENSE_TARGET}, gradient; log_softmax by torch; no tail, no metrics",
        make=_liger_kl_div,
    ),
    liger_logits(
        name="liger-jsd",
        computes="JSD to dense log-probs made before, gradient; log_softmax by torch; no metrics",
        make=_liger_jsd,
    ),
    liger_logits(
        name="liger-ce",
        computes=f"{LABEL}; copies the logits first, for it overwrites them",
        make=_liger_ce,
    ),
    liger(name="liger-ce", computes=LABEL, make=_fused(_liger_linear_ce(1))),
    liger(
        name="liger-ce-16",
        computes=f"{LABEL}; chunk_mem_const=16",
        make=_fused(_liger_linear_ce(16)),
    ),
    liger(
        name="liger-kl-div",
        computes=f"{DENSE_TARGET}, gradients; no tail, no metrics",
        make=_fused(_liger_linear_kl_div),
    ),
    liger(
        name="liger-jsd",
        computes=f"JSD, gradients; from {SAME_HEAD}",
        make=_fused(_liger_linear_jsd),
    ),
    from_hidden(
        name="cce",
        computes=f"{LABEL}; leaves out gradients below 2^-12",
        make=_fused(_cce),
        needs="cut_cross_entropy",
        gpu_only=True,
    ),
    fla(name="fla-ce", computes=LABEL, make=_fused(_fla_ce)),
    fla(
        name="fla-kl-div",
        computes=f"forward KL, gradients; from {SAME_HEAD}",
        make=_fused(_fla_kl_div),
    ),
    from_hidden(
        name="torch-ce",
        computes=f"{LABEL}; F.linear_cross_entropy in chunks",
        make=_fused(_torch_ce),
        needs="torch.nn:LinearCrossEntropyOptions",
        cpu_rows=0,
    ),
]
