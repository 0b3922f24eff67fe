"""row_stats against float64, and its properties, on both paths."""

import pytest
import torch
from kernel_cases import HALF, KINDS, KINDS_AND_DTYPES, SHAPES, assert_close, make_logits, ulp

from logitcask.kernels.row_stats import row_stats, row_stats_reference


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    logits = make_logits(kind, *shape, dtype)
    exact = row_stats_reference(logits.double())
    naive = row_stats_reference(logits)
    ours = row_stats(logits.to(device))
    # The log-sum-exp is one number of the size of the logits: it cannot be closer than their ulp.
    floor = 2 * ulp(logits, ours.entropy.dtype) + 4 * ulp(exact.log_sum_exp, ours.entropy.dtype)
    assert_close(ours.log_sum_exp, naive.log_sum_exp, exact.log_sum_exp, floor, "log_sum_exp")
    # 32 log2 units of shift at most, see scan_kernel.
    assert_close(
        ours.entropy,
        naive.entropy,
        exact.entropy,
        floor + 32 * torch.finfo(ours.entropy.dtype).eps,
        "entropy",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_float64_keeps_its_precision(kind: str) -> None:
    logits = make_logits(kind, 3, 4801, torch.float64)
    ours, expected = row_stats(logits), row_stats_reference(logits)
    assert ours.entropy.dtype == torch.float64
    assert torch.allclose(ours.log_sum_exp, expected.log_sum_exp, rtol=1e-13, atol=1e-12)
    assert torch.allclose(ours.entropy, expected.entropy, rtol=1e-12, atol=1e-12)


def test_hand_worked(device: str) -> None:
    logits = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [3.0, float("-inf"), float("-inf"), float("-inf")]], device=device
    )
    stats = row_stats(logits)
    assert torch.allclose(stats.log_sum_exp.cpu(), torch.tensor([1.3862944, 3.0]))
    assert torch.allclose(stats.entropy.cpu(), torch.tensor([1.3862944, 0.0]), atol=1e-7)


@pytest.mark.parametrize("n_vocab", [1, 63, 997, 1024])
def test_columns_after_n_vocab_and_between_rows_are_not_read(n_vocab: int, device: str) -> None:
    wide = torch.full((3, 1040), float("nan"), device=device)
    wide[:, :n_vocab] = make_logits("iid", 3, n_vocab, torch.float32).to(device)
    strided = row_stats(wide[:, :1030], n_vocab=n_vocab)
    plain = row_stats(wide[:, :n_vocab].contiguous())
    assert torch.equal(strided.log_sum_exp, plain.log_sum_exp)
    assert torch.equal(strided.entropy, plain.entropy)


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("at", [0, 4500, 4800])
def test_not_a_number_poisons_its_row_alone(bad: str, at: int, device: str) -> None:
    logits = make_logits("iid", 3, 4801, torch.float32)
    logits[1, at] = float(bad)
    logits[2] = -torch.inf
    stats = row_stats(logits.to(device))
    assert stats.log_sum_exp.isnan().tolist() == [False, True, True]
    assert stats.entropy.isnan().tolist() == [False, True, True]


def test_shift_moves_log_sum_exp_and_not_entropy(device: str) -> None:
    logits = make_logits("iid", 4, 5000, torch.float32).to(device)
    base, moved = row_stats(logits), row_stats(logits + 64)
    assert torch.allclose(base.log_sum_exp + 64, moved.log_sum_exp, atol=1e-5)
    assert torch.allclose(base.entropy, moved.entropy, atol=2e-5)


def test_empty_batch(device: str) -> None:
    assert row_stats(torch.empty(0, 7, device=device)).entropy.shape == (0,)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, device: str) -> None:
    assert row_stats(
        torch.zeros(1, 5000, dtype=dtype, device=device)
    ).log_sum_exp.item() == pytest.approx(8.517193, abs=1e-6)
