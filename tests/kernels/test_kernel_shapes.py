"""Any shape, any padding, any ties: the kernels agree with their references, on both paths."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from kernel_objectives import (
    LOSSES,
    entropy_of,
    full_vocab_loss,
    make_teacher,
    objective,
    plus_entropy,
)
from torch import Tensor

from logitcask.kernels.row_grad import row_grad
from logitcask.kernels.row_stats import row_stats
from logitcask.kernels.sparse_kl import sparse_kl, sparse_kl_reference
from logitcask.kernels.topk_select import topk_select, topk_select_reference


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """Draw logits [P, V] with a row stride >= V, ids [P, S], k, n_vocab."""
    n_rows = draw(st.integers(1, 9))
    n_columns = draw(st.integers(3, 300))
    n_vocab = draw(st.integers(1, n_columns)) if draw(st.booleans()) else n_columns
    n_ids = draw(st.integers(1, n_vocab))
    k = draw(st.integers(1, n_vocab))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    wide = torch.randn(n_rows, n_columns + draw(st.integers(0, 5)), generator=generator) * 3
    if draw(st.booleans()):
        wide = wide.round()  # ties
    if draw(st.booleans()):
        wide[:, draw(st.integers(0, n_columns - 1)) :: 3] = -torch.inf
        wide[:, 0] = 0.0
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    order = torch.rand(n_rows, n_vocab, generator=generator).argsort(1)
    ids = order[:, :n_ids].clone()
    if draw(st.booleans()):
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    return wide.to(dtype)[:, :n_columns], ids, k, n_vocab


few = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@few
@given(problem=problems())
def test_select_is_exact_and_gradients_sum_to_zero(
    problem: tuple[Tensor, Tensor, int, int], device: str
) -> None:
    logits, ids, k, n_vocab = problem
    values, top_ids = topk_select(logits.to(device), k, n_vocab=n_vocab)
    expected_values, expected_ids = topk_select_reference(logits, k, n_vocab=n_vocab)
    assert torch.equal(top_ids.cpu(), expected_ids)
    assert torch.equal(values.cpu(), expected_values)
    # Cross-entropy against a uniform teacher on ids: dz = m p - 1 [v in S], m = |S|.
    stats = row_stats(logits.to(device), n_vocab=n_vocab)
    at = logits.gather(1, ids.clamp(min=0)).to(device).float() - stats.log_sum_exp[:, None]
    listed = (ids >= 0).to(device)
    m = listed.sum(-1).float()
    final = m[:, None] * at.exp() - 1
    out = torch.empty(logits.shape, device=device)
    row_grad(
        logits.to(device), stats.log_sum_exp, m, ids.to(device), final, out=out, n_vocab=n_vocab
    )
    assert (out.double().sum(-1).abs() < 2e-5 * (1 + m)).all()


@few
@given(problem=problems(), name=st.sampled_from(sorted(LOSSES)))
def test_sparse_kl_equals_its_reference(
    problem: tuple[Tensor, Tensor, int, int], name: str, device: str
) -> None:
    logits, ids, k, n_vocab = problem
    logits = logits.float().to(device)
    ids = ids.masked_fill(logits.cpu().gather(1, ids.clamp(min=0)).isinf(), -1)
    if name == "forward_kl_tail":  # its tail 1 - sum p is noise where ids hold nearly everything
        ids = ids.masked_fill(torch.arange(ids.shape[1]) >= n_vocab // 3, -1)
    ids = ids.to(device)
    objective_fn = objective(LOSSES[name](make_teacher(ids)))
    z = logits.clone().requires_grad_()
    ours = sparse_kl(z, ids, objective_fn, k=k, n_vocab=n_vocab)
    ours.loss.backward()
    expected, expected_grad = sparse_kl_reference(logits, ids, objective_fn, k=k, n_vocab=n_vocab)
    # With a tail r near 0 after all, 1 / r multiplies the rounding of both sides.
    assume(name != "forward_kl_tail" or expected_grad.abs().max() < 10)
    assert torch.allclose(ours.row_loss, expected.row_loss, atol=1e-4, rtol=1e-4)
    assert torch.allclose(z.grad, expected_grad, atol=1e-4, rtol=1e-4)


@few
@given(problem=problems())
def test_an_entropy_in_the_loss_equals_float64_autograd(
    problem: tuple[Tensor, Tensor, int, int], device: str
) -> None:
    logits, ids, k, n_vocab = problem
    listed = logits.gather(1, ids.clamp(min=0)).isfinite()
    ids = ids.masked_fill(~listed, -1).to(device)
    factor = torch.linspace(-1, 1, len(logits)).to(device)
    teacher = make_teacher(ids)
    loss = LOSSES["reverse_kl_renormalised"]
    z = logits.to(device).requires_grad_()
    objective_fn = plus_entropy(objective(loss(teacher)), factor)
    (grad,) = torch.autograd.grad(sparse_kl(z, ids, objective_fn, k=k, n_vocab=n_vocab).loss, z)
    exact_z, exact_teacher = z.detach().double().requires_grad_(), teacher.to(torch.float64)
    rows = full_vocab_loss(loss(exact_teacher), exact_z, exact_teacher, k, n_vocab)
    (expected,) = torch.autograd.grad((rows + factor * entropy_of(exact_z, n_vocab)).sum(), exact_z)
    step = (
        torch.finfo(logits.dtype).eps * expected.abs() + torch.finfo(logits.dtype).smallest_normal
    )
    assert ((grad - expected).abs() <= step + 3e-5).all()
    assert (grad[:, n_vocab:] == 0).all()


def test_rows_past_two_to_the_31(device: str) -> None:
    """Check 64-bit offsets: row 4 starts 2^31 logits after row 0.

    The memory between the rows is never touched, so it costs addresses only.
    """
    stride = 2**29
    try:
        logits = torch.empty(4 * stride + 128, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of addresses here: {error}")
    logits = logits.as_strided((5, 100), (stride, 1))
    for row in range(5):
        logits[row] = torch.randn(100, generator=torch.Generator().manual_seed(row))
    small = logits.contiguous()
    far, near = row_stats(logits), row_stats(small)
    assert torch.equal(far.log_sum_exp, near.log_sum_exp)
    assert torch.equal(topk_select(logits, 3)[1], topk_select(small, 3)[1])
    dense = torch.ones(5, device=device)
    ids = torch.zeros(5, 1, dtype=torch.int64, device=device)
    expected = row_grad(small, near.log_sum_exp, dense, ids, dense[:, None])
    assert torch.equal(
        row_grad(logits, far.log_sum_exp, dense, ids, dense[:, None], out=logits), expected
    )
