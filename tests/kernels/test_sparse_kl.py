"""sparse_kl against float64 autograd over whole rows, and its properties, on both paths."""

import pytest
import torch
from kernel_cases import HALF, assert_close, make_ids, make_logits, ulp
from kernel_objectives import (
    LOSSES,
    Teacher,
    forward_kl_tail_closed,
    full_vocab_loss,
    make_teacher,
    objective,
)
from torch import Tensor

from logitcask.kernels import launch
from logitcask.kernels.objective_input import ObjectiveGrad, ObjectiveInput
from logitcask.kernels.sparse_kl import sparse_kl, sparse_kl_reference

P, V, S, K = 5, 700, 12, 6


def problem(device: str, dtype: torch.dtype = torch.float32, n_vocab: int = V):
    logits = make_logits("iid", P, V, dtype).to(device).requires_grad_()
    ids = make_ids(P, n_vocab, S).to(device)
    ids[:, 0] = logits[:, :n_vocab].argmax(-1)  # so that the overlap is never empty
    ids[:, 1:][ids[:, 1:] == ids[:, :1]] = -1
    return logits, ids, make_teacher(ids)


def full_vocab(name: str, logits: Tensor, teacher: Teacher, weight: Tensor, n_vocab: int = V):
    """Return loss [] and gradient [P, V] by autograd, in the logits' dtype."""
    z = logits.detach().requires_grad_()
    loss = LOSSES[name](teacher)
    total = (weight * full_vocab_loss(loss, z, teacher, K, n_vocab)).sum()
    (grad,) = torch.autograd.grad(total, z)
    return total.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("n_vocab", [V, 690])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_full_vocabulary_autograd(
    name: str, n_vocab: int, dtype: torch.dtype, device: str
) -> None:
    logits, ids, teacher = problem(device, dtype, n_vocab)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.1], device=device)
    objective_fn = objective(LOSSES[name](teacher))
    ours = sparse_kl(logits, ids, objective_fn, k=K, row_weight=weight, n_vocab=n_vocab)
    (ours.loss * 3).backward()
    exact_teacher = teacher.to(torch.float64)
    exact, exact_grad = full_vocab(name, logits.double(), exact_teacher, weight.double(), n_vocab)
    naive, naive_grad = full_vocab(name, logits.float(), teacher, weight, n_vocab)
    floor = 8 * ulp(logits, torch.float32)
    assert_close(ours.loss, naive, exact, floor, "loss")
    # A half-precision gradient is rounded once at the end; truncated, in Triton's interpreter.
    rounding = ulp(exact_grad, dtype) if dtype in HALF else 0.0
    assert_close(logits.grad, naive_grad * 3, exact_grad * 3, 3 * (floor + rounding), "gradient")
    assert (logits.grad[:, n_vocab:] == 0).all()
    assert (logits.grad[2] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_float64_is_exact(name: str) -> None:
    logits, ids, teacher = problem("cpu", torch.float64)
    teacher = teacher.to(torch.float64)
    ours = sparse_kl(logits, ids, objective(LOSSES[name](teacher)), k=K)
    ours.loss.backward()
    exact, exact_grad = full_vocab(name, logits, teacher, torch.ones(P, dtype=torch.float64))
    assert torch.allclose(ours.loss, exact, rtol=1e-13, atol=1e-13)
    assert torch.allclose(logits.grad, exact_grad, rtol=1e-12, atol=1e-14)


def test_finite_differences() -> None:
    logits = make_logits("iid", 3, 20, torch.float64).requires_grad_()
    ids = make_ids(3, 20, 5)
    teacher = make_teacher(ids).to(torch.float64)
    objective_fn = objective(LOSSES["forward_kl_tail"](teacher))
    (grad,) = torch.autograd.grad(sparse_kl(logits, ids, objective_fn, k=4).loss, logits)
    steps = 1e-6 * torch.eye(60, dtype=torch.float64).view(60, 3, 20)
    slopes = [
        sparse_kl(logits.detach() + step, ids, objective_fn, k=4).loss
        - sparse_kl(logits.detach() - step, ids, objective_fn, k=4).loss
        for step in steps
    ]
    expected = torch.stack(slopes).view(3, 20) / 2e-6
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


def test_tail_bucket_in_closed_form_survives_a_vanishing_tail(device: str) -> None:
    # r = 1 - sum p is rounding noise here; dz at the listed ids must still be p - q.
    logits = torch.full((1, 50), -20.0, device=device)
    logits[0, :3] = torch.tensor([2.0, 1.0, 0.0])
    logits.requires_grad_()
    ids = torch.tensor([[0, 1, 2]], device=device)
    teacher = make_teacher(ids)
    sparse_kl(logits, ids, forward_kl_tail_closed(teacher), k=3).loss.backward()
    expected = logits.detach().double().softmax(-1)[:, :3] - teacher.log_q.double().exp()
    assert torch.allclose(logits.grad[:, :3].double(), expected, atol=3e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_its_reference(name: str, device: str) -> None:
    logits, ids, teacher = problem(device)
    objective_fn = objective(LOSSES[name](teacher))
    ours = sparse_kl(logits, ids, objective_fn, k=K)
    ours.loss.backward()
    expected, expected_grad = sparse_kl_reference(logits.detach(), ids, objective_fn, k=K)
    assert torch.allclose(ours.row_loss, expected.row_loss, atol=1e-5)
    assert torch.allclose(logits.grad, expected_grad, atol=1e-6)
    assert ours.metrics.keys() == expected.metrics.keys()
    for metric, value in expected.metrics.items():
        assert torch.allclose(ours.metrics[metric], value, atol=1e-5)


@pytest.mark.parametrize("name", ["forward_kl_tail", "reverse_kl_overlap"])
def test_properties(name: str, device: str) -> None:
    logits, ids, teacher = problem(device)

    def run(z: Tensor, t: Teacher, **options: int) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        result = sparse_kl(z, t.ids, objective(LOSSES[name](t)), k=K, **options)
        result.loss.backward()
        return result.row_loss, z.grad

    loss, grad = run(logits, teacher)
    again = run(logits, teacher)
    assert torch.equal(loss, again[0])
    assert torch.equal(grad, again[1]), "two runs differ"
    assert grad.sum(-1).abs().max() < 1e-5, "sum of dz"
    order = torch.randperm(S, generator=torch.Generator().manual_seed(1)).to(ids.device)
    shuffled = Teacher(ids[:, order], teacher.log_q[:, order], teacher.log_tail)
    for what, other in {
        "shift": run(logits + 16, teacher),
        "order of ids": run(logits, shuffled),
        "chunks of 2": run(logits, teacher, chunk_rows=2),
        "strided": run(torch.cat([logits, logits], 1)[:, :V], teacher),
    }.items():
        assert torch.allclose(loss, other[0], atol=2e-5), what
        assert torch.allclose(grad, other[1], atol=2e-5), what


def test_weight_zero_keeps_nan_in_its_row(device: str) -> None:
    logits, ids, teacher = problem(device)
    with torch.no_grad():
        logits[1] = float("nan")
        logits[3] = -torch.inf
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], device=device)
    objective_fn = objective(LOSSES["forward_kl_tail"](teacher))
    result = sparse_kl(logits, ids, objective_fn, k=K, row_weight=weight)
    result.loss.backward()
    assert result.loss.isfinite()
    assert (logits.grad[[1, 3]] == 0).all()
    assert logits.grad.isfinite().all()
    assert result.metrics["entropy"].isnan().tolist() == [False, True, False, True, False]


