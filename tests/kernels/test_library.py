"""The losses as one op of torch.library: equal to the public functions, and compiled as a whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_cases import make_cached
from torch import Tensor, nn

from logitcask.kernels import library
from logitcask.kernels.fused_objective import FusedObjective
from logitcask.kernels.indexed_linear import indexed_linear
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.logit_transform import LogitTransform
from logitcask.kernels.objective_input import SparseLoss
from logitcask.kernels.sparse_kl import sparse_kl

P, V, D, S, K = 6, 90, 8, 6, 5
PUBLIC = {
    "sparse_kl": sparse_kl,
    "linear_sparse_kl": linear_sparse_kl,
    "indexed_linear": indexed_linear,
}
generator = torch.Generator().manual_seed(0)
X, HEAD = (torch.randn(n, D, generator=generator) for n in (P, V))
WEIGHT = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.3])
CAPPED = {"row_weight": WEIGHT, "n_vocab": 80, "logit_transform": LogitTransform(0.5, 4.0, 1.5)}
CACHED = make_cached(X @ HEAD.T, S, "overlap", n_vocab=80)


def objective(divergence: str = "jsd", tail: str = "bucket", live_k: int = 3) -> FusedObjective:
    fields = {name: value for name, value in vars(CACHED).items() if name not in ("ids", "live_k")}
    return FusedObjective(
        divergence=divergence, tail=tail, parameter=0.3, live_k=live_k, metric_k=4, **fields
    )


def call(ops: Any, name: str, x: Tensor, head: Tensor, **options: Any) -> SparseLoss:
    inputs = (x @ head.T,) if name == "sparse_kl" else (x, head)
    indexed = name == "indexed_linear"
    of = objective(tail="renormalize") if indexed else objective()
    return ops[name](*inputs, CACHED.ids, of, **options)


def grads(loss: Callable[..., SparseLoss]) -> list[Tensor]:
    """Return loss, row losses, metrics and the gradients of 3 times the loss."""
    leaves = [X.clone().requires_grad_(), HEAD.clone().requires_grad_()]
    result = loss(*leaves)
    return [
        result.loss.detach(),
        result.row_loss,
        *result.metrics.values(),
        *torch.autograd.grad(3 * result.loss, leaves),
    ]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("name", PUBLIC)
def test_each_loss_is_the_public_function(name: str, options: dict[str, Any]) -> None:
    ours = grads(lambda x, head: call(vars(library), name, x, head, k=K, **options))
    assert_same(ours, grads(lambda x, head: call(PUBLIC, name, x, head, k=K, **options)))
    assert len(ours) == 4 + len(library.METRICS)


class Student(nn.Module):
    """A body, a head, and the losses of all three functions on them, without any graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, D), nn.GELU())
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor, ids: Tensor, bucket: Any, alone: Any, ops: Any) -> Tensor:
        states, head = self.body(x), self.head.weight
        parts = [
            ops["sparse_kl"](states @ head.T, ids, bucket, k=K, row_weight=WEIGHT).loss,
            ops["linear_sparse_kl"](states, head, ids, bucket, k=K, row_weight=WEIGHT).loss,
            ops["indexed_linear"](states, head, ids, alone).loss,
        ]
        return torch.stack(parts) @ torch.tensor([1.0, 2.0, 3.0])


def assert_compiles(backend: str) -> None:
    student = Student()
    inputs = X, CACHED.ids, objective(), objective("alpha", "renormalize", 0)
    found = []
    for model, ops in (
        (torch.compile(student, fullgraph=True, backend=backend, dynamic=True), vars(library)),
        (student, PUBLIC),
    ):
        loss = model(*inputs, ops)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(student.parameters()))])
    assert_same(*found)


def test_a_model_with_its_losses_compiles_as_one_graph() -> None:
    assert_compiles("aot_eager")


@pytest.mark.needs("soak")  # minutes, and a C compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor uses what torch deprecates
@pytest.mark.timeout(900)
def test_a_model_with_its_losses_compiles_by_inductor() -> None:
    assert_compiles("inductor")


