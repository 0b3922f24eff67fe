"""Our losses under the names and signatures of other projects, and their place there.

put_in_* replaces functions of a project before its tests are imported, finish_* names in a test
module after that.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import ours
import torch
from torch import Tensor

PER_ELEMENT = "asks for one value per entry of the vocabulary; a row of ours has one loss"


# TRL.


def trl_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Any = None,
) -> Tensor:
    """Return TRL's generalized_jsd_loss of [B, T, V] logits."""
    n_vocab = student_logits.shape[-1]
    student, teacher = (z.reshape(-1, n_vocab) for z in (student_logits, teacher_logits))
    weight = torch.ones(len(student), device=student.device)
    if labels is not None:
        weight = (labels != -100).flatten().float()
    divisor: Any = 1.0
    if num_items_in_batch is not None:
        divisor = num_items_in_batch
    elif reduction == "batchmean":
        divisor = len(student_logits) if labels is None else weight.sum().clamp(min=1)
    elif reduction == "mean":
        divisor = weight.sum() * n_vocab
    elif reduction != "sum":
        raise NotImplementedError(PER_ELEMENT)
    return ours.jsd_from_logits(student, teacher, beta, weight / divisor, temperature).loss


def trl_divergence(
    student: Tensor, teacher: Tensor, beta: float, support_mask: Tensor | None = None
) -> Tensor:
    """Return TRL's _jsd_divergence of log-probs [..., V], summed over rows, as one number."""
    n_vocab = student.shape[-1]
    rows = ours.whole_vocabulary(teacher.reshape(-1, n_vocab))
    loss = ours.jsd_objective(beta, n_vocab)
    return ours.from_logits(student.reshape(-1, n_vocab), rows, loss).loss


def put_in_trl() -> None:
    """Replace the losses of its trainers."""
    for name, trainer in (("gkd", "GKDTrainer"), ("distillation", "DistillationTrainer")):
        module = import_module(f"trl.experimental.{name}.{name}_trainer")
        getattr(module, trainer).generalized_jsd_loss = staticmethod(trl_jsd)
    server = import_module("trl.experimental.server_distillation.server_distillation_trainer")
    server._jsd_divergence = trl_divergence


# Liger-Kernel.


def liger_jsd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    beta: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    """Return Liger's JSD of log-probs [P, V]; the student's are taken as logits."""
    weight = torch.full((len(input),), 1 / len(input), device=input.device)
    if shift_labels is not None:
        weight = ours.mean_weight(shift_labels, ignore_index)
    return ours.jsd_from_logits(input, target, beta, weight).loss.to(input.dtype)


def liger_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return Liger's JSD from hidden states and heads; the teacher's logits are made beforehand."""
    with torch.no_grad():
        teacher = torch.nn.functional.linear(teacher_input, teacher_weight.to(teacher_input.dtype))
        log_q = (teacher.float() / temperature).log_softmax(-1)
    n_rows = len(student_input)
    weight = torch.full((n_rows,), 1 / n_rows, device=student_input.device)
    if shift_labels is not None:
        weight = ours.mean_weight(shift_labels, ignore_index)
    loss = ours.jsd_objective(jsd_beta, len(student_weight))
    rows = ours.whole_vocabulary(log_q)
    done = ours.from_hidden(
        student_input, student_weight, rows, loss, weight, temperature=temperature
    )
    return done.loss.to(student_input.dtype)


def liger_chunked_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    student_bias: None = None,
    teacher_bias: None = None,
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    *_: Any,
) -> Tensor:
    """Return Liger's chunked JSD with a cross-entropy at the labels, both over their count."""
    soft = liger_linear_jsd(
        student_input, student_weight, teacher_input, teacher_weight, target, beta, ignore_index,
        temperature,
    )  # fmt: skip
    rows = ours.label_rows(target.clamp(min=0))
    weight = ours.mean_weight(target, ignore_index)
    loss = ours.objective("forward_kl", 1)
    hard = ours.from_hidden(student_input, student_weight, rows, loss, weight).loss
    return weight_hard_loss * hard + weight_soft_loss * soft


def liger_kl_div(log_p: Tensor, q: Tensor, reduction: str, log_target: bool, eps: float) -> Tensor:
    """Return Liger's KL divergence of log-probs [P, V]; the student's are taken as logits."""
    n_rows, n_vocab = log_p.shape
    divisor = {"batchmean": n_rows, "mean": n_rows * n_vocab, "sum": 1}[reduction]
    weight = torch.full((n_rows,), 1 / divisor, device=log_p.device)
    rows = ours.whole_vocabulary(q.float().log())
    loss = ours.objective("forward_kl", n_vocab)
    return ours.from_logits(log_p, rows, loss, weight).loss


