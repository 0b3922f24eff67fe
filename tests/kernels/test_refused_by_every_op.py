"""Errors of every loss before it calls the objective, and calls without rows or weight.

test_kernel_errors has the errors of single ops.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_cases import fused, make_cached
from kernel_cases import make_logits
from torch import Tensor

from logitcask.kernels.indexed_linear import indexed_linear
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.logit_transform import LogitTransform
from logitcask.kernels.objective_input import ObjectiveGrad, ObjectiveInput, SparseLoss
from logitcask.kernels.row_grad import row_grad
from logitcask.kernels.row_stats import row_stats
from logitcask.kernels.sparse_kl import sparse_kl
from logitcask.kernels.topk_select import topk_select
from logitcask.kernels.vocab_parallel import (
    vocab_parallel_linear_sparse_kl,
    vocab_parallel_sparse_kl,
)

P, V, D = 2, 10, 4
IDS = torch.tensor([[0, 3, -1], [1, 2, 9]])
META = {"device": "meta"}


def never(view: ObjectiveInput) -> ObjectiveGrad:
    raise AssertionError("the objective was called")


def from_logits(rows: Tensor | None = None, objective: Any = never, **options: Any) -> SparseLoss:
    z = torch.zeros(P, V) if rows is None else rows
    return sparse_kl(z, options.pop("ids", IDS), objective, **({"k": 2} | options))


def _head(op: Callable[..., SparseLoss], **fixed: Any) -> Callable[..., SparseLoss]:
    def call(rows: Tensor | None = None, objective: Any = never, **options: Any) -> SparseLoss:
        hidden = torch.zeros(P, D) if rows is None else rows
        ids, head = options.pop("ids", IDS), options.pop("head", torch.zeros(V, D))
        return op(hidden, head, ids, objective, **({"k": 2} | fixed | options))

    return call


def shards(rows: Tensor | None = None, **options: Any) -> SparseLoss:
    z, ids = torch.zeros(P, V) if rows is None else rows, options.pop("ids", IDS)
    return vocab_parallel_sparse_kl(z, ids, never, **({"k": 2, "first": 0, "n_vocab": V} | options))


OPS: dict[str, Callable[..., Any]] = {
    "sparse_kl": from_logits,
    "linear_sparse_kl": _head(linear_sparse_kl),
    "indexed_linear": _head(indexed_linear),
    "vocab_parallel_sparse_kl": shards,
    "vocab_parallel_linear_sparse_kl": _head(vocab_parallel_linear_sparse_kl, first=0, n_vocab=V),
}

FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integer rows": (
        {"rows": torch.zeros(P, V).long()},
        TypeError,
        "is torch.int64; supported are bfloat16",
    ),
    "3-D rows": ({"rows": torch.zeros(1, P, V)}, ValueError, "shape (1, 2, 10)"),
    "int32 ids": ({"ids": IDS.int()}, TypeError, "ids is torch.int32, must be int64"),
    "1-D ids": ({"ids": IDS[0]}, ValueError, "ids has shape (3,), must be [2, S]"),
    "ids of other rows": ({"ids": IDS[:1]}, ValueError, "ids has shape (1, 3), must be [2, S]"),
    "ids elsewhere": ({"ids": IDS.to("meta")}, ValueError, "ids is on meta, the rows are on cpu"),
    "id V": ({"ids": IDS + 1}, ValueError, "ids span 0..10, must be -1 (padding) or lie in 0..9"),
    "id -2": ({"ids": IDS - 1}, ValueError, "ids span -2..8, must be -1 (padding) or lie in 0..9"),
    "id twice": (
        {"ids": torch.tensor([[1, 2], [4, 4]])},
        ValueError,
        "ids of row 1 hold id 4 more than once; merge",
    ),
    "k 0": ({"k": 0}, ValueError, "k=0 must lie in 1..n_vocab=10"),
    "k over n_vocab": ({"k": 11}, ValueError, "k=11 must lie in 1..n_vocab=10"),
    "weight per id": (
        {"row_weight": torch.ones(P, 3)},
        ValueError,
        "row_weight has shape (2, 3), must be [2]",
    ),
    "integer weight": ({"row_weight": torch.ones(P).long()}, TypeError, "must be floating"),
    "weight elsewhere": (
        {"row_weight": torch.ones(P, **META)},
        ValueError,
        "row_weight is on meta, the rows are on cpu",
    ),
    "chunk_rows 0": ({"chunk_rows": 0}, ValueError, "chunk_rows=0 must be at least 1"),
    "temperature 0": (
        {"logit_transform": LogitTransform(temperature=0.0)},
        ValueError,
        "logit_transform.temperature=0.0 must be a positive number",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("op", OPS)
def test_every_loss_rejects(
    op: str, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "rows" in changed and OPS[op] not in (from_logits, shards):
        changed = {"rows": changed["rows"][..., :D]}
        message = message.replace("(1, 2, 10)", "(1, 2, 4)")
    with pytest.raises(error, match=re.escape(message)):
        OPS[op](**changed)


@pytest.mark.parametrize("op", ["linear_sparse_kl", "indexed_linear"])
@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (torch.zeros(V, D, **META), ValueError, "weight is on meta, the rows are on cpu"),
        (torch.zeros(V, D).long(), TypeError, "weight is torch.int64; supported are"),
        (torch.zeros(D, V), ValueError, "must be [rows, D] and [V, D]"),
    ],
    ids=["elsewhere", "integer", "transposed"],
)
def test_a_head_that_does_not_fit(
    op: str, head: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        OPS[op](head=head)


Z, ROW = torch.zeros(P, V), torch.ones(P)
AT = torch.zeros(P, 3)
SINGLE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "topk_select, integers": (lambda: topk_select(Z.long(), 2), TypeError, "is torch.int64"),
    "topk_select, 1-D": (lambda: topk_select(Z[0], 2), ValueError, "got shape (10,); flatten"),
    "topk_select, columns apart": (
        lambda: topk_select(torch.zeros(V, P).T, 2),
        ValueError,
        "got strides (1, 2); call .contiguous()",
    ),
    "topk_select, n_vocab": (lambda: topk_select(Z, 2, n_vocab=11), ValueError, "1..10"),
    "row_stats, softcap": (
        lambda: row_stats(Z, logit_transform=LogitTransform(softcap=-1.0)),
        ValueError,
        "logit_transform.softcap=-1.0 must be a positive number",
    ),
    "row_grad, integers": (
        lambda: row_grad(Z.long(), ROW, ROW, IDS, AT),
        TypeError,
        "logits is torch.int64; supported are",
    ),
    "row_grad, int32 ids": (lambda: row_grad(Z, ROW, ROW, IDS.int(), AT), TypeError, "ids.long()"),
    "row_grad, id V": (lambda: row_grad(Z, ROW, ROW, IDS + 1, AT), ValueError, "ids span 0..10"),
    "row_grad, id -2": (lambda: row_grad(Z, ROW, ROW, IDS - 1, AT), ValueError, "ids span -2..8"),
    "row_grad, id twice": (
        lambda: row_grad(Z, ROW, ROW, torch.tensor([[1, 2, 3], [4, 4, 5]]), AT),
        ValueError,
        "ids of row 1 hold id 4 more than once",
    ),
    "row_grad, dense per id": (
        lambda: row_grad(Z, ROW, AT, IDS, AT),
        ValueError,
        "dense has shape (2, 3), must be [2]",
    ),
    "row_grad, at_ids elsewhere": (
        lambda: row_grad(Z, ROW, ROW, IDS, AT.to("meta")),
        ValueError,
        "at_ids is on meta, the rows are on cpu",
    ),
    "row_grad, integer at_ids": (
        lambda: row_grad(Z, ROW, ROW, IDS, AT.long()),
        TypeError,
        "at_ids is torch.int64",
    ),
    "row_grad, out elsewhere": (
        lambda: row_grad(Z, ROW, ROW, IDS, AT, out=Z.to("meta")),
        ValueError,
        "out is on meta, the rows are on cpu",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), SINGLE.values(), ids=SINGLE)
def test_single_ops_reject(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


FUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "divergence": ({"divergence": "tv"}, ValueError, "divergence='tv' must be one of reverse_kl"),
    "tail": ({"tail": "drop"}, ValueError, "tail='drop' must be one of renormalize"),
    "parameter": ({"parameter": 1.0}, ValueError, "parameter=1.0 must lie between 0 and 1"),
    "live_k": ({"live_k": -1}, ValueError, "live_k=-1 must be at least 0"),
    "shape": ({"n_kept": torch.ones(3).long()}, ValueError, "n_kept has shape (3,), must be (2,)"),
    "dtype": ({"mask": torch.ones(P, 3)}, TypeError, "mask is torch.float32, must be torch.bool"),
    "1-D": ({"log_q": torch.ones(3)}, ValueError, "log_q has shape (3,), must be [rows, S]"),
    "device": (
        {"q_rank": torch.ones(P, 3, **META).long()},
        ValueError,
        "q_rank is on meta, the rows are on cpu",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), FUSED.values(), ids=FUSED)
def test_a_fused_objective_of_parts_that_do_not_fit(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    objective_fn, _ = fused(
        make_cached(make_logits("iid", P, V, torch.float32), 3), "jsd", "bucket"
    )
    with pytest.raises(error, match=re.escape(message)):
        type(objective_fn)(**(vars(objective_fn) | changed))


@pytest.mark.parametrize("op", ["sparse_kl", "linear_sparse_kl", "indexed_linear"])
def test_a_fused_objective_of_other_rows(op: str) -> None:
    objective_fn, _ = fused(
        make_cached(make_logits("iid", P, V, torch.float32), 4), "jsd", "bucket"
    )
    with pytest.raises(ValueError, match=r"log_q has shape \(2, 4\), must be that of ids, \(2, 3"):
        OPS[op](objective=objective_fn)


@pytest.mark.parametrize("n_rows", [0, P])
@pytest.mark.parametrize("op", ["sparse_kl", "linear_sparse_kl", "indexed_linear"])
def test_no_rows_and_no_weight_cost_nothing(op: str, n_rows: int, device: str) -> None:
    width = V if op == "sparse_kl" else D
    rows = torch.full((n_rows, width), torch.nan, device=device, requires_grad=True)
    cached = make_cached(make_logits("iid", P, V, torch.float32).to(device), 3)
    objective_fn, _ = fused(cached, "reverse_kl", "renormalize")
    objective_fn, weight = objective_fn.rows(slice(0, n_rows)), torch.zeros(n_rows, device=device)
    head = torch.ones(V, D, device=device, requires_grad=True)
    options = {} if op == "sparse_kl" else {"head": head}
    result = OPS[op](rows, objective_fn, ids=cached.ids[:n_rows], row_weight=weight, **options)
    result.loss.backward()
    assert result.loss == 0
    assert torch.equal(rows.grad, torch.zeros_like(rows))
    if options:
        assert torch.equal(head.grad, torch.zeros_like(head))


def test_a_second_backward_over_an_in_place_gradient_is_rejected(device: str) -> None:
    leaf = make_logits("iid", P, V, torch.float32).to(device).requires_grad_()
    objective_fn, _ = fused(make_cached(leaf, 3), "forward_kl", "bucket")
    z = leaf * 1.0
    loss = sparse_kl(z, make_cached(leaf, 3).ids, objective_fn, k=2, in_place=True).loss
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    with pytest.raises(ValueError, match=r"handed over; compute the loss again"):
        loss.backward()
    assert torch.equal(leaf.grad, once)
