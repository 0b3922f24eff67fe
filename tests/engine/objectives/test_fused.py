"""Objectives inside the kernels equal their torch functions, metric by metric."""

import pytest
import torch

from logitcask.engine.metrics.metrics import COMMON_METRICS
from logitcask.engine.objectives import (
    PRESETS,
    Bounds,
    Objective,
    current_topk,
    parse_objective,
    row_objective,
)
from logitcask.engine.objectives.divergences import PARAMETERS
from logitcask.engine.objectives.evaluate import is_fusable
from logitcask.kernels.fused_objective import FusedObjective
from logitcask.kernels.launch import triton_on_cpu
from logitcask.kernels.sparse_kl import sparse_kl
from tests.engine.objectives.full_rows import make_full

FUSED = [
    (support, divergence, ("renormalize", "bucket")[(i + j) % 2], "divergence")
    for i, support in enumerate(("teacher", "student", "overlap"))
    for j, divergence in enumerate(("reverse_kl", "forward_kl", "jsd", "skew"))
]
FUSED += [
    ("teacher", "skew_reverse", "bucket", "divergence"),
    ("overlap", "alpha", "bucket", "divergence"),
    ("student", "mixed_kl", "renormalize", "divergence"),
    ("teacher", "forward_kl", "ignore", "divergence"),
    ("teacher", "alpha", "zero", "divergence"),
]
"""Each support with the tails in turn; tests/kernels has all divergences with all tails."""


@pytest.mark.parametrize("cell", FUSED, ids="-".join)
def test_the_fused_form_is_the_plain_one(cell: tuple[str, str, str, str]) -> None:
    objective = Objective(
        **dict(zip(("support", "divergence", "tail", "estimator"), cell, strict=True)),
        k=4,
        parameter=0.3 if cell[1] in PARAMETERS else None,
    )
    generator = torch.Generator().manual_seed(5)
    live, teacher, old = torch.randn(3, 6, 60, generator=generator) * 2
    live[1, 7] = teacher[2, 11] = -torch.inf
    live[3] = live[3].round()
    full = make_full(
        live,
        live + teacher,
        old=live + 0.3 * old,
        student_k=6,
        kept=[6, 4, 12, 1, 20, 3],
        token=list(range(6)),
    )
    fused = row_objective(objective, full.targets)
    assert isinstance(fused, FusedObjective)
    weight = torch.rand(6, generator=generator)
    results, grads = [], []
    for each in (fused, fused.plain):
        z = live.clone().requires_grad_()
        with triton_on_cpu():
            results.append(
                sparse_kl(
                    z, full.targets.ids, each, k=current_topk(objective, 60), row_weight=weight
                )
            )
        (grad,) = torch.autograd.grad(results[-1].loss, z)
        grads.append(grad)
    assert list(results[0].metrics) == list(COMMON_METRICS)
    torch.testing.assert_close(results[0].row_loss, results[1].row_loss, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(*grads, rtol=2e-5, atol=2e-6)
    for name in COMMON_METRICS:
        torch.testing.assert_close(
            results[0].metrics[name],
            results[1].metrics[name],
            rtol=2e-5,
            atol=2e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_objectives_that_the_kernels_do_not_support_stay_in_torch() -> None:
    full = make_full(torch.randn(2, 30), torch.randn(2, 30), student_k=16, kept=16)
    fusable = [name for name, preset in PRESETS.items() if is_fusable(preset.objective)]
    cut = ["forward_kl_topk", "mixed_kl", "skew_kl", "skew_reverse_kl", "alpha_divergence"]
    assert fusable == ["overlap", "opd", "teacher_topk", "forward_kl", "gkd", "full_vocab", *cut]
    assert not is_fusable(parse_objective("kd").objective), "it has a temperature"
    rows = parse_objective("opd+prune+keep_entropy").objective
    assert is_fusable(rows), "whole rows are weighed outside"
    for added in ("entropy_gate", "entropy_bonus"):
        assert not is_fusable(parse_objective(f"opd+{added}").objective)
    skipping = row_objective(rows, full.targets, bounds=Bounds(action="skip"))
    assert not isinstance(skipping, FusedObjective)