def test_without_gradient_the_logits_stay_and_no_gradient_is_made(device: str) -> None:
    logits, ids, teacher = problem(device)
    before = logits.detach().clone()
    objective_fn = objective(LOSSES["reverse_kl_overlap"](teacher))
    with torch.no_grad():
        quiet = sparse_kl(logits, ids, objective_fn, k=K)
    loud = sparse_kl(logits, ids, objective_fn, k=K)
    assert not quiet.loss.requires_grad
    assert loud.loss.requires_grad
    assert not loud.row_loss.requires_grad
    assert torch.equal(quiet.loss, loud.loss.detach())
    loud.loss.backward()
    assert torch.equal(logits.detach(), before)


def test_the_objective_sees_rows_by_position(device: str) -> None:
    seen: list[ObjectiveInput] = []

    def objective_fn(view: ObjectiveInput) -> ObjectiveGrad:
        seen.append(view)
        zero = torch.zeros_like(view.log_p)
        return ObjectiveGrad(zero.sum(-1), zero, zero.sum(-1), zero, {})

    logits, ids, _ = problem(device)
    sparse_kl(logits, ids, objective_fn, k=K, chunk_rows=2)
    assert [view.index.tolist() for view in seen] == [[0, 1], [2, 3], [4]]
    log_p = torch.cat([view.log_p for view in seen])
    expected = logits.detach().log_softmax(-1).gather(1, ids.clamp(min=0))
    assert torch.allclose(log_p[ids >= 0], expected[ids >= 0], atol=1e-6)
    assert (log_p[ids < 0] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_row_sums_to_zero_and_is_rounded_once(
    name: str, dtype: torch.dtype, device: str
) -> None:
    logits, ids, teacher = problem(device, dtype)
    sparse_kl(logits, ids, objective(LOSSES[name](teacher)), k=K).loss.backward()
    ours, weight = logits.grad.double(), torch.ones(P, dtype=torch.float64, device=device)
    _, exact = full_vocab(name, logits.double(), teacher.to(torch.float64), weight)
    largest = exact.abs().amax(-1)
    # u, half a unit in the last place, is what rounding adds to each entry.
    u = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    if device == "cpu" and launch.runs_triton(logits):
        u *= 2  # Triton's interpreter truncates where a GPU rounds
    noise = 4 * ulp(logits, torch.float32)  # coefficients are float32, made of numbers up to 1
    assert (ours.sum(-1).abs() <= u * exact.abs().sum(-1) + 1e-3 * largest + noise).all()
    rounded = exact.to(dtype)
    info = torch.finfo(dtype)
    step = info.eps * 2.0 ** (rounded.double().frexp().exponent - 1)
    step = step.clamp(min=info.smallest_normal * info.eps)
    assert ((ours - rounded.double()).abs() <= step + noise).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_incoming_gradient_scales_it(dtype: torch.dtype, device: str) -> None:
    logits, ids, teacher = problem(device)
    logits = logits.detach().to(dtype).requires_grad_()
    objective_fn = objective(LOSSES["forward_kl_tail"](teacher))
    (once,) = torch.autograd.grad(sparse_kl(logits, ids, objective_fn, k=K).loss, logits)
    (half,) = torch.autograd.grad(sparse_kl(logits, ids, objective_fn, k=K).loss * 0.5, logits)
    assert torch.equal(half, once * 0.5), "a power of two rounds nothing"
    two = (
        sparse_kl(logits, ids, objective_fn, k=K).loss
        + sparse_kl(logits, ids, objective_fn, k=K).loss
    )
    two.backward()
    assert torch.equal(logits.grad, 2 * once)


def test_in_place_is_the_same_gradient_in_the_memory_of_the_logits(device: str) -> None:
    logits, ids, teacher = problem(device)
    objective_fn = objective(LOSSES["forward_kl_tail"](teacher))
    separate = sparse_kl(logits, ids, objective_fn, k=K)
    (expected,) = torch.autograd.grad(separate.loss, logits)
    z = logits.detach().clone().requires_grad_() * 1.0  # not a leaf, as the output of a head
    ours = sparse_kl(z, ids, objective_fn, k=K, in_place=True)
    assert torch.equal(ours.row_loss, separate.row_loss)
    (grad,) = torch.autograd.grad(ours.loss, z)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-9)  # rounded elsewhere
    assert grad.data_ptr() == z.data_ptr()
    assert torch.equal(z.detach(), grad)


def test_a_second_backward_is_refused(device: str) -> None:
    logits, ids, teacher = problem(device)
    loss = sparse_kl(logits, ids, objective(LOSSES["forward_kl_tail"](teacher)), k=K).loss
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match=r"handed over; compute the loss again"):
        loss.backward()


def test_empty_batch(device: str) -> None:
    logits = torch.empty(0, V, device=device, requires_grad=True)
    ids = torch.empty(0, S, dtype=torch.int64, device=device)
    result = sparse_kl(logits, ids, objective(LOSSES["forward_kl_tail"](make_teacher(ids))), k=K)
    result.loss.backward()
    assert result.loss.item() == 0
    assert logits.grad.shape == (0, V)
