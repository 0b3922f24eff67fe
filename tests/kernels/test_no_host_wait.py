"""Losses on a GPU are launched without a wait for it, as CUDA graphs need it.

Fake tensors have a shape, but no values: to read one raises, and so does a shape that depends on
one (`.item()`, `.tolist()`, `bool(tensor)`, `nonzero()`, a mask as an index). They are on a CPU
here, on the path of a GPU, and the checks of values are off, as they are there.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from triton.runtime.interpreter import InterpretedFunction

from logitcask.kernels import indexed_linear as indexed_linear_module
from logitcask.kernels import launch, segment_sums
from logitcask.kernels.fused_objective import FusedObjective
from logitcask.kernels.indexed_linear import indexed_linear
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.objective_input import ObjectiveGrad, ObjectiveInput
from logitcask.kernels.row_grad import row_grad
from logitcask.kernels.row_stats import row_stats
from logitcask.kernels.sparse_kl import sparse_kl
from logitcask.kernels.topk_select import topk_select
from logitcask.kernels.vocab_parallel import merge_reads, read_shard

P, V, D, S, K = 4096, 151936, 1024, 16, 16


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Make tensors fake and launches nothing; yield kernel -> number of programs of its launch."""
    seen: dict[str, int] = {}

    def record(kernel: InterpretedFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        seen[kernel.fn.__name__] = math.prod(grid)
        return lambda *arguments, enable_fp_fusion, **options: None

    monkeypatch.setattr(InterpretedFunction, "__getitem__", record)
    for module in (launch, indexed_linear_module):
        monkeypatch.setattr(module, "reads_values", lambda tensor: tensor.device.type != "cpu")
    with launch.triton_on_cpu(), FakeTensorMode():
        yield seen


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden, weight and ids without values."""
    hidden = torch.empty(P, D, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(V, D, dtype=torch.bfloat16, requires_grad=True)
    return hidden, weight, torch.empty(P, S, dtype=torch.int64)


def plain(view: ObjectiveInput) -> ObjectiveGrad:
    """Return coefficients that sum to 0 in each row, and a metric."""
    g = view.log_p.exp() - view.log_p.exp().mean(1, keepdim=True)
    zero = torch.zeros_like(g)
    return ObjectiveGrad(g.sum(1), g, zero[:, 0], zero, {"entropy": view.entropy})


def make_fused() -> FusedObjective:
    def at_ids(dtype: torch.dtype) -> Tensor:
        return torch.zeros(P, S, dtype=dtype)

    return FusedObjective(
        plain=plain,
        divergence="jsd",
        tail="bucket",
        log_q=at_ids(torch.float32),
        log_tail=at_ids(torch.float32)[:, 0],
        mask=at_ids(torch.bool),
        known=at_ids(torch.bool),
        q_rank=at_ids(torch.int64),
        n_kept=at_ids(torch.int64)[:, 0],
        metric_k=K,
        name_metrics=lambda view, sums: {"entropy": view.entropy, "overlap": sums.shared / sums.k},
    )


@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize("op", ["sparse_kl", "linear_sparse_kl", "indexed_linear", "live support"])
def test_a_step_does_not_wait_for_the_gpu(op: str, kind: str, launches: dict[str, int]) -> None:
    hidden, weight, ids = make_inputs()
    fn = plain if kind == "plain" else make_fused()
    row_weight = torch.ones(P)
    if op == "sparse_kl":
        logits = torch.empty(P, V, dtype=torch.bfloat16, requires_grad=True)
        result = sparse_kl(logits, ids, fn, k=K, row_weight=row_weight)
        inputs = [logits]
    else:
        run = linear_sparse_kl if op == "linear_sparse_kl" else indexed_linear
        k = None if op == "indexed_linear" else K
        result = run(hidden, weight, ids, fn, k=k, row_weight=row_weight, chunk_rows=P // 2)
        inputs = [hidden, weight]
    result.loss.backward()
    assert all(each.grad.shape == each.shape for each in inputs)
    expected = {
        "sparse_kl": {"scan_kernel", "grad_kernel", "scale_kernel"},
        "linear_sparse_kl": {"scan_kernel", "grad_kernel", "scale_kernel"},
        "indexed_linear": {"dot_kernel", "weighted_sum_kernel", "piece_kernel", "segment_kernel"},
        "live support": {"scan_kernel", "weighted_sum_kernel", "piece_kernel", "segment_kernel"},
    }[op]
    if op != "indexed_linear":
        expected = expected | {"select_kernel" if kind == "plain" else "objective_kernel"}
    assert launches.keys() == expected


def test_the_parts_do_not_wait(launches: dict[str, int]) -> None:
    logits = torch.empty(P, V, dtype=torch.bfloat16)
    ids = torch.empty(P, S, dtype=torch.int64)
    stats = row_stats(logits)
    assert topk_select(logits, K)[1].shape == (P, K)
    at_ids = torch.empty(P, S)
    assert row_grad(logits, stats.log_sum_exp, stats.entropy, ids, at_ids).shape == (P, V)
    assert launches.keys() == {"scan_kernel", "select_kernel", "grad_kernel"}


def test_a_shard_of_the_head_does_not_wait(launches: dict[str, int]) -> None:
    logits = torch.empty(P, V, dtype=torch.bfloat16)
    part = read_shard(logits, torch.empty(P, S, dtype=torch.int64), K, first=V, n_own=V)
    read = merge_reads([part, part], K)
    assert read.top_ids.shape == (P, K)
    assert launches.keys() == {"scan_kernel", "select_kernel"}


def test_every_launch_takes_the_options_of_its_kernel(
    launches: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []

    def options_of(*call: object) -> dict[str, bool]:
        requests.append(call)
        return {"enable_fp_fusion": True}

    monkeypatch.setattr(launch, "options_of", options_of)
    hidden, weight, ids = make_inputs()
    for op, k, fn in ((linear_sparse_kl, K, make_fused()), (indexed_linear, K, plain)):
        op(hidden, weight, ids, fn, k=k).loss.backward()
    assert {kernel for kernel, *_ in requests} == launches.keys()
    of = {kernel: call for kernel, *call in requests}
    assert of["objective_kernel"] == [torch.bfloat16, (K, S), None]
    assert of["select_kernel"] == [torch.bfloat16, (K,), None]
    assert of["scan_kernel"] == [torch.bfloat16, (False,), None]


def test_a_sum_by_id_has_no_program_for_each_term(launches: dict[str, int]) -> None:
    """Launch a fixed number of programs for 65536 terms, where one a term would be 524288."""
    hidden, weight, ids = make_inputs()
    indexed_linear(hidden, weight, ids, plain).loss.backward()
    most = segment_sums.PROGRAMS
    assert launches["segment_kernel"] == most < P * S * D // 128
    assert launches["piece_kernel"] == min(most, P * S // segment_sums.BLOCK_N * D // 128)


def test_a_gradient_of_rows_has_to_wait_for_their_number(launches: dict[str, int]) -> None:
    """Reject the wait here, and with it CUDA graphs: the number of rows is the tensor's shape."""
    hidden, weight, ids = make_inputs()
    result = indexed_linear(hidden, weight, ids, plain, sparse_weight_grad=True)
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        result.loss.backward()
    assert "segment_kernel" not in launches


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (lambda x: x.item(), DataDependentOutputException),
        (lambda x: bool(x > 0), DataDependentOutputException),
        (lambda x: x[None].tolist(), DataDependentOutputException),
        (lambda x: x[None].nonzero(), DynamicOutputShapeException),
        (lambda x: x[None][x[None] > 0], DynamicOutputShapeException),
    ],
    ids=["item", "bool", "tolist", "nonzero", "mask"],
)
def test_a_wait_is_noticed(
    wait: Callable[[Tensor], object], error: type[Exception], launches: dict[str, int]
) -> None:
    with pytest.raises(error):
        wait(torch.empty(()))
