"""A loss with the entropy of p in it: its gradient at every id is that of float64 autograd."""

import pytest
import torch
from kernel_cases import HALF, KINDS_AND_DTYPES, SHAPES, assert_close, make_ids, make_logits, ulp
from kernel_objectives import (
    LOSSES,
    Teacher,
    entropy_of,
    full_vocab_loss,
    make_teacher,
    objective,
    plus_entropy,
)
from torch import Tensor

from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.logit_transform import PLAIN, LogitTransform
from logitcask.kernels.objective_input import ObjectiveFn
from logitcask.kernels.row_grad import row_grad, row_grad_reference
from logitcask.kernels.row_stats import row_stats, row_stats_reference
from logitcask.kernels.sparse_kl import sparse_kl, sparse_kl_reference

P, V, S, K = 5, 700, 12, 6
LOSS = LOSSES["reverse_kl_renormalised"]
FACTOR = torch.tensor([0.3, -1.0, 0.5, 0.0, 2.0])
WEIGHT = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.1])
MAPS = {
    "plain": PLAIN,
    "temperature": LogitTransform(temperature=2.0),
    "all": LogitTransform(scale=1.7, softcap=6.0, temperature=0.8),
}
every_map = pytest.mark.parametrize("y", MAPS.values(), ids=MAPS)


def problem(
    device: str, kind: str = "iid", dtype: torch.dtype = torch.float32, n_vocab: int = V
) -> tuple[Tensor, Tensor, Teacher, ObjectiveFn]:
    logits = make_logits(kind, P, V, dtype)
    ids = make_ids(P, n_vocab, S)
    ids = ids.masked_fill(logits.gather(1, ids.clamp(min=0)).isinf(), -1).to(device)
    teacher = make_teacher(ids)
    if dtype == torch.float64:
        teacher = teacher.to(dtype)
    objective_fn = plus_entropy(objective(LOSS(teacher)), FACTOR.to(device))
    return logits.to(device).requires_grad_(), ids, teacher, objective_fn


def full_vocab(
    logits: Tensor, teacher: Teacher, n_vocab: int = V, y: LogitTransform = PLAIN
) -> tuple[Tensor, Tensor]:
    """Weighted loss [] and gradient [P, V] by autograd, in the logits' dtype."""
    z = logits.detach().requires_grad_()
    factor, weight = (t.to(z.device, z.dtype) for t in (FACTOR, WEIGHT))
    rows = full_vocab_loss(LOSS(teacher), y.apply(z), teacher, K, n_vocab)
    total = (weight * (rows + factor * entropy_of(y.apply(z), n_vocab))).sum()
    (grad,) = torch.autograd.grad(total, z)
    return total.detach(), grad


@pytest.mark.parametrize(
    ("kind", "dtype", "n_vocab"),
    [(*each, (V, 690)[i % 2]) for i, each in enumerate(KINDS_AND_DTYPES)],
    ids=str,
)
def test_equals_full_vocabulary_autograd(
    kind: str, dtype: torch.dtype, n_vocab: int, device: str
) -> None:
    logits, ids, teacher, objective_fn = problem(device, kind, dtype, n_vocab)
    ours = sparse_kl(logits, ids, objective_fn, k=K, row_weight=WEIGHT.to(device), n_vocab=n_vocab)
    (grad,) = torch.autograd.grad(ours.loss, logits)
    exact, exact_grad = full_vocab(logits.double(), teacher.to(torch.float64), n_vocab)
    naive, naive_grad = full_vocab(logits.float(), teacher, n_vocab)
    floor = 8 * ulp(logits, torch.float32)
    assert_close(ours.loss, naive, exact, floor, "loss")
    # A half-precision gradient is rounded once at the end; truncated, in Triton's interpreter.
    rounding = ulp(exact_grad, dtype) if dtype in HALF else 0.0
    assert_close(grad, naive_grad, exact_grad, floor + rounding, "gradient")
    assert (grad[:, n_vocab:] == 0).all()
    assert (grad[2] == 0).all()


@every_map
@pytest.mark.parametrize("kind", ["iid", "thirds -inf", "ramp down"])
def test_float64_is_exact_through_every_map(kind: str, y: LogitTransform) -> None:
    logits, ids, teacher, objective_fn = problem("cpu", kind, torch.float64)
    if y.softcap is not None:  # it makes a finite logit of -inf, at which its slope is 0
        logits = logits.detach().nan_to_num(neginf=-9.0).requires_grad_()
    options = {"k": K, "row_weight": WEIGHT, "logit_transform": y}
    exact, expected = full_vocab(logits, teacher, y=y)
    ours = sparse_kl(logits, ids, objective_fn, **options)
    torch.testing.assert_close(ours.loss.detach(), exact, rtol=1e-12, atol=1e-13)
    (grad,) = torch.autograd.grad(ours.loss, logits)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-13)
    _, d_logits = sparse_kl_reference(logits.detach(), ids, objective_fn, **options)
    torch.testing.assert_close(d_logits, expected, rtol=1e-10, atol=1e-13)


