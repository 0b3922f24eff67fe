"""group_stats against float64: statistics, top-k and log mass outside listed ids, on both paths."""

import math

import pytest
import torch
from kernel_cases import KINDS_AND_DTYPES, SHAPES, assert_close, make_ids, make_logits, ulp
from torch import Tensor

from logitcask.kernels.group_stats import group_stats, group_stats_reference
from logitcask.kernels.row_stats import row_stats_reference
from logitcask.kernels.topk_select import topk_select_reference


def log_mass_outside(logits: Tensor, row: Tensor, ids: Tensor) -> Tensor:
    """Return GroupStats.log_mass_outside by the whole row."""
    masked = logits.clone()
    masked[row, ids] = -torch.inf
    return masked.logsumexp(1)


def listed(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and ids [A] of the lists [P, S], which -1 pads."""
    row, slot = (ids >= 0).nonzero().unbind(1)
    return row, ids[row, slot]


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    logits = make_logits(kind, *shape, dtype)
    k = min(16, shape[1])
    z = logits.to(device, copy=True)
    groups = group_stats(z, k)
    of = group_stats_reference(logits.double(), groups.width)
    n = of.top.shape[1]
    torch.testing.assert_close(groups.top[:, :n].cpu().double(), of.top, rtol=0, atol=0)
    torch.testing.assert_close(groups.mass[:, :n].cpu().double(), of.mass, rtol=2e-6, atol=0)
    assert (groups.mass[:, n:] == 0).all()

    stats, naive = groups.row_stats(), row_stats_reference(logits)
    exact = row_stats_reference(logits.double())
    # As of row_stats: what one piece is allowed.
    floor = 2 * ulp(logits, torch.float32) + 4 * ulp(exact.log_sum_exp, torch.float32)
    for name, slack in (("log_sum_exp", 0.0), ("entropy", 32 * torch.finfo(torch.float32).eps)):
        of_each = (getattr(each, name) for each in (stats, naive, exact))
        assert_close(*of_each, floor + slack, name)

    values, ids = groups.topk(z, k)
    expected_values, expected_ids = topk_select_reference(logits, k)
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(values.cpu(), expected_values)

    others = make_ids(*shape, k // 2, seed=1)
    row, id_ = listed(torch.cat([expected_ids, others], 1))
    outside = groups.log_mass_outside(z, row.to(device), id_.to(device))
    naive_mass = log_mass_outside(logits.float(), row, id_)
    exact_mass = log_mass_outside(logits.double(), row, id_)
    assert_close(outside, naive_mass, exact_mass, floor, "log mass outside")


@pytest.mark.parametrize("below", [17.0, 40.0, 300.0])
def test_a_mass_outside_that_a_difference_would_lose(below: float, device: str) -> None:
    """List every id but those `below` nats under the others: 1 - (their mass) is 0 in float32."""
    logits = make_logits("iid", 2, 2000, torch.float32) - below
    at = torch.tensor([[3, 64, 65, 1999], [0, 1, 2, 700]])
    logits.scatter_(1, at, torch.tensor([[1.0, 0.0, 2.0, 1.0]]).expand(2, -1))
    exact = log_mass_outside(logits.double(), *listed(at))
    assert (exact - logits.double().logsumexp(1)).max() < -below + 12
    z = logits.to(device, copy=True)
    row, ids = listed(torch.cat([at, at], 1))  # repetitions count once
    found = group_stats(z, 4).log_mass_outside(z, row.to(device), ids.to(device))
    torch.testing.assert_close(found.cpu().double(), exact, rtol=2e-7, atol=2e-6)


def test_no_mass_outside_is_minus_infinity(device: str) -> None:
    logits = make_logits("thirds -inf", 3, 200, torch.float32)
    row, ids = logits.isfinite().nonzero().unbind(1)
    keep = (row < 2) | (ids > 1)  # row 2 keeps id 1
    expected = [-math.inf, -math.inf, logits[2, 1].item()]
    z = logits.to(device, copy=True)
    found = group_stats(z, 4).log_mass_outside(z, row[keep].to(device), ids[keep].to(device))
    assert found.tolist() == pytest.approx(expected)


def test_without_listed_ids_the_mass_is_the_rows(device: str) -> None:
    logits = make_logits("iid", 3, 999, torch.float32).to(device)
    groups, none = group_stats(logits, 8), torch.empty(0, dtype=torch.int64, device=device)
    outside = groups.log_mass_outside(logits, none, none)
    assert torch.equal(outside, groups.row_stats().log_sum_exp)


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("at", [0, 4500, 4800])
def test_not_a_number_poisons_its_row_alone(bad: str, at: int, device: str) -> None:
    logits = make_logits("iid", 3, 4801, torch.float32)
    logits[1, at] = float(bad)
    logits[2] = -torch.inf
    stats = group_stats(logits.to(device), 16).row_stats()
    assert stats.log_sum_exp.isnan().tolist() == [False, True, True]
    assert stats.entropy.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("k", [1, 64, 129, 300])
def test_columns_between_rows_are_not_read(k: int, device: str) -> None:
    wide = torch.full((3, 5000), float("nan"), device=device)
    logits = make_logits("ties", 3, 4097, torch.float32)
    logits[1, 70:] = -torch.inf  # fewer finite logits than some k
    wide[:, :4097] = logits.to(device)
    z = wide[:, :4097]
    groups = group_stats(z, k)
    values, ids = groups.topk(z, k)
    expected_values, expected_ids = topk_select_reference(logits, k)
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(values.cpu(), expected_values)
    row, each = listed(expected_ids)
    outside = groups.log_mass_outside(z, row.to(device), each.to(device))
    exact = log_mass_outside(logits.double(), row, each)
    torch.testing.assert_close(outside.cpu().double(), exact, rtol=2e-7, atol=2e-6)
    assert wide[:, 4097:].isnan().all()


def test_float64_keeps_its_precision() -> None:
    logits = make_logits("iid", 3, 4801, torch.float64)
    groups, expected = group_stats(logits, 16), row_stats_reference(logits)
    stats = groups.row_stats()
    assert stats.entropy.dtype == torch.float64
    assert torch.allclose(stats.log_sum_exp, expected.log_sum_exp, rtol=1e-13, atol=1e-12)
    assert torch.allclose(stats.entropy, expected.entropy, rtol=1e-12, atol=1e-12)


def test_empty_batch(device: str) -> None:
    logits = torch.empty(0, 300, device=device)
    groups = group_stats(logits, 3)
    assert groups.row_stats().entropy.shape == (0,)
    assert groups.topk(logits, 3)[0].shape == (0, 3)
