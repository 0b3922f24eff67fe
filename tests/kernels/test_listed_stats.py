"""listed_stats against float64: one pass over what is not listed, on both paths."""

import math

import pytest
import torch
from kernel_cases import SHAPES, assert_close, make_ids, make_logits, ulp

from logitcask.kernels.listed_stats import listed_stats, listed_stats_reference


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("iid", "odd"), ("ties", "two tiles"), ("thirds -inf", "one tile"), ("one hot", "small")],
)
def test_against_float64(kind: str, shape: str, device: str) -> None:
    logits = make_logits(kind, *SHAPES[shape], torch.float32)
    k = min(4, logits.shape[1])
    ids = make_ids(*logits.shape, k, seed=1)
    row, slot = (ids >= 0).nonzero().unbind(1)
    listed = torch.cat([row, row]), torch.cat([ids[row, slot]] * 2)  # repetitions count once
    z = logits.to(device, copy=True)
    found = listed_stats(z, k, *(each.to(device) for each in listed))
    naive = listed_stats_reference(logits, k, *listed)
    exact = listed_stats_reference(logits.double(), k, *listed)
    assert torch.equal(found.top_ids.cpu(), exact.top_ids)
    assert torch.equal(found.values.cpu(), naive.values)
    floor = 2 * ulp(logits, torch.float32) + 4 * ulp(exact.log_sum_exp, torch.float32)
    for name, slack in (
        ("log_sum_exp", 0.0),
        ("entropy", 32 * torch.finfo(torch.float32).eps),
        ("log_outside", 0.0),
    ):
        of_each = (getattr(each, name) for each in (found, naive, exact))
        assert_close(*of_each, floor + slack, name)


@pytest.mark.parametrize("below", [17.0, 40.0, 300.0])
def test_a_mass_outside_that_a_difference_would_lose(below: float, device: str) -> None:
    logits = make_logits("iid", 2, 2000, torch.float32) - below
    at = torch.tensor([[3, 64, 65, 1999], [0, 1, 2, 700]])
    logits.scatter_(1, at, torch.tensor([[1.0, 0.0, 2.0, 1.0]]).expand(2, -1))
    row, ids = torch.tensor([0, 1, 0]), torch.tensor([5, 9, 1998])
    exact = listed_stats_reference(logits.double(), 4, row, ids)
    assert (exact.log_outside - exact.log_sum_exp).max() < -below + 12
    found = listed_stats(logits.to(device, copy=True), 4, row.to(device), ids.to(device))
    torch.testing.assert_close(
        found.log_outside.cpu().double(), exact.log_outside, rtol=2e-7, atol=2e-6
    )


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_not_a_number_poisons_its_row_alone(bad: str, device: str) -> None:
    """Put it where it is listed, among the top-k and elsewhere."""
    logits = make_logits("iid", 4, 1601, torch.float32)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    logits[1, 7], logits[2] = float(bad), -torch.inf
    for row, ids in ((none, none), (none + 1, none + 7)):
        found = listed_stats(logits.to(device, copy=True), 3, row, ids)
        expected = [False, bad != "-inf", True, False]
        assert found.log_sum_exp.isnan().tolist() == expected
        assert found.entropy.isnan().tolist() == expected


def test_columns_between_rows_are_neither_read_nor_written(device: str) -> None:
    wide = torch.full((3, 3000), math.nan, device=device)
    logits = make_logits("iid", 3, 2100, torch.float32)
    wide[:, :2100] = logits.to(device)
    row, ids = torch.tensor([0, 2]), torch.tensor([2099, 0])
    found = listed_stats(wide[:, :2100], 2, row.to(device), ids.to(device))
    exact = listed_stats_reference(logits.double(), 2, row, ids)
    for each, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(each.cpu().double(), expected.double(), rtol=1e-6, atol=1e-5)
    assert wide[:, 2100:].isnan().all()
    assert wide.isneginf().sum() == 3 * 2 + 2


def test_no_row_and_all_ids_listed(device: str) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    empty = listed_stats(torch.empty(0, 300, device=device), 3, none, none)
    assert empty.values.shape == (0, 3)
    assert empty.entropy.shape == (0,)
    full = listed_stats(torch.zeros(2, 5, device=device), 5, none, none)
    assert full.log_outside.tolist() == [-math.inf] * 2
    assert full.entropy.tolist() == pytest.approx([math.log(5)] * 2)
