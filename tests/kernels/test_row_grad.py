"""row_grad against float64, and what it must not touch, on both paths."""

import pytest
import torch
from kernel_cases import HALF, KINDS_AND_DTYPES, SHAPES, assert_close, make_ids, make_logits, ulp
from torch import Tensor

from logitcask.kernels.row_grad import row_grad, row_grad_reference
from logitcask.kernels.row_stats import row_stats, row_stats_reference


def problem(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, n_ids: int = 4
) -> tuple[Tensor, ...]:
    """Return logits [P, V], dense [P], ids [P, S] and at_ids [P, S]."""
    generator = torch.Generator().manual_seed(5)
    logits = make_logits(kind, *shape, dtype)
    dense = torch.rand(shape[0], generator=generator) + 0.1
    at_ids = torch.randn(shape[0], n_ids, generator=generator)
    return logits, dense, make_ids(*shape, n_ids), at_ids


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    logits, dense, ids, at_ids = problem(kind, shape, dtype)
    exact_lse = row_stats_reference(logits.double()).log_sum_exp
    exact = row_grad_reference(logits.double(), exact_lse, dense.double(), ids, at_ids.double())
    naive = row_grad_reference(logits, row_stats_reference(logits).log_sum_exp, dense, ids, at_ids)
    # Into float32: Triton's interpreter truncates where the hardware rounds to half precision.
    out = torch.empty(shape, device=device)
    z = logits.to(device)
    row_grad(
        z, row_stats(z).log_sum_exp, dense.to(device), ids.to(device), at_ids.to(device), out=out
    )
    assert_close(
        out, naive, exact, 2 * ulp(logits, torch.float32), "gradient"
    )  # softmax is as close as log-sum-exp


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_output_is_within_one_step(dtype: torch.dtype, device: str) -> None:
    logits, dense, ids, at_ids = (t.to(device) for t in problem("iid", (3, 1000), dtype))
    lse = row_stats(logits).log_sum_exp
    expected = row_grad_reference(logits, lse, dense, ids, at_ids)
    ours = row_grad(logits, lse, dense, ids, at_ids)
    assert ours.dtype == dtype
    step = torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).smallest_normal
    assert ((ours.float() - expected).abs() <= step).all()


@pytest.mark.parametrize("n_vocab", [1, 60, 997])
def test_padded_columns_are_zero_and_neighbours_untouched(n_vocab: int, device: str) -> None:
    logits, dense, _, at_ids = (
        t.to(device) for t in problem("iid", (3, 1000), torch.float32, n_ids=1)
    )
    ids = make_ids(3, n_vocab, 1, ragged=False).to(device)
    out = torch.full((3, 1024), 7.0, device=device)
    lse = row_stats(logits, n_vocab=n_vocab).log_sum_exp
    row_grad(logits, lse, dense, ids, at_ids, out=out[:, :1000], n_vocab=n_vocab)
    expected = row_grad_reference(logits, lse, dense, ids, at_ids, n_vocab=n_vocab)
    assert torch.allclose(out[:, :1000], expected, atol=1e-7)
    assert (out[:, n_vocab:1000] == 0).all()
    assert (out[:, 1000:] == 7).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_in_place_equals_out_of_place(shape: tuple[int, int], device: str) -> None:
    logits, dense, ids, at_ids = (t.to(device) for t in problem("iid", shape, torch.float32))
    lse = row_stats(logits).log_sum_exp
    separate = row_grad(logits, lse, dense, ids, at_ids)
    repeated = row_grad(logits, lse, dense, ids, at_ids)
    inside = row_grad(logits, lse, dense, ids, at_ids, out=logits)
    assert inside.data_ptr() == logits.data_ptr()
    assert torch.equal(separate, inside)
    assert torch.equal(separate, repeated)


@pytest.mark.parametrize("mixed", [False, True])
def test_dense_zero_is_exactly_zero_even_on_nan(mixed: bool, device: str) -> None:
    logits, dense, ids, at_ids = (t.to(device) for t in problem("iid", (3, 1000), torch.float32))
    logits[1] = float("nan")
    dense = torch.where(torch.tensor([mixed, False, mixed], device=device), dense, 0.0)
    out = row_grad(logits, row_stats(logits).log_sum_exp, dense, ids, at_ids)
    listed = torch.zeros_like(out, dtype=torch.bool)
    rows, slots = (ids >= 0).nonzero().unbind(1)
    listed[rows, ids[rows, slots]] = True
    assert (out[1][~listed[1]] == 0).all()
    assert torch.equal(out[rows, ids[rows, slots]], at_ids[rows, slots])


def test_more_ids_than_one_step_of_the_kernel(device: str) -> None:
    logits, dense, ids, at_ids = (
        t.to(device) for t in problem("iid", (2, 3000), torch.float32, n_ids=2500)
    )
    lse = row_stats(logits).log_sum_exp
    expected = row_grad_reference(logits, lse, dense, ids, at_ids)
    assert torch.allclose(row_grad(logits, lse, dense, ids, at_ids), expected, atol=1e-6)


@pytest.mark.parametrize("n_rows", [0, 2])
def test_no_rows_or_no_ids(n_rows: int, device: str) -> None:
    logits = torch.zeros(n_rows, 8, device=device)
    ones = torch.ones(n_rows, device=device)
    none = torch.empty(n_rows, 0, device=device)
    out = row_grad(logits, row_stats(logits).log_sum_exp, ones, none.long(), none)
    assert torch.allclose(out, torch.full((n_rows, 8), 0.125, device=device))