@every_map
def test_hidden_states(y: LogitTransform, device: str) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(P, 16, generator=generator).to(device).requires_grad_()
    head = torch.randn(V, 16, generator=generator).to(device).requires_grad_()
    _, ids, teacher, objective_fn = problem(device)
    options = {"k": K, "row_weight": WEIGHT.to(device), "logit_transform": y}
    ours = linear_sparse_kl(hidden, head, ids, objective_fn, chunk_rows=2, **options)
    grads = torch.autograd.grad(ours.loss, (hidden, head))
    _, dz = full_vocab(hidden.double() @ head.double().T, teacher.to(torch.float64), y=y)
    for got, expected in zip(grads, (dz @ head.double(), dz.T @ hidden.double()), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_row_grad_against_float64(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    logits, ids = make_logits(kind, *shape, dtype), make_ids(*shape, 4)
    dense, log = torch.rand(2, shape[0], generator=torch.Generator().manual_seed(5)) - 0.5
    at = torch.ones(ids.shape)
    exact_lse, lse = (row_stats_reference(z).log_sum_exp for z in (logits.double(), logits))
    exact = row_grad_reference(
        logits.double(), exact_lse, dense.double(), ids, at, dense_log=log.double()
    )
    naive = row_grad_reference(logits, lse, dense, ids, at, dense_log=log)
    out = torch.empty(shape, device=device)  # float32: the interpreter truncates half precision
    z, *inputs = (t.to(device) for t in (logits, dense, ids, at))
    row_grad(z, row_stats(z).log_sum_exp, *inputs, dense_log=log.to(device), out=out)
    # p log p is as close as log p, which is as close as log-sum-exp.
    assert_close(out, naive, exact, 4 * ulp(logits, torch.float32), "gradient")


@pytest.mark.parametrize("y", [PLAIN, MAPS["all"]], ids=["plain", "all"])
def test_a_row_rests_only_where_both_coefficients_are_zero(y: LogitTransform, device: str) -> None:
    logits = make_logits("iid", 4, 1000, torch.float32).to(device)
    logits[[1, 3]] = torch.nan
    ids = torch.zeros(4, 1, dtype=torch.int64, device=device)
    dense, log = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.5, 0.0, 0.0, 0.5]], device=device)
    lse = row_stats(logits, logit_transform=y).log_sum_exp
    inputs = (logits, lse, dense, ids, dense[:, None])
    separate = row_grad(*inputs, dense_log=log, logit_transform=y)
    assert (separate[0, 1:] < 0).all(), "p log p"
    assert (separate[1, 1:] == 0).all(), "whatever it holds"
    assert torch.allclose(separate[2], row_grad(*inputs, logit_transform=y)[2], rtol=1e-6)
    assert separate[3, 1:].isnan().all(), "a broken student must show"
    inside = row_grad(*inputs, dense_log=log, logit_transform=y, out=logits)
    assert torch.equal(inside.nan_to_num(nan=7.0), separate.nan_to_num(nan=7.0))


def test_properties(device: str) -> None:
    logits, ids, teacher, objective_fn = problem(device)
    (grad,) = torch.autograd.grad(sparse_kl(logits, ids, objective_fn, k=K).loss, logits)
    assert grad.sum(-1).abs().max() < 1e-5, "sum of dz"
    assert (grad.abs() > 1e-9).sum() > 0.7 * P * V, "it reaches every id but of the row of factor 0"
    (chunks,) = torch.autograd.grad(
        sparse_kl(logits, ids, objective_fn, k=K, chunk_rows=2).loss, logits
    )
    assert torch.allclose(chunks, grad, atol=1e-6)
    plain = objective(LOSS(teacher))
    (bare,) = torch.autograd.grad(sparse_kl(logits, ids, plain, k=K).loss, logits)
    # Factor 0 adds nothing; without the term the same numbers are rounded elsewhere.
    torch.testing.assert_close(grad[3], bare[3], rtol=1e-5, atol=1e-9)
    # The uniform distribution is the entropy's maximum.
    flat = torch.full((P, V), -2.0, device=device, requires_grad=True)
    with_h, without = (
        torch.autograd.grad(sparse_kl(flat, ids, each, k=K).loss, flat)[0]
        for each in (objective_fn, plain)
    )
    assert torch.allclose(with_h, without, atol=1e-7)


def test_weight_zero_keeps_nan_in_its_row(device: str) -> None:
    logits, ids, _, objective_fn = problem(device)
    with torch.no_grad():
        logits[2] = torch.nan
    result = sparse_kl(logits, ids, objective_fn, k=K, row_weight=WEIGHT.to(device))
    (grad,) = torch.autograd.grad(result.loss, logits)
    assert result.loss.isfinite()
    assert grad.isfinite().all()
    assert (grad[2] == 0).all()
