"""Scale, soft cap and temperature: as autograd through them has it, in every op, on both paths."""

import pytest
import torch
from kernel_cases import assert_close, make_ids, make_logits
from kernel_objectives import LOSSES, full_vocab_loss, make_teacher, objective
from torch import Tensor

from logitcask.kernels.indexed_linear import indexed_linear
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl, linear_sparse_kl_reference
from logitcask.kernels.logit_transform import LogitTransform
from logitcask.kernels.row_grad import row_grad, row_grad_reference
from logitcask.kernels.row_stats import row_stats, row_stats_reference
from logitcask.kernels.sparse_kl import sparse_kl, sparse_kl_reference

MAPS = {
    "scale": LogitTransform(scale=0.0625),
    "temperature": LogitTransform(temperature=2.0),
    "soft cap": LogitTransform(softcap=4.0),
    "all": LogitTransform(scale=1.7, softcap=6.0, temperature=0.8),
}
every_map = pytest.mark.parametrize("y", MAPS.values(), ids=MAPS)


def transformed(z: Tensor, y: LogitTransform) -> Tensor:
    """Return the formula in torch."""
    z = z * y.scale
    if y.softcap is not None:
        z = y.softcap * (z / y.softcap).tanh()
    return z / y.temperature


@every_map
def test_apply_and_slope_are_the_formula_and_its_derivative(y: LogitTransform) -> None:
    z = torch.linspace(-40, 40, 81, dtype=torch.float64, requires_grad=True)
    expected = transformed(z, y)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(y.apply(z.detach()), expected.detach())
    torch.testing.assert_close(y.slope(z.detach()), slope)


@every_map
@pytest.mark.parametrize("kind", ["iid", "ties", "thirds -inf", "ramp up", "ramp down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_those_of_mapped_logits(
    y: LogitTransform, kind: str, dtype: torch.dtype, device: str
) -> None:
    logits = make_logits(kind, 3, 4801, dtype)
    n_vocab = 4777  # a tail that is cut, in which a soft cap would find mass
    ours = row_stats(logits.to(device), n_vocab=n_vocab, logit_transform=y)
    naive = row_stats_reference(logits, n_vocab=n_vocab, logit_transform=y)
    exact = row_stats_reference(transformed(logits.double(), y), n_vocab=n_vocab)
    for name, mine, plain, expected in zip(exact._fields, ours, naive, exact, strict=True):
        assert_close(mine, plain, expected, 4e-6 * max(1.0, float(expected.abs().max())), name)


@every_map
@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in place"])
def test_gradient_has_the_slope(y: LogitTransform, in_place: bool, device: str) -> None:
    logits = make_logits("iid", 4, 4801, torch.float32)
    ids, n_vocab = make_ids(4, 4700, 9), 4777
    lse = row_stats_reference(logits, n_vocab=n_vocab, logit_transform=y).log_sum_exp
    dense = torch.tensor([1.0, -0.3, 0.0, 2.0])
    at = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0))
    inputs = (lse.to(device), dense.to(device), ids.to(device), at.to(device))
    z = logits.clone().to(device)
    out = z if in_place else None
    ours = row_grad(z, *inputs, out=out, n_vocab=n_vocab, logit_transform=y)
    exact = row_grad_reference(
        logits.double(), lse.double(), dense.double(), ids, at, n_vocab=n_vocab, logit_transform=y
    )
    naive = row_grad_reference(logits, lse, dense, ids, at, n_vocab=n_vocab, logit_transform=y)
    assert_close(ours, naive, exact, 1e-6, "gradient")


@every_map
@pytest.mark.parametrize("name", LOSSES)
def test_float64_equals_autograd_through_the_map(name: str, y: LogitTransform) -> None:
    logits = make_logits("iid", 5, 60, torch.float64).requires_grad_()
    ids = make_ids(5, 60, 8)
    teacher = make_teacher(ids).to(torch.float64)
    objective_fn = objective(LOSSES[name](teacher))
    rows = full_vocab_loss(LOSSES[name](teacher), transformed(logits, y), teacher, 6)
    (expected,) = torch.autograd.grad(rows.sum(), logits)
    ours = sparse_kl(logits, ids, objective_fn, k=6, logit_transform=y)
    (grad,) = torch.autograd.grad(ours.loss, logits)
    torch.testing.assert_close(ours.row_loss, rows.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)
    reference, d_logits = sparse_kl_reference(
        logits.detach(), ids, objective_fn, k=6, logit_transform=y
    )
    torch.testing.assert_close(reference.row_loss, rows.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(d_logits, expected, rtol=1e-9, atol=1e-12)


@every_map
@pytest.mark.parametrize("name", LOSSES)
def test_hidden_states_on_both_paths(name: str, y: LogitTransform, device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(5, 24, generator=generator), torch.randn(301, 24)
    ids = make_ids(5, 290, 8)
    objective_fn = objective(LOSSES[name](make_teacher(ids.to(device))))
    inputs = [t.to(device).requires_grad_() for t in (hidden, weight)]
    options = {"k": 6, "n_vocab": 290, "logit_transform": y}
    expected, *expected_grads = linear_sparse_kl_reference(
        hidden, weight, ids, objective(LOSSES[name](make_teacher(ids))), **options
    )
    ops = [linear_sparse_kl(*inputs, ids.to(device), objective_fn, chunk_rows=3, **options)]
    if name != "forward_kl_tail":
        ops.append(indexed_linear(*inputs, ids.to(device), objective_fn, chunk_rows=3, **options))
    if name == "reverse_kl_renormalised":
        ops.append(indexed_linear(*inputs, ids.to(device), objective_fn, **(options | {"k": None})))
    for ours in ops:
        torch.testing.assert_close(ours.row_loss.cpu(), expected.row_loss, rtol=1e-4, atol=1e-5)
        grads = torch.autograd.grad(ours.loss, inputs)
        for mine, theirs in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("field", LogitTransform._fields)
def test_what_is_no_positive_number_is_refused(field: str, wrong: float) -> None:
    y = LogitTransform(**{field: wrong})
    with pytest.raises(
        ValueError, match=rf"logit_transform\.{field}={wrong} must be a positive number"
    ):
        row_stats(torch.zeros(2, 5), logit_transform=y)
