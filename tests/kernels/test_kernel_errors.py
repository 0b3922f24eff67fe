"""Bad input is refused before any launch, with the value, the rule and a way out."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from logitcask.kernels import launch
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.objective_input import ObjectiveGrad, ObjectiveInput
from logitcask.kernels.row_grad import row_grad
from logitcask.kernels.row_stats import row_stats
from logitcask.kernels.sparse_kl import sparse_kl
from logitcask.kernels.topk_select import topk_select

Z = torch.zeros(2, 10)
IDS = torch.tensor([[0, 3, -1], [1, 2, 9]])


def zeros(view: ObjectiveInput) -> ObjectiveGrad:
    nothing = torch.zeros_like(view.log_p)
    return ObjectiveGrad(nothing.sum(-1), nothing, nothing.sum(-1), nothing, {})


def scalar_loss(view: ObjectiveInput) -> ObjectiveGrad:
    return zeros(view)._replace(loss=torch.zeros(()))


def scalar_metric(view: ObjectiveInput) -> ObjectiveGrad:
    return zeros(view)._replace(metrics={"gap": torch.zeros(())})


def log_per_id(view: ObjectiveInput) -> ObjectiveGrad:
    return zeros(view)._replace(dense_log=torch.zeros_like(view.log_p))


def grad(**changed: Any) -> Any:
    row = torch.ones(2)
    inputs = {"log_sum_exp": row, "dense": row, "ids": IDS, "at_ids": torch.zeros(2, 3)} | changed
    return row_grad(Z, **inputs)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "in place, rows apart": (
        lambda: sparse_kl(torch.zeros(2, 12)[:, :10], IDS, zeros, k=2, in_place=True),
        ValueError,
        "in_place needs contiguous logits, got strides (12, 1) of shape (2, 10); call .contigu",
    ),
    "3-D logits": (
        lambda: row_stats(torch.zeros(1, 2, 3)),
        ValueError,
        "logits must be [rows, columns], got shape (1, 2, 3); flatten",
    ),
    "integer logits": (
        lambda: row_stats(Z.long()),
        TypeError,
        "logits is torch.int64; supported are",
    ),
    "no columns": (lambda: row_stats(Z[:, :0]), ValueError, "no columns, got shape (2, 0)"),
    "columns apart": (
        lambda: row_stats(torch.zeros(10, 2).T),
        ValueError,
        "got strides (1, 2); call .contiguous()",
    ),
    "n_vocab 11 of 10": (
        lambda: row_stats(Z, n_vocab=11),
        ValueError,
        "n_vocab=11 must lie in 1..10",
    ),
    "n_vocab 0": (lambda: row_stats(Z, n_vocab=0), ValueError, "n_vocab=0 must lie in 1..10"),
    "k 0": (lambda: topk_select(Z, 0), ValueError, "k=0 must lie in 1..n_vocab=10"),
    "k over n_vocab": (
        lambda: topk_select(Z, 6, n_vocab=5),
        ValueError,
        "k=6 must lie in 1..n_vocab=5",
    ),
    "int32 ids": (lambda: sparse_kl(Z, IDS.int(), zeros, k=2), TypeError, "call ids.long()"),
    "ids of other rows": (
        lambda: sparse_kl(Z, IDS[:1], zeros, k=2),
        ValueError,
        "ids has shape (1, 3), must be [2, S]",
    ),
    "id over n_vocab": (
        lambda: sparse_kl(Z, IDS, zeros, k=2, n_vocab=9),
        ValueError,
        "ids span -1..9, must be -1 (padding) or lie in 0..8",
    ),
    "id under -1": (lambda: sparse_kl(Z, IDS - 1, zeros, k=2), ValueError, "ids span -2..8"),
    "id twice": (
        lambda: sparse_kl(Z, torch.tensor([[1, 2], [4, 4]]), zeros, k=2),
        ValueError,
        "ids of row 1 hold id 4 more than once; merge",
    ),
    "weight per id": (
        lambda: sparse_kl(Z, IDS, zeros, k=2, row_weight=torch.ones(2, 3)),
        ValueError,
        "row_weight has shape (2, 3), must be [2]",
    ),
    "integer weight": (
        lambda: sparse_kl(Z, IDS, zeros, k=2, row_weight=torch.ones(2).long()),
        TypeError,
        "row_weight is torch.int64, must be floating",
    ),
    "chunk_rows 0": (
        lambda: sparse_kl(Z, IDS, zeros, k=2, chunk_rows=0),
        ValueError,
        "chunk_rows=0 must be at least 1",
    ),
    "objective's loss": (
        lambda: sparse_kl(Z, IDS, scalar_loss, k=2),
        ValueError,
        "the objective's loss has shape (), must be (2,)",
    ),
    "objective's metric": (
        lambda: sparse_kl(Z, IDS, scalar_metric, k=2),
        ValueError,
        "the objective's metrics['gap'] has shape (), must be (2,)",
    ),
    "objective's dense_log": (
        lambda: sparse_kl(Z, IDS, log_per_id, k=2),
        ValueError,
        "the objective's dense_log has shape (2, 3), must be (2,)",
    ),
    "dense_log per id": (
        lambda: grad(dense_log=torch.ones(2, 3)),
        ValueError,
        "dense_log has shape (2, 3), must be [2]",
    ),
    "at_ids of other shape": (
        lambda: grad(at_ids=torch.zeros(2, 2)),
        ValueError,
        "at_ids has shape (2, 2), must be that of ids, (2, 3)",
    ),
    "out of other shape": (
        lambda: grad(out=torch.zeros(2, 9)),
        ValueError,
        "out has shape (2, 9), must be that of logits, (2, 10)",
    ),
    "other device": (
        lambda: grad(dense=torch.ones(2, device="meta")),
        ValueError,
        "dense is on meta, the rows are on cpu; move one of them",
    ),
    "weight transposed": (
        lambda: linear_sparse_kl(torch.zeros(2, 4), torch.zeros(4, 10), IDS, zeros, k=2),
        ValueError,
        "hidden has shape (2, 4) and weight (4, 10), must be [rows, D] and [V, D]",
    ),
    "n_vocab over the head": (
        lambda: linear_sparse_kl(
            torch.zeros(2, 4), torch.zeros(10, 4), IDS, zeros, k=2, n_vocab=11
        ),
        ValueError,
        "n_vocab=11 must lie in 1..10, the rows of weight",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_triton_on_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before the first import"),
        launch.triton_on_cpu(),
    ):
        pass


def test_the_path_is_the_tensors_and_ends_with_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not launch.runs_triton(Z), "the variable alone changes nothing"
    with launch.triton_on_cpu():
        assert launch.runs_triton(Z)
        with pytest.raises(TypeError, match="float64, which the Triton kernels do not support"):
            row_stats(Z.double())
    assert not launch.runs_triton(Z)
