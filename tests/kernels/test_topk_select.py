"""topk_select is exact, with the lowest id first among equals, on both paths."""

import pytest
import torch
from kernel_cases import KINDS_AND_DTYPES, make_logits

from logitcask.kernels.topk_select import MAX_TRITON_K, topk_select, topk_select_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same(logits: torch.Tensor, k: int, n_vocab: int | None, device: str) -> None:
    values, ids = topk_select(logits.to(device), k, n_vocab=n_vocab)
    expected_values, expected_ids = topk_select_reference(logits, k, n_vocab=n_vocab)
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(values.cpu(), expected_values)


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
def test_equals_a_stable_sort(kind: str, dtype: torch.dtype, device: str) -> None:
    for n_columns, k in ((5, 3), (97, 16), (4801, 1)):
        assert_same(make_logits(kind, 1, n_columns, dtype), k, None, device)
    assert_same(make_logits(kind, 3, 4801, dtype), 16, None, device)
    assert_same(make_logits(kind, 1, 8192, dtype), 21, None, device)


@pytest.mark.parametrize("k", [3, MAX_TRITON_K, MAX_TRITON_K + 1, 300])
@pytest.mark.parametrize("kind", ["iid", "ties", "thirds -inf"])
def test_large_k(kind: str, k: int, device: str) -> None:
    assert_same(make_logits(kind, 2, 300, torch.float32), k, None, device)


@pytest.mark.parametrize("n_vocab", [16, 100, 4097])
def test_columns_after_n_vocab_are_never_chosen(n_vocab: int, device: str) -> None:
    logits = make_logits("ties", 3, 5000, torch.float32)
    logits[:, n_vocab:] = 1000.0
    assert_same(logits, 16, n_vocab, device)
    assert_same(logits[:, :4990], 16, n_vocab, device)


def test_a_row_of_minus_infinity_gives_the_first_ids(device: str) -> None:
    logits = torch.full((2, 1000), -torch.inf)
    logits[1, 7], logits[1, 900] = -5.0, 2.0
    ids = topk_select(logits.to(device), 4)[1]
    assert ids.tolist() == [[0, 1, 2, 3], [900, 7, 0, 1]]


def test_minus_zero_equals_zero(device: str) -> None:
    logits = torch.full((1, 600), -1.0)
    logits[0, 3], logits[0, 500], logits[0, 501] = -0.0, 0.0, -0.0
    assert topk_select(logits.to(device), 2)[1].tolist() == [[3, 500]]


def test_ties_across_groups_of_different_maxima(device: str) -> None:
    # The second best value is in a group whose maximum is lower than that of a later group which
    # holds it too.
    logits = torch.full((1, 4096), -3.0)
    logits[0, [100, 3000]] = 1.0
    logits[0, 3001] = 5.0
    assert topk_select(logits.to(device), 2)[1].tolist() == [[3001, 100]]


@pytest.mark.parametrize("k", [4, 40])
def test_a_nan_leaves_distinct_valid_ids(k: int, device: str) -> None:
    logits = make_logits("iid", 3, 3000, torch.float32)
    logits[0, 17], logits[1] = float("nan"), float("nan")
    logits[2, ::2] = -float("nan")
    ids = topk_select(logits.to(device), k)[1]
    assert all(len(set(row)) == k and 0 <= min(row) <= max(row) < 3000 for row in ids.tolist())


def test_float64_is_not_rounded() -> None:
    logits = torch.zeros(1, 500, dtype=torch.float64)
    logits[0, 400] = 1e-12
    assert topk_select(logits, 2)[1].tolist() == [[400, 0]]


def test_empty_batch(device: str) -> None:
    values, ids = topk_select(torch.empty(0, 300, device=device), 3)
    assert values.shape == ids.shape == (0, 3)
