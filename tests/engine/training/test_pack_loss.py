"""Every op computes the loss of the formula; sampled metrics are those of the sampled rows."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from logitcask.engine.objectives import (
    PRESETS,
    Bounds,
    Objective,
    current_topk,
    parse_objective,
    row_objective,
)
from logitcask.engine.objectives.evaluate import is_renormalised
from logitcask.engine.objectives.presets import ROW_PRESETS
from logitcask.engine.objectives.supports import SAMPLED_SUPPORTS
from logitcask.engine.training import pack_loss as module
from logitcask.engine.training.pack_loss import pack_loss, row_hash
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from tests.engine.objectives.full_rows import Full, make_full, truth
from tests.engine.objectives.test_gradients import CASES, SHARES

P, V = 40, 30


def make_rows(rows: int = P, ties: bool = False, teacher_draws: bool = False) -> Full:
    """Make rows with a base model, and with draws of the student or of the teacher."""
    generator = torch.Generator().manual_seed(3)
    live, teacher, old = torch.randn(3, rows, V, generator=generator, dtype=torch.float64) * 2
    if ties:
        live, teacher = live.round(), teacher.round()
    kept = torch.randint(1, 12, (rows,), generator=generator).tolist()
    token = torch.randint(0, V, (rows,), generator=generator).tolist()
    draws = torch.randint(0, V, (rows, 3), generator=generator).tolist()
    return make_full(
        live,
        teacher,
        old=live + 0.3 * old,
        student_k=6,
        kept=kept,
        token=token,
        base=old,
        **{"q_draws" if teacher_draws else "mc": [Counter(ids) for ids in draws]},
    )


def loss_of(objective: Objective, full: Full, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """Return the pack's loss and its gradients by the states and the head; logits = states."""
    states = full.live.clone().requires_grad_()
    head = torch.eye(V, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(len(states), generator=torch.Generator().manual_seed(0)).double()
    result = pack_loss(
        objective, states, head, full.targets, row_weight=weight, n_vocab=V, **options
    )
    return result, *torch.autograd.grad(result.loss, (states, head))


@pytest.mark.parametrize("ties", [False, True], ids=["smooth", "ties"])
@pytest.mark.parametrize("cell", CASES, ids="-".join)
def test_every_cell_is_its_formula(cell: tuple[str, str, str, str], ties: bool) -> None:
    names = ("support", "divergence", "tail", "estimator")
    objective = Objective(
        **dict(zip(names, cell, strict=True)),
        k=1 if cell[0] in SAMPLED_SUPPORTS else 4,
        parameter=SHARES.get(cell[1]),
    )
    full = make_rows(ties=ties, teacher_draws=cell[0] == "teacher_mc")
    result, d_states, d_head = loss_of(objective, full)
    weight = torch.rand(P, generator=torch.Generator().manual_seed(0)).double()
    losses, dz = truth(objective, full)
    dz = dz * weight[:, None]
    torch.testing.assert_close(result.loss.detach(), (weight * losses).sum(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(d_states, dz, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(d_head, dz.T @ full.live, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["opd", "overlap", "forward_kl"])
def test_without_weights_it_is_the_mean_over_the_rows_that_count(name: str) -> None:
    objective, full = parse_objective(name, k=4).objective, make_rows()
    mask = (torch.arange(P) % 3 != 0).double()
    losses, _ = truth(objective, full)
    for weight, expected in ((mask, (mask * losses).sum() / mask.sum()), (mask * 0, mask[0] * 0)):
        targets = replace(full.targets, weight=weight)
        result = pack_loss(objective, full.live, torch.eye(V).double(), targets, n_vocab=V)
        torch.testing.assert_close(result.loss, expected)


def test_dense_products_only_if_the_estimator_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("linear_sparse_kl", "indexed_linear"):
        op = getattr(module, name)

        def recorded(*args: Any, _op: Any = op, _name: str = name, **options: Any) -> Any:
            live = options.get("k") is not None
            grad = torch.is_grad_enabled()
            used.append(f"{_name}{' live' if live and _name == 'indexed_linear' else ''} {grad}")
            return _op(*args, **options)

        monkeypatch.setattr(module, name, recorded)
    fixed, dense = ["indexed_linear True", "linear_sparse_kl False"], ["linear_sparse_kl True"]
    live = ["indexed_linear live True"]
    # opd_released looks like opd, but its coefficients do not sum to zero.
    expected = {
        **dict.fromkeys(("overlap", "union", "non_overlap"), live),
        **dict.fromkeys(("opd", "teacher_topk", "veto", "full_vocab", "mixed_kl", "kd"), fixed),
    }
    for name, preset in ROW_PRESETS.items():
        used.clear()
        objective = parse_objective(name, k=1 if preset.objective.k == 1 else 4).objective
        loss_of(objective, make_rows(teacher_draws=name == "rs_kd"), metrics_fraction=1.0)
        assert used == expected.get(name, dense), name
    used.clear()
    loss_of(parse_objective("opd+entropy_bonus", k=4).objective, make_rows())
    assert used == dense
    used.clear()
    loss_of(parse_objective("opd", k=4).objective, make_rows())
    assert used == fixed[:1], "no metrics"
    used.clear()
    bounds = Bounds(action="skip")  # it needs the coverage of every row
    loss_of(parse_objective("opd", k=4).objective, make_rows(), bounds=bounds)
    assert used == live


def test_opd_released_has_a_gradient_outside_its_support() -> None:
    _, dz, _ = loss_of(parse_objective("opd_released", k=4).objective, make_rows())
    assert (dz.abs() > 1e-9).sum() > P * V / 2
    assert not is_renormalised(PRESETS["opd_released"].objective)
    _, dz, _ = loss_of(parse_objective("opd", k=4).objective, make_rows())
    assert (dz != 0).sum(-1).max() <= 4


@pytest.mark.parametrize("name", ["opd", "overlap", "forward_kl"])
def test_an_entropy_bonus_reaches_states_and_head(name: str) -> None:
    full = make_rows()
    weight = torch.rand(P, generator=torch.Generator().manual_seed(0)).double()
    objective = parse_objective(f"{name}+entropy_bonus(coefficient=0.5)", k=4).objective
    result, d_states, d_head = loss_of(objective, full)
    losses, dz = truth(parse_objective(name, k=4).objective, full)
    p, log_p = full.live.softmax(-1), full.live.log_softmax(-1)
    h = -(p * log_p).sum(-1)
    dz = weight[:, None] * (dz + 0.5 * p * (log_p + h[:, None]))
    torch.testing.assert_close(result.loss.detach(), (weight * (losses - 0.5 * h)).sum())
    torch.testing.assert_close(d_states, dz, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(d_head, dz.T @ full.live, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["opd", "teacher_topk"])
def test_metrics_of_a_share_are_those_of_its_rows(name: str) -> None:
    objective, full = parse_objective(name, k=4).objective, make_rows(400)
    some, *grads = loss_of(objective, full, metrics_fraction=0.25)
    every, *same = loss_of(objective, full, metrics_fraction=1.0)
    assert all(map(torch.equal, grads, same)), "the share is for metrics only"
    assert every.measured.tolist() == list(range(400))
    assert 60 < len(some.measured) < 140
    expected = linear_sparse_kl(
        full.live,
        torch.eye(V, dtype=torch.float64),
        full.targets.ids,
        row_objective(objective, full.targets),
        k=current_topk(objective, V),
    )
    for metric, values in expected.metrics.items():
        torch.testing.assert_close(every.metrics[metric], values)
        torch.testing.assert_close(some.metrics[metric], values[some.measured])


def test_the_sample_of_a_row_does_not_depend_on_other_rows() -> None:
    targets = make_rows(400).targets
    picked = row_hash(targets)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert torch.equal(row_hash(targets.at(order)), picked[order])
    assert picked.unique().numel() == 400
    assert int(picked.min()) >= 0
    assert int(picked.max()) < 2**32
    # Uniform: in 16 equal bins 25 each are expected, with a standard deviation of 5.
    assert torch.bincount(picked >> 28, minlength=16).sub(25).abs().max() < 25