@pytest.mark.parametrize("name", PUBLIC)
def test_the_op_keeps_the_rules_of_torch(name: str) -> None:
    seen: list[Any] = []
    real = library.loss_op
    x = X.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "loss_op", lambda *args: seen.append(args) or real(*args))
        call(vars(library), name, x, HEAD.clone().requires_grad_(), k=K)
    leaf = seen[0][1].detach().requires_grad_()  # opcheck reads its .grad
    found = torch.library.opcheck(real, (name, leaf, *seen[0][2:]))
    assert set(found.values()) == {"SUCCESS"}


def test_the_ops_of_the_backward_pass_keep_the_rules_of_torch() -> None:
    by = torch.tensor(3.0)
    g = torch.randn(P, S, generator=generator)
    for op, inputs in (
        (library.scaled_op, (X, by)),
        (library.weight_grad_op, (g, by, CACHED.ids, X, V, torch.float32)),
    ):
        assert set(torch.library.opcheck(op, inputs).values()) == {"SUCCESS"}


def test_what_needs_no_gradient_gets_none_and_costs_none() -> None:
    x, head = X.clone().requires_grad_(), HEAD.clone()
    frozen = library.linear_sparse_kl(x, head, CACHED.ids, objective(), k=K)
    assert [len(each) for each in frozen.loss.grad_fn.saved_tensors] == [P, 0]
    frozen.loss.backward()
    assert x.grad is not None
    with torch.no_grad():
        silent = library.sparse_kl((X @ HEAD.T).requires_grad_(), CACHED.ids, objective(), k=K)
    assert not silent.loss.requires_grad


def test_no_rows_give_a_loss_of_0_and_empty_metrics() -> None:
    none = {name: value[:0] for name, value in vars(CACHED).items() if name != "live_k"}
    ids = none.pop("ids")
    of = FusedObjective(divergence="reverse_kl", tail="bucket", **none)
    x, head = X[:0].clone().requires_grad_(), HEAD.clone().requires_grad_()
    result = library.linear_sparse_kl(x, head, ids, of, k=K)
    result.loss.backward()
    assert result.loss == head.grad.abs().max() == 0
    assert {name: len(value) for name, value in result.metrics.items()} == dict.fromkeys(
        library.METRICS, 0
    )


def test_a_double_backward_and_a_wrong_input_raise() -> None:
    x = X.clone().requires_grad_()
    loss = library.linear_sparse_kl(x, HEAD, CACHED.ids, objective(), k=K).loss
    (grad,) = torch.autograd.grad(loss**2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
    with pytest.raises(ValueError, match="k=1000 must lie in"):
        library.linear_sparse_kl(x, HEAD, CACHED.ids, objective(), k=1000)
    with pytest.raises(ValueError, match="use linear_sparse_kl"):
        library.indexed_linear(x, HEAD, CACHED.ids, objective(), k=K)


def test_distillkits_kl_at_a_temperature_is_a_loss_of_the_transformed_logits() -> None:
    """Take p at T by the logit transform, and the teacher's ids at T, renormalized."""
    tau, z = 3.0, (X @ HEAD.T).double().requires_grad_()
    listed = CACHED.ids >= 0
    fields = {"q_rank": CACHED.q_rank, "n_kept": CACHED.n_kept, "mask": listed, "known": listed}
    of = FusedObjective(
        divergence="forward_kl",
        tail="zero",
        log_q=CACHED.log_q.double() / tau,
        log_tail=CACHED.log_tail.double(),
        **fields,
    )
    ours = sparse_kl(z, CACHED.ids, of, k=K, logit_transform=LogitTransform(temperature=tau))
    log_q = (CACHED.log_q.double() / tau).log_softmax(-1)
    log_p = (z / tau).log_softmax(-1).gather(1, CACHED.ids.clamp(min=0))
    theirs = torch.where(listed, log_q.exp() * (log_q - log_p), 0.0).nan_to_num().sum()
    torch.testing.assert_close(ours.loss, theirs)
    for got, expected in zip(
        torch.autograd.grad(tau**2 * ours.loss, z),
        torch.autograd.grad(tau**2 * theirs, z),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