def put_in_liger() -> None:
    """Replace its losses; its tests leave out bfloat16 on a CPU, which ours takes."""
    utils = import_module("test.utils")
    if utils.device == "cpu":
        utils.supports_bfloat16 = lambda: True
    functional = import_module("liger_kernel.transformers.functional")
    functional.liger_jsd = liger_jsd
    functional.liger_fused_linear_jsd = liger_linear_jsd
    ops = {"jsd": liger_jsd, "fused_linear_jsd": liger_linear_jsd, "kl_div": liger_kl_div}
    names = {"jsd": "LigerJSDFunction", "fused_linear_jsd": "LigerFusedLinearJSDFunction",
             "kl_div": "LigerKLDivLossFunction"}  # fmt: skip
    for module, op in ops.items():
        of_theirs = import_module(f"liger_kernel.transformers.{module}")
        setattr(of_theirs, names[module], SimpleNamespace(apply=op))
    chunked = import_module("liger_kernel.chunked_loss.jsd_loss")
    chunked.LigerFusedLinearJSDLoss.forward = lambda self, *inputs: liger_chunked_jsd(
        *inputs, self.weight_hard_loss, self.weight_soft_loss, self.beta, self.ignore_index,
        self.temperature,
    )  # fmt: skip
    import_module("liger_kernel.chunked_loss.functional").liger_fused_linear_jsd = liger_chunked_jsd


def finish_liger(module: ModuleType) -> None:
    """Feed their references log_softmax of the log-probs, because ours takes logits.

    Of both sides: log-probs in half precision do not sum to 1. Their functional tests compare two
    calls of theirs: the other one becomes the reference.
    """
    if module.__name__.endswith("test_jsd"):
        forward = module.JSD.forward
        module.JSD.forward = lambda self, log_p, log_q, label=None: forward(
            self, log_p.float().log_softmax(-1), log_q.float().log_softmax(-1), label
        )
        module.LigerJSDFunction = SimpleNamespace(
            apply=lambda x, target, labels, beta, ignore: module.JSD(beta, ignore, x.dtype)(
                x, target, labels
            )
        )
    elif module.__name__.endswith("test_fused_linear_jsd"):
        module.LigerFusedLinearJSDFunction = SimpleNamespace(apply=_reference_of(module.TorchJSD))
    elif module.__name__.endswith("test_kl_div"):
        plain = module.KLDivLoss

        class OfLogits(plain):  # type: ignore[misc, valid-type]
            """Their reference of log_softmax of the input."""

            def forward(self, log_p: Tensor, q: Tensor) -> Tensor:
                return super().forward(log_p.float().log_softmax(-1), q)

        module.KLDivLoss = OfLogits


def _reference_of(jsd: Any) -> Callable[..., Tensor]:
    def apply(
        x: Tensor, w: Tensor, xt: Tensor, wt: Tensor, labels: Tensor, beta: float, ignore: int,
        temperature: float, *_: Any,
    ) -> Tensor:  # fmt: skip
        log_p, log_q = (
            (a @ b.T).float().div(temperature).log_softmax(-1) for a, b in ((x, w), (xt, wt))
        )
        return jsd(beta, ignore, x.dtype)(log_p, log_q, labels)

    return apply


# verl.


def verl_log_probs(logits: Tensor, topk_ids: Tensor, chunk_size: int = 4096) -> Tensor:
    """Return verl's log-probs at ids [B, T, K] of logits [B, T, V]."""
    flat = logits.reshape(-1, logits.shape[-1])
    found = ours.LogProbs.apply(flat, topk_ids.reshape(-1, topk_ids.shape[-1]))
    return found.view(topk_ids.shape)


def put_in_verl() -> None:
    """Replace its chunked log-probs."""
    losses = import_module("verl.trainer.distillation.fsdp.losses")
    losses._chunked_topk_log_probs = verl_log_probs


# Cut Cross-Entropy.


def cce_linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int = 0,
    **_: Any,
) -> Tensor:
    """Return its cross-entropy of labels [B, T] from hidden states [B, T, D] and a head [V, D]."""
    shift = int(shift)
    if shift:
        e, targets = e[:, :-shift], targets[:, shift:]
    labels = targets.flatten()
    counted = (labels != ignore_index).float()
    weight = counted / counted.sum().clamp(min=1) if reduction == "mean" else counted
    rows = ours.label_rows(labels.clamp(min=0))
    done = ours.from_hidden(
        e.flatten(0, -2), c, rows, ours.objective("forward_kl", 1), weight, softcap=softcap
    )
    return (done.row_loss * counted).view(targets.shape) if reduction == "none" else done.loss


def finish_cce(module: ModuleType) -> None:
    """Replace the imported function."""
    module.linear_cross_entropy = cce_linear_cross_entropy
