"""indexed_linear equals linear_sparse_kl for losses renormalised on a support, and does less."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import assert_close, make_ids
from kernel_objectives import LOSSES, Teacher, full_vocab_loss, make_teacher, objective
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from logitcask.kernels import indexed_rows
from logitcask.kernels.indexed_linear import indexed_linear
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.objective_input import ObjectiveGrad, ObjectiveInput

P, V, D, S, K = 7, 301, 40, 10, 6
RENORMALISED = {"reverse_kl_renormalised": None, "reverse_kl_overlap": K}
"""Loss -> the live top-k that it needs."""


def problem(device: str, dtype: torch.dtype = torch.float32, rows: int = P, ids_of: int = V):
    """Return inputs with ids from the first `ids_of`, so that rows share them."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) * 0.4
    ids = make_ids(rows, ids_of, S) if rows else torch.empty(0, S, dtype=torch.int64)
    if rows:
        best = (hidden @ weight.T).topk(3).indices
        ids[(ids[:, :, None] == best[:, None]).any(-1)] = -1
        ids[:, :3] = best
    hidden, weight = (t.to(device, dtype).requires_grad_() for t in (hidden, weight))
    return hidden, weight, ids.to(device)


def grads_of(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("ids_of", [V, 16], ids=["ids apart", "ids shared"])
@pytest.mark.parametrize(("name", "k"), RENORMALISED.items(), ids=RENORMALISED)
def test_float64_equals_full_vocabulary_autograd(name: str, k: int | None, ids_of: int) -> None:
    hidden, weight, ids = problem("cpu", torch.float64, ids_of=ids_of)
    teacher = make_teacher(ids).to(torch.float64)
    row_weight = torch.rand(P, dtype=torch.float64)
    objective_fn = objective(LOSSES[name](teacher))
    ours = indexed_linear(
        hidden,
        weight,
        ids,
        objective_fn,
        k=k,
        row_weight=row_weight,
        chunk_rows=None if k is None else 3,
    )
    grads = grads_of(ours.loss * -2, hidden, weight)
    rows = full_vocab_loss(LOSSES[name](teacher), hidden @ weight.T, teacher, K)
    expected = grads_of((row_weight * rows).sum() * -2, hidden, weight)
    assert torch.allclose(ours.row_loss, rows.detach(), atol=1e-12)
    for ours_d, expected_d in zip(grads, expected, strict=True):
        assert expected_d.abs().max() > 1e-3
        assert torch.allclose(ours_d, expected_d, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_known_support_is_no_less_exact_than_the_dense_product(
    dtype: torch.dtype, device: str
) -> None:
    hidden, weight, ids = problem(device, dtype, ids_of=24)
    teacher = make_teacher(ids)
    objective_fn = objective(LOSSES["reverse_kl_renormalised"](teacher))
    ours = indexed_linear(hidden, weight, ids, objective_fn)
    dense = linear_sparse_kl(hidden, weight, ids, objective_fn, k=1)
    exact = [t.detach().double().cpu().requires_grad_() for t in (hidden, weight)]
    in_64 = make_teacher(ids.cpu()).to(torch.float64)
    loss = LOSSES["reverse_kl_renormalised"](in_64)
    rows = full_vocab_loss(loss, exact[0] @ exact[1].T, in_64, K)
    assert_close(ours.row_loss, dense.row_loss, rows, 1e-5, "loss")
    for ours_d, dense_d, exact_d in zip(
        grads_of(ours.loss, hidden, weight),
        grads_of(dense.loss, hidden, weight),
        grads_of(rows.sum(), *exact),
        strict=True,
    ):
        assert ours_d.dtype == dtype
        # One unit in the last place: Triton's interpreter truncates where a GPU rounds.
        floor = 2 * torch.finfo(dtype).eps * float(exact_d.abs().max())
        assert_close(ours_d, dense_d, exact_d, floor, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_live_support_sees_what_the_dense_product_sees(dtype: torch.dtype, device: str) -> None:
    hidden, weight, ids = problem(device, dtype, ids_of=24)
    objective_fn = objective(LOSSES["reverse_kl_overlap"](make_teacher(ids)))
    ours = indexed_linear(hidden, weight, ids, objective_fn, k=K, chunk_rows=3)
    dense = linear_sparse_kl(hidden, weight, ids, objective_fn, k=K, chunk_rows=3)
    assert torch.equal(ours.row_loss, dense.row_loss)
    for name, value in dense.metrics.items():
        assert torch.equal(ours.metrics[name], value)
    for ours_d, dense_d in zip(
        grads_of(ours.loss, hidden, weight), grads_of(dense.loss, hidden, weight), strict=True
    ):
        # The dense product's coefficients are rounded to the dtype before they are summed.
        allowed = 4 * torch.finfo(dtype).eps * float(dense_d.abs().max())
        assert (ours_d - dense_d).abs().max() <= allowed


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 200),
    n_vocab=st.integers(2, 60),
    n_ids=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_products_with_listed_rows(
    rows: int, columns: int, n_vocab: int, n_ids: int, seed: int, device: str
) -> None:
    """Compare the three products with whole matrices in float64, on any shape."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, columns, generator=generator)
    weight = torch.randn(n_vocab, columns, generator=generator)
    ids = torch.rand(rows, n_vocab, generator=generator).argsort(1)[:, : min(n_ids, n_vocab)]
    ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    c = torch.randn(ids.shape, generator=generator)
    c[torch.rand(ids.shape, generator=generator) < 0.1] = 0.0
    listed = ids >= 0
    whole = torch.zeros(rows, n_vocab + 1, dtype=torch.float64)
    whole.scatter_(1, torch.where(listed, ids, n_vocab), c.double())
    whole = whole[:, :n_vocab]  # [P, V], coefficients where a row lists an id

    hidden_d, weight_d, ids_d, c_d = (t.to(device) for t in (hidden, weight, ids, c))
    z = indexed_rows.logits_at(hidden_d, weight_d, ids_d).cpu()
    expected_z = (hidden.double() @ weight.double().T).gather(1, ids.clamp(min=0))
    assert (z[~listed] == -torch.inf).all()
    assert torch.allclose(z.double()[listed], expected_z[listed], atol=1e-4)
    d_hidden = indexed_rows.weighted_rows(c_d, weight_d, ids_d, torch.float32).cpu()
    assert torch.allclose(d_hidden.double(), whole @ weight.double(), atol=1e-4)
    terms = indexed_rows.sorted_terms(c_d, ids_d)
    d_weight = indexed_rows.summed_by_id(terms, hidden_d, n_vocab, torch.float32).cpu()
    assert torch.allclose(d_weight.double(), whole.T @ hidden.double(), atol=1e-4)
    at, sums = indexed_rows.compact_by_id(terms, hidden_d, torch.float32)
    assert torch.equal(at.cpu(), ids[listed & (c != 0)].unique())
    assert torch.equal(sums.cpu(), d_weight[at.cpu()])


@pytest.mark.parametrize(("name", "k"), RENORMALISED.items(), ids=RENORMALISED)
def test_a_sparse_gradient_holds_the_dense_one(name: str, k: int | None, device: str) -> None:
    hidden, weight, ids = problem(device, ids_of=24)
    objective_fn = objective(LOSSES[name](make_teacher(ids)))
    indexed_linear(hidden, weight, ids, objective_fn, k=k).loss.backward()
    dense, weight.grad = weight.grad, None
    indexed_linear(hidden, weight, ids, objective_fn, k=k, sparse_weight_grad=True).loss.backward()
    assert weight.grad.is_sparse
    assert weight.grad._nnz() <= 24 + 3 * P
    assert torch.equal(weight.grad.to_dense(), dense)
    before = weight.detach().clone()
    torch.optim.SGD([weight], lr=0.5).step()
    assert torch.allclose(weight, before - 0.5 * dense)


def test_a_head_tied_to_the_embedding_gets_both_gradients(device: str) -> None:
    _, weight, ids = problem(device)
    tokens = torch.arange(P, device=device) % 3
    objective_fn = objective(LOSSES["reverse_kl_renormalised"](make_teacher(ids)))
    ours = indexed_linear(weight[tokens], weight, ids, objective_fn).loss
    dense = linear_sparse_kl(weight[tokens], weight, ids, objective_fn, k=1).loss
    (got,), (expected,) = grads_of(ours, weight), grads_of(dense, weight)
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_a_frozen_input_gets_no_gradient(frozen: str, device: str) -> None:
    hidden, weight, ids = problem(device)
    objective_fn = objective(LOSSES["reverse_kl_renormalised"](make_teacher(ids)))
    expected = grads_of(indexed_linear(hidden, weight, ids, objective_fn).loss, hidden, weight)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = indexed_linear(hidden, weight, ids, objective_fn).loss
    assert loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    loss.backward()
    live, grad = (weight, expected[1]) if frozen == "hidden" else (hidden, expected[0])
    assert torch.equal(live.grad, grad)
    assert (hidden if frozen == "hidden" else weight).grad is None


@pytest.mark.parametrize(("name", "k"), RENORMALISED.items(), ids=RENORMALISED)
def test_weight_zero_keeps_nan_out_of_both_gradients(name: str, k: int | None, device: str) -> None:
    hidden, weight, ids = problem(device, ids_of=24)
    with torch.no_grad():
        hidden[2] = float("nan")
    row_weight = torch.ones(P, device=device)
    row_weight[2] = 0
    objective_fn = objective(LOSSES[name](make_teacher(ids)))
    result = indexed_linear(hidden, weight, ids, objective_fn, k=k, row_weight=row_weight)
    result.loss.backward()
    assert result.loss.isfinite()
    assert (hidden.grad[2] == 0).all()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_a_nan_row_shows_in_the_loss(device: str) -> None:
    hidden, weight, ids = problem(device)
    with torch.no_grad():
        hidden[2] = float("nan")
    objective_fn = objective(LOSSES["reverse_kl_renormalised"](make_teacher(ids)))
    result = indexed_linear(hidden, weight, ids, objective_fn)
    assert result.loss.isnan()
    assert result.row_loss.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("case", ["no rows", "no ids", "only padding"])
def test_nothing_to_do_still_carries_gradients(case: str, device: str) -> None:
    hidden, weight, ids = problem(device, rows=0 if case == "no rows" else P)
    ids = ids[:, :0] if case == "no ids" else torch.full_like(ids, -1)
    objective_fn = objective(LOSSES["reverse_kl_renormalised"](make_teacher(ids)))
    loss = indexed_linear(hidden, weight, ids, objective_fn).loss
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_float32_head_with_bfloat16_states(device: str) -> None:
    hidden, weight, ids = problem(device)
    half = hidden.detach().bfloat16().requires_grad_()
    objective_fn = objective(LOSSES["reverse_kl_renormalised"](make_teacher(ids)))
    loss = indexed_linear(half, weight, ids, objective_fn).loss
    ours = grads_of(loss, half, weight)
    assert [grad.dtype for grad in ours] == [torch.bfloat16, torch.float32]
    whole = half.detach().float().requires_grad_()
    expected = grads_of(indexed_linear(whole, weight, ids, objective_fn).loss, whole, weight)
    assert (ours[0] - expected[0]).abs().max() <= 2**-7 * expected[0].abs().max()
    assert torch.allclose(ours[1], expected[1], atol=1e-6)


@pytest.mark.parametrize(("name", "k"), RENORMALISED.items(), ids=RENORMALISED)
def test_two_runs_are_bitwise_equal(name: str, k: int | None, device: str) -> None:
    hidden, weight, ids = problem(device, rows=12, ids_of=24)
    objective_fn = objective(LOSSES[name](make_teacher(ids)))
    first, second = (
        grads_of(indexed_linear(hidden, weight, ids, objective_fn, k=k).loss, hidden, weight)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


class Work(TorchDispatchMode):
    """Notes the largest tensor made, apart from those of the weight's own size, and every matrix
    product."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.whole = (weight.shape, weight.T.shape)
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.name().startswith(("aten::mm", "aten::addmm"))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.shape not in self.whole:
                entries = tensor if tensor.layout == torch.strided else tensor.values()
                self.largest = max(self.largest, entries.numel())
        return out


def test_a_known_support_never_meets_the_vocabulary() -> None:
    rows, n_vocab = 6, 4000
    hidden = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(n_vocab, 16, requires_grad=True)
    ids = make_ids(rows, n_vocab, 4)
    objective_fn = objective(LOSSES["reverse_kl_renormalised"](make_teacher(ids)))
    with Work(weight) as work:
        indexed_linear(hidden, weight, ids, objective_fn).loss.backward()
    assert work.products == 0
    assert work.largest <= n_vocab, "a count for each id at most, no logits of a row"
    with Work(weight) as work:
        indexed_linear(hidden, weight, ids, objective_fn, k=4, chunk_rows=rows).loss.backward()
    assert work.products == 1, "the live top-k, forward only"


def test_a_student_equal_to_its_teacher_is_accepted() -> None:
    """Accept p = q, with rounding alone in the gradient and in its sum."""
    hidden, weight, ids = problem("cpu", rows=200)
    with torch.no_grad():
        z = (hidden @ weight.T).gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
        teacher = Teacher(ids, z.log_softmax(-1), z[:, 0])
    result = indexed_linear(
        hidden, weight, ids, objective(LOSSES["reverse_kl_renormalised"](teacher))
    )
    (grad,) = grads_of(result.loss, hidden)
    assert result.row_loss.abs().max() < 1e-5
    assert grad.abs().max() < 1e-4


@pytest.mark.parametrize(("name", "k"), RENORMALISED.items(), ids=RENORMALISED)
def test_what_an_objective_says_of_padding_counts_nowhere(
    name: str, k: int | None, device: str
) -> None:
    hidden, weight, ids = problem(device)
    plain = objective(LOSSES[name](make_teacher(ids)))

    def careless(view: ObjectiveInput) -> ObjectiveGrad:
        output = plain(view)
        at_padding = ids[view.index] < 0
        return output._replace(
            at_ids=output.at_ids.masked_fill(at_padding, 7.0),
            dense_at_ids=output.dense_at_ids.masked_fill(at_padding, 7.0),
        )

    assert (ids < 0).any()
    expected = grads_of(indexed_linear(hidden, weight, ids, plain, k=k).loss, hidden, weight)
    ours = grads_of(indexed_linear(hidden, weight, ids, careless, k=k).loss, hidden, weight)
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize(("name", "k"), RENORMALISED.items(), ids=RENORMALISED)
def test_states_may_lie_in_memory_as_they_like(name: str, k: int | None, device: str) -> None:
    hidden, weight, ids = problem(device)
    objective_fn = objective(LOSSES[name](make_teacher(ids)))
    expected = indexed_linear(hidden, weight, ids, objective_fn, k=k)
    turned = hidden.detach().T.contiguous().T.requires_grad_()
    ours = indexed_linear(turned, weight, ids, objective_fn, k=k)
    assert turned.stride() != hidden.stride()
    assert torch.equal(ours.row_loss, expected.row_loss)
    pairs = zip(
        grads_of(ours.loss, turned, weight), grads_of(expected.loss, hidden, weight), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_head_whose_rows_are_not_rows_of_memory_is_refused(device: str) -> None:
    hidden, weight, ids = problem(device)
    objective_fn = objective(LOSSES["reverse_kl_renormalised"](make_teacher(ids)))
    with pytest.raises(ValueError, match=r"contiguous along D, got strides \(1, 301\)"):
        indexed_linear(hidden, weight.detach().T.contiguous().T, ids, objective_fn)


def tail(view: ObjectiveInput) -> ObjectiveGrad:
    """Return dense coefficients, like a tail bucket."""
    zero = torch.zeros_like(view.log_p)
    at = zero.index_fill(1, torch.tensor([0, 1]), 1.0) * torch.tensor([1.0, -1.0] * (S // 2))
    return ObjectiveGrad(zero.sum(-1), at, zero[:, 0] + 1, zero, {})


def released(view: ObjectiveInput) -> ObjectiveGrad:
    """Return at_ids that do not sum to zero, like opd_released."""
    zero = torch.zeros_like(view.log_p)
    return ObjectiveGrad(zero.sum(-1), zero + 0.5, zero[:, 0], zero, {})


def bonus(view: ObjectiveInput) -> ObjectiveGrad:
    """Return dense_log, like an entropy of the whole vocabulary."""
    zero = torch.zeros_like(view.log_p)
    return ObjectiveGrad(zero.sum(-1), zero, zero[:, 0], zero, {}, dense_log=zero[:, 0])


REFUSED = {
    "dense_log": (bonus, "the objective's dense_log must be None"),
    "dense": (tail, "the objective's dense is 1 in row 0, must be 0"),
    "sum": (released, "the objective's sum of at_ids is 5 in row 0, must be 0"),
}


@pytest.mark.parametrize(("objective_fn", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("k", [None, K])
def test_what_is_not_renormalised_is_refused(objective_fn, message: str, k: int | None) -> None:
    hidden, weight, ids = problem("cpu")
    with pytest.raises(ValueError, match=re.escape(message) + ".* use linear_sparse_kl"):
        indexed_linear(hidden, weight, ids, objective_fn, k=k)
