"""FusedObjective against its plain form: loss, metrics and gradient."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from fused_cases import (
    ENGINE,
    KINDS,
    METRIC_K,
    SOME_KINDS,
    SUPPORTS,
    CachedRows,
    fused,
    make_cached,
    plain_loss,
    targets_of,
)
from hypothesis import HealthCheck, given, settings
from kernel_cases import HALF, assert_close, make_logits, ulp
from kernel_objectives import full_vocab_loss, make_teacher
from torch import Tensor

from logitcask.engine.objectives.evaluate import row_objective
from logitcask.engine.objectives.objective import Objective
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.logit_transform import LogitTransform
from logitcask.kernels.objective_input import ObjectiveGrad, ObjectiveInput, SparseLoss
from logitcask.kernels.sparse_kl import sparse_kl

P, V, S, K = 4, 300, 12, 6
MIXED = [(*kind, SUPPORTS[i % len(SUPPORTS)]) for i, kind in enumerate(SOME_KINDS)]
"""Some of the kinds with a support each; test_all_objectives has all of them."""
WEIGHT = torch.tensor([1.0, 0.5, 0.0, 2.0])


def run(logits: Tensor, cached, objective, **options) -> tuple[SparseLoss, Tensor]:
    z = logits.detach().requires_grad_()
    result = sparse_kl(z, cached.ids, objective, **({"k": K} | options))
    result.loss.backward()
    return result, z.grad


def no_call(view: ObjectiveInput) -> ObjectiveGrad:
    raise AssertionError("the plain objective was called")


def assert_same(ours, plain, atol: float, what: str = "") -> None:
    """Assert equal results and gradients, with NaN in the same places."""
    near = {"atol": atol, "rtol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(ours[0].row_loss, plain[0].row_loss, **near, msg=f"{what} row_loss")
    torch.testing.assert_close(ours[0].loss, plain[0].loss, **near, msg=f"{what} loss")
    rounding = {"atol": max(atol, ulp(plain[1], plain[1].dtype)), "rtol": 0, "equal_nan": True}
    torch.testing.assert_close(ours[1], plain[1], **rounding, msg=f"{what} gradient")
    assert ours[0].metrics.keys() == plain[0].metrics.keys()
    for name, value in plain[0].metrics.items():
        got = ours[0].metrics[name]
        torch.testing.assert_close(got, value, **near, check_dtype=False, msg=f"{what} {name}")


def bare(objective):
    """Return the objective with a plain form that raises, for the Triton path."""
    return replace(objective, plain=no_call)


@pytest.mark.parametrize(("divergence", "tail", "support"), MIXED)
def test_equals_full_vocabulary_autograd(
    divergence: str, tail: str, support: str, triton_device: str
) -> None:
    logits = make_logits("iid", P, V, torch.float32).to(triton_device)
    n_vocab = 290
    cached = make_cached(logits, S, support, n_vocab=n_vocab)
    objective, _ = fused(cached, divergence, tail)
    weight = WEIGHT.to(triton_device)
    ours, grad = run(logits, cached, bare(objective), n_vocab=n_vocab, row_weight=weight)

    def autograd(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        z = logits.to(dtype).requires_grad_()
        loss = plain_loss(cached.to(dtype), divergence, tail)
        total = (full_vocab_loss(loss, z, cached, K, n_vocab) * weight.to(dtype)).sum()
        return total.detach(), torch.autograd.grad(total, z)[0]

    floor = 8 * ulp(logits, torch.float32)
    naive, exact = autograd(torch.float32), autograd(torch.float64)
    assert_close(ours.loss, naive[0], exact[0], floor, "loss")
    assert_close(grad, naive[1], exact[1], floor, "gradient")
    assert (grad[:, n_vocab:] == 0).all()
    assert (grad[2] == 0).all()


@pytest.mark.parametrize(
    ("divergence", "tail", "support"),
    [(*kind, ("fixed", "overlap")[i // 2 % 2]) for i, kind in enumerate(KINDS)],
)
def test_equals_its_plain_form(
    divergence: str, tail: str, support: str, triton_device: str
) -> None:
    logits = make_logits("iid", P, V, torch.float32).to(triton_device)
    cached = make_cached(logits, S, support)
    objective, plain = fused(cached, divergence, tail)
    assert_same(run(logits, cached, bare(objective)), run(logits, cached, plain), 3e-6)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("ties", HALF[1]), ("thirds -inf", HALF[0]), ("one hot", HALF[1]), ("ties", HALF[0])],
    ids=str,
)
def test_hard_logits(kind: str, dtype: torch.dtype, triton_device: str) -> None:
    logits = make_logits(kind, P, 97, dtype).to(triton_device)
    cached = make_cached(logits, S, "overlap")
    for divergence, tail in (("jsd", "renormalize"), ("reverse_kl", "bucket")):
        objective, plain = fused(cached, divergence, tail)
        ours = run(logits, cached, bare(objective), row_weight=WEIGHT.to(triton_device))
        assert_same(
            ours, run(logits, cached, plain, row_weight=WEIGHT.to(triton_device)), 2e-5, kind
        )


@pytest.mark.parametrize(
    "logit_transform",
    [
        LogitTransform(temperature=0.7),
        LogitTransform(scale=0.5),
        LogitTransform(softcap=5.0, temperature=1.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_scale_cap_and_temperature(
    tail: str, logit_transform: LogitTransform, triton_device: str
) -> None:
    logits = make_logits("iid", P, V, torch.float32).to(triton_device)
    cached = make_cached(logits, S)
    objective, plain = fused(cached, "skew", tail)
    options = {"logit_transform": logit_transform, "row_weight": WEIGHT.to(triton_device)}
    assert_same(
        run(logits, cached, bare(objective), **options), run(logits, cached, plain, **options), 5e-6
    )


@pytest.mark.parametrize(("divergence", "tail"), SOME_KINDS)
def test_nan_stays_in_its_row_and_weight_zero_adds_nothing(
    divergence: str, tail: str, triton_device: str
) -> None:
    logits = make_logits("iid", P, 97, torch.float32)
    cached = make_cached(logits, S)
    logits[1], logits[2], logits[3, 7] = torch.nan, -torch.inf, torch.nan
    logits = logits.to(triton_device)
    objective, _ = fused(cached, divergence, tail)
    weight = torch.tensor([1.0, 0.0, 0.0, 1.0], device=triton_device)
    ours, grad = run(logits, cached, bare(objective), row_weight=weight)
    assert ours.row_loss.isnan().tolist() == [False, True, True, True]
    assert (grad[1:3] == 0).all()
    assert grad[0].isfinite().all()
    assert grad[3][cached.ids[3][cached.mask[3]]].isnan().all()
    assert ours.metrics["entropy"].isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize(("divergence", "tail"), SOME_KINDS)
def test_an_empty_support_and_a_teacher_without_tail(
    divergence: str, tail: str, triton_device: str
) -> None:
    logits = make_logits("iid", P, 97, torch.float32).to(triton_device)
    cached = make_cached(logits, S)
    cached.mask[0], cached.known[0], cached.log_tail[0] = (
        False,
        False,
        -torch.inf,
    )  # no teacher at all
    cached.mask[1] = False
    cached.log_tail[2] = -torch.inf
    cached.log_q[3, ::2] = -torch.inf
    objective, plain = fused(cached, divergence, tail)
    ours = run(logits, cached, bare(objective))
    assert ours[0].row_loss[0] == 0
    assert (ours[1][0] == 0).all()
    assert ours[1].isfinite().all()
    assert_same(ours, run(logits, cached, plain), 3e-6)


def test_a_vanishing_tail_leaves_p_minus_q(triton_device: str) -> None:
    logits = torch.full((1, 50), -20.0, device=triton_device)
    logits[0, :3] = torch.tensor([2.0, 1.0, 0.0])
    ids = torch.tensor([[0, 1, 2]], device=triton_device)
    teacher = make_teacher(ids)
    listed = ids >= 0
    cached = CachedRows(
        ids, teacher.log_q, teacher.log_tail, listed, listed, ids.clone(), listed.sum(-1), 0
    )
    objective, _ = fused(cached, "forward_kl", "bucket")
    grad = run(logits, cached, bare(objective), k=3)[1]
    expected = logits.double().softmax(-1)[:, :3] - teacher.log_q.double().exp()
    assert torch.allclose(grad[:, :3].double(), expected, atol=3e-7)


@pytest.mark.parametrize(
    ("divergence", "tail", "support"),
    [
        ("reverse_kl", "renormalize", "overlap"),
        ("reverse_kl", "bucket", "teacher"),
        ("forward_kl", "renormalize", "teacher"),
        ("forward_kl", "bucket", "overlap"),
    ],
)
def test_equals_the_engines_objective(
    divergence: str, tail: str, support: str, triton_device: str
) -> None:
    logits = make_logits("iid", P, V, torch.float32).to(triton_device)
    k, cached = 3, make_cached(logits, S)
    cached = replace(cached, mask=cached.q_rank < k, live_k=k if support == "overlap" else 0)
    form = {
        "support": support,
        "divergence": divergence,
        "tail": tail,
    }
    plain = row_objective(
        Objective(**form, estimator="divergence", k=k), targets_of(cached), metric_k=METRIC_K
    )
    (expected, expected_grad), (ours, grad) = (
        run(logits, cached, objective_fn)
        for objective_fn in (plain, bare(fused(cached, divergence, tail)[0]))
    )
    metrics = {name: expected.metrics[name] for name in ENGINE} | {
        "entropy": expected.metrics["entropy/student"]
    }
    assert_same((ours, grad), (expected._replace(metrics=metrics), expected_grad), 3e-6)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape(data: st.DataObject, triton_device: str) -> None:
    n_rows = data.draw(st.integers(0, 3), label="rows")
    n_vocab = data.draw(st.integers(2, 300), label="n_vocab")
    n_ids = data.draw(st.integers(1, min(20, n_vocab)), label="ids")
    k = data.draw(st.integers(1, min(20, n_vocab)), label="k")
    kind = data.draw(st.sampled_from(KINDS), label="kind")
    support = data.draw(st.sampled_from(SUPPORTS), label="support")
    logits = make_logits("ties", n_rows, n_vocab + 5, torch.float32).to(triton_device)
    if not n_rows:
        cached = make_cached(logits.new_zeros(1, n_vocab), n_ids, support)
        cached = CachedRows(*(t[:0] if isinstance(t, Tensor) else t for t in vars(cached).values()))
    else:
        cached = make_cached(logits, n_ids, support, n_vocab=n_vocab)
    objective, plain = fused(cached, *kind)
    options = {"k": k, "n_vocab": n_vocab, "chunk_rows": 2}
    ours = run(logits, cached, bare(objective), **options)
    if n_rows:
        assert_same(ours, run(logits, cached, plain, **options), 1e-5)
    else:
        assert ours[0].loss == 0
        assert ours[1].shape == logits.shape


def test_without_gradients_and_from_hidden_states(triton_device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(P, 8, generator=generator).to(triton_device)
    head = torch.randn(97, 8, generator=generator).to(triton_device)
    cached = make_cached(hidden @ head.T, S)
    objective, plain = fused(cached, "jsd", "bucket")

    def grads(objective_fn):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        loss = linear_sparse_kl(*leaves, cached.ids, objective_fn, k=K, chunk_rows=3).loss
        return torch.autograd.grad(loss, leaves)

    for ours, expected in zip(grads(bare(objective)), grads(plain), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    quiet = sparse_kl(hidden @ head.T, cached.ids, bare(objective), k=K)
    loud, _ = run(hidden @ head.T, cached, bare(objective))
    assert torch.equal(quiet.row_loss, loud.row_loss)


def test_in_place_and_strided_rows(triton_device: str) -> None:
    wide = make_logits("iid", P, 2 * V, torch.float32).to(triton_device)
    logits = wide[:, :V]
    cached = make_cached(logits, S)
    objective, plain = fused(cached, "reverse_kl", "bucket")
    expected = run(logits, cached, plain)
    assert_same(run(logits, cached, bare(objective)), expected, 3e-6)
    z = logits.detach().clone().requires_grad_() * 1.0
    result = sparse_kl(z, cached.ids, bare(objective), k=K, in_place=True)
    (grad,) = torch.autograd.grad(result.loss, z)
    assert grad.data_ptr() == z.data_ptr()
    torch.testing.assert_close(grad, expected[1], atol=3e-6, rtol=0)


def test_an_objective_that_does_not_fit_runs_plain(device: str) -> None:
    # More live ids than the kernel selects, or float64: the specification itself.
    logits = make_logits("iid", 2, 300, torch.float32).to(device)
    cached = make_cached(logits, S)
    objective, plain = fused(cached, "jsd", "renormalize")
    assert torch.equal(
        run(logits, cached, objective, k=130)[1], run(logits, cached, plain, k=130)[1]
    )
    assert not objective.fits(logits, 129)
