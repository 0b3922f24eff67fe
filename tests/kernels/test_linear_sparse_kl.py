"""linear_sparse_kl equals sparse_kl of the product, and autograd, and never holds [P, V]."""

import pytest
import torch
from kernel_cases import make_ids
from kernel_objectives import LOSSES, full_vocab_loss, make_teacher, objective
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from logitcask.kernels.linear_sparse_kl import linear_sparse_kl, linear_sparse_kl_reference
from logitcask.kernels.sparse_kl import sparse_kl

P, V, D, S, K = 5, 301, 24, 10, 5


def problem(device: str, dtype: torch.dtype = torch.float32, rows: int = P):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) * 0.6
    ids = make_ids(rows, V, S) if rows else torch.empty(0, S, dtype=torch.int64)
    if rows:
        ids[:, 0] = (hidden @ weight.T).argmax(-1)
        ids[:, 1:][ids[:, 1:] == ids[:, :1]] = -1
    hidden, weight = (t.to(device, dtype).requires_grad_() for t in (hidden, weight))
    return hidden, weight, ids.to(device)


@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_float64_equals_full_vocabulary_autograd(name: str, chunk_rows: int | None) -> None:
    hidden, weight, ids = problem("cpu", torch.float64)
    teacher = make_teacher(ids).to(torch.float64)
    row_weight = torch.rand(P, dtype=torch.float64)
    objective_fn = objective(LOSSES[name](teacher))
    ours = linear_sparse_kl(
        hidden, weight, ids, objective_fn, k=K, row_weight=row_weight, chunk_rows=chunk_rows
    )
    grads = torch.autograd.grad(ours.loss * -2, (hidden, weight))
    rows = full_vocab_loss(LOSSES[name](teacher), hidden @ weight.T, teacher, K)
    expected = torch.autograd.grad((row_weight * rows).sum() * -2, (hidden, weight))
    assert torch.allclose(ours.row_loss, rows.detach(), atol=1e-12)
    for ours_d, expected_d in zip(grads, expected, strict=True):
        assert torch.allclose(ours_d, expected_d, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_equals_sparse_kl_of_the_product(name: str, device: str) -> None:
    n_vocab = 290
    hidden, weight, ids = problem(device)
    ids = ids.masked_fill(ids >= n_vocab, -1)
    objective_fn = objective(LOSSES[name](make_teacher(ids)))
    ours = linear_sparse_kl(hidden, weight, ids, objective_fn, k=K, n_vocab=n_vocab, chunk_rows=3)
    grads = torch.autograd.grad(ours.loss, (hidden, weight))
    expected = sparse_kl(hidden @ weight.T, ids, objective_fn, k=K, n_vocab=n_vocab)
    expected_grads = torch.autograd.grad(expected.loss, (hidden, weight))
    assert torch.allclose(ours.loss, expected.loss, rtol=1e-5)
    for metric, value in expected.metrics.items():
        assert torch.allclose(ours.metrics[metric], value, atol=1e-5)
    for ours_d, expected_d in zip(grads, expected_grads, strict=True):
        assert torch.allclose(ours_d, expected_d, atol=2e-5)
    assert (grads[1][n_vocab:] == 0).all()


def test_equals_its_reference(device: str) -> None:
    hidden, weight, ids = problem(device)
    objective_fn = objective(LOSSES["forward_kl_tail"](make_teacher(ids)))
    ours = linear_sparse_kl(hidden, weight, ids, objective_fn, k=K)
    grads = torch.autograd.grad(ours.loss, (hidden, weight))
    expected, *expected_grads = linear_sparse_kl_reference(
        hidden.detach(), weight.detach(), ids, objective_fn, k=K
    )
    assert torch.allclose(ours.loss, expected.loss, rtol=1e-5)
    for ours_d, expected_d in zip(grads, expected_grads, strict=True):
        assert torch.allclose(ours_d, expected_d, atol=2e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_a_frozen_input_gets_no_gradient(frozen: str, device: str) -> None:
    hidden, weight, ids = problem(device)
    objective_fn = objective(LOSSES["forward_kl_tail"](make_teacher(ids)))
    expected = torch.autograd.grad(
        linear_sparse_kl(hidden, weight, ids, objective_fn, k=K).loss, (hidden, weight)
    )
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = linear_sparse_kl(hidden, weight, ids, objective_fn, k=K, chunk_rows=4).loss
    assert loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    loss.backward()
    live, grad = (weight, expected[1]) if frozen == "hidden" else (hidden, expected[0])
    assert torch.allclose(live.grad, grad, atol=1e-5)
    assert (hidden if frozen == "hidden" else weight).grad is None


def test_weight_zero_keeps_nan_out_of_both_gradients(device: str) -> None:
    hidden, weight, ids = problem(device)
    with torch.no_grad():
        hidden[2] = float("nan")
    row_weight = torch.ones(P, device=device)
    row_weight[2] = 0
    objective_fn = objective(LOSSES["forward_kl_tail"](make_teacher(ids)))
    result = linear_sparse_kl(hidden, weight, ids, objective_fn, k=K, row_weight=row_weight)
    result.loss.backward()
    assert result.loss.isfinite()
    assert (hidden.grad[2] == 0).all()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert result.metrics["entropy"].isnan().sum() == 1


def test_no_rows_still_carry_gradients(device: str) -> None:
    hidden, weight, ids = problem(device, rows=0)
    objective_fn = objective(LOSSES["forward_kl_tail"](make_teacher(ids)))
    loss = linear_sparse_kl(hidden, weight, ids, objective_fn, k=K).loss
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == (0, D)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_bfloat16_hidden_with_a_float32_weight(device: str) -> None:
    hidden, weight, ids = problem(device)
    half = hidden.detach().bfloat16().requires_grad_()
    objective_fn = objective(LOSSES["forward_kl_tail"](make_teacher(ids)))
    loss = linear_sparse_kl(half, weight, ids, objective_fn, k=K, chunk_rows=4).loss
    loss.backward()
    assert half.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == loss.dtype == torch.float32
    _, expected_hidden, expected_weight = linear_sparse_kl_reference(
        half.detach().float(), weight.detach().bfloat16().float(), ids, objective_fn, k=K
    )
    # Logits and d_logits are rounded to 8 bits on the way: 2^-8 of logits up to 16, twice.
    assert (half.grad.float() - expected_hidden).norm() < 0.02 * expected_hidden.norm()
    assert (weight.grad - expected_weight).norm() < 0.02 * expected_weight.norm()


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, held)
        return out


def test_logits_of_all_rows_never_exist() -> None:
    rows, n_vocab = 64, 500  # [P, V] would be larger than the weight and everything else
    hidden = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(n_vocab, 16, requires_grad=True)
    ids = make_ids(rows, n_vocab, 4)
    objective_fn = objective(LOSSES["reverse_kl_renormalised"](make_teacher(ids)))
    with Sizes() as sizes:
        linear_sparse_kl(hidden, weight, ids, objective_fn, k=4, chunk_rows=8).loss.backward()
    assert sizes.largest == weight.numel() < rows * n_vocab / 2


def test_two_runs_are_bitwise_equal(device: str) -> None:
    hidden, weight, ids = problem(device)
    objective_fn = objective(LOSSES["reverse_kl_overlap"](make_teacher(ids)))
    first, second = (
        torch.autograd.grad(
            linear_sparse_kl(hidden, weight, ids, objective_fn, k=K, chunk_rows=3).loss,
            (hidden, weight),
        )
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_autocast_does_not_change_the_dtype() -> None:
    hidden, weight, ids = problem("cpu")
    objective_fn = objective(LOSSES["forward_kl_tail"](make_teacher(ids)))
    plain = linear_sparse_kl(hidden, weight, ids, objective_fn, k=K).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_sparse_kl(hidden, weight, ids, objective_fn, k=K).loss
    assert torch.equal(plain, cast)


def test_memory_between_the_rows_of_the_buffer_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Put NaN into the gap between rows of a vocabulary that is no multiple of 16.

    torch's bfloat16 product on a CPU multiplies the gap, and NaN times 0 is NaN.
    """
    empty = Tensor.new_empty

    def poisoned(self: Tensor, *shape: object, **options: object) -> Tensor:
        tensor = empty(self, *shape, **options)  # type: ignore[arg-type]
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    for rows in (54, 100):
        hidden, weight, ids = problem("cpu", torch.bfloat16, rows)
        objective_fn = objective(LOSSES["forward_kl_tail"](make_teacher(ids)))
        loss = linear_sparse_kl(hidden, weight, ids, objective_fn, k=K).loss
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert all(grad.isfinite().all() for grad in grads)
