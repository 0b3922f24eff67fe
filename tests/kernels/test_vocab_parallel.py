"""A vocabulary in shards against the whole: statistics, losses and gradients, on both paths.

Two real processes agree on a result or on an error.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import HALF, KINDS_AND_DTYPES, assert_close, list_top, make_ids, make_logits, ulp
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
from vocab_parallel_rank import N_VOCAB, outcome, own, problem

from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.logit_transform import PLAIN, LogitTransform
from logitcask.kernels.objective_input import ObjectiveFn, SparseLoss
from logitcask.kernels.row_losses import RowLosses, RowRead
from logitcask.kernels.row_stats import row_stats, row_stats_reference
from logitcask.kernels.sparse_kl import sparse_kl
from logitcask.kernels.topk_select import topk_select
from logitcask.kernels.tp_group import fingerprint
from logitcask.kernels.vocab_parallel import (
    merge_reads,
    own_columns,
    read_shard,
    vocab_parallel_linear_sparse_kl,
    vocab_parallel_sparse_kl,
)

HARD = [200, 3, 486, 11]
"""Uneven, one narrower than k, one beyond n_vocab."""
WIDTHS = {"two": [350, 350], "three": [400, 3, 297], "four": HARD}
V, N_OWN, S, K = 700, 689, 12, 6


def spread(widths: Sequence[int], n_vocab: int) -> list[tuple[slice, int]]:
    """Return each shard's columns, and how many of them count."""
    ends = [sum(widths[: r + 1]) for r in range(len(widths))]
    firsts = [end - width for end, width in zip(ends, widths, strict=True)]
    return [
        (slice(first, end), max(0, min(end, n_vocab) - first))
        for first, end in zip(firsts, ends, strict=True)
    ]


def merged(
    logits: Tensor,
    ids: Tensor,
    widths: Sequence[int],
    k: int,
    n_vocab: int,
    logit_transform: LogitTransform = PLAIN,
) -> RowRead:
    """Return the statistics of whole rows that every rank merges."""
    parts = []
    for columns, n_own in spread(widths, n_vocab):
        at = own_columns(ids, columns.start, n_own)
        parts.append(read_shard(logits[:, columns], at, k, columns.start, n_own, logit_transform))
    return merge_reads(parts, k)


def on_shards(
    logits: Tensor,
    ids: Tensor,
    objective_fn: ObjectiveFn,
    widths: Sequence[int],
    n_vocab: int,
    k: int = K,
    row_weight: Tensor | None = None,
    logit_transform: LogitTransform = PLAIN,
) -> tuple[SparseLoss, Tensor]:
    """Return the ranks' result, equal bit by bit, and the gradients of all columns."""
    logits = logits.detach()
    read = merged(logits, ids, widths, k, n_vocab, logit_transform)
    grad = torch.full_like(logits, torch.nan)
    results = []
    for columns, n_own in spread(widths, n_vocab):
        losses = RowLosses(ids, objective_fn, k, row_weight, read.entropy.dtype, logit_transform)
        at, out = own_columns(ids, columns.start, n_own), grad[:, columns]
        if n_own == 0:
            out.zero_()
        shard_out = out if n_own else None
        losses.finish(slice(0, len(ids)), read, logits[:, columns], at, shard_out, n_own)
        results.append(losses.result())
    assert all(torch.equal(results[0].row_loss, other.row_loss) for other in results[1:])
    return results[0], grad


@pytest.mark.parametrize(
    ("kind", "dtype", "widths"),
    [(*case, HARD) for case in KINDS_AND_DTYPES]
    + [
        (kind, torch.float32, WIDTHS[name]) for kind in ("iid", "ties") for name in ("two", "three")
    ],
    ids=str,
)
def test_reads_equal_those_of_whole_rows(
    kind: str, dtype: torch.dtype, widths: list[int], device: str
) -> None:
    logits = make_logits(kind, 2, V, dtype).to(device)
    ids = make_ids(2, N_OWN, S).to(device)
    read = merged(logits, ids, widths, K, N_OWN)
    values, top_ids = topk_select(logits, K, n_vocab=N_OWN)
    assert torch.equal(read.top_ids, top_ids)
    assert torch.equal(read.top, values)
    expected_at = logits.gather(1, ids.clamp(min=0)).to(read.at_ids.dtype)
    assert torch.equal(read.at_ids, expected_at.masked_fill(ids < 0, -torch.inf))
    # The floors of test_row_stats: what one piece is allowed.
    exact = row_stats_reference(logits.double(), n_vocab=N_OWN)
    naive = row_stats_reference(logits, n_vocab=N_OWN)
    floor = 2 * ulp(logits, torch.float32) + 4 * ulp(exact.log_sum_exp, torch.float32)
    assert_close(read.log_sum_exp, naive.log_sum_exp, exact.log_sum_exp, floor, "log_sum_exp")
    floor += 32 * torch.finfo(torch.float32).eps
    assert_close(read.entropy, naive.entropy, exact.entropy, floor, "entropy")


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_float64_keeps_its_precision(widths: list[int]) -> None:
    logits = make_logits("ramp up", 3, V, torch.float64)
    read = merged(logits, make_ids(3, V, S), widths, K, V)
    expected = row_stats_reference(logits)
    assert torch.allclose(read.log_sum_exp, expected.log_sum_exp, rtol=1e-13, atol=1e-12)
    assert torch.allclose(read.entropy, expected.entropy, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shard", range(3))
def test_minus_infinity_on_a_whole_shard_is_mass_zero(shard: int, device: str) -> None:
    logits = make_logits("iid", 3, V, torch.float32).to(device)
    columns, _ = spread([400, 3, 297], V)[shard]
    logits[1, columns] = -torch.inf
    logits[2] = -torch.inf
    read = merged(logits, make_ids(3, V, S).to(device), [400, 3, 297], K, V)
    expected = row_stats(logits)
    assert torch.allclose(read.log_sum_exp, expected.log_sum_exp, equal_nan=True)
    assert torch.allclose(read.entropy, expected.entropy, atol=1e-5, equal_nan=True)
    assert read.entropy.isnan().tolist() == [False, False, True], "nothing anywhere is NaN"
    assert torch.equal(read.top_ids, topk_select(logits, K)[1]), "the lowest ids where nothing is"


@pytest.mark.parametrize(
    ("at", "bad", "rest"),
    [
        (0, float("nan"), "iid"),
        (399, -float("nan"), "-inf"),
        (401, float("inf"), "-inf"),
        (401, float("nan"), "-inf"),
        (699, float("inf"), "iid"),
    ],
)
def test_not_a_number_poisons_its_row_alone(at: int, bad: float, rest: str, device: str) -> None:
    """Include a shard of -inf otherwise, which alone is legal: mass 0."""
    widths = [400, 3, 297]
    logits = make_logits("iid", 3, V, torch.float32)
    if rest == "-inf":
        for columns, _ in spread(widths, V):
            if columns.start <= at < columns.stop:
                logits[1, columns] = -torch.inf
    logits[1, at] = bad
    read = merged(logits.to(device), make_ids(3, V, S).to(device), widths, K, V)
    assert read.log_sum_exp.isnan().tolist() == [False, True, False]
    assert read.entropy.isnan().tolist() == [False, True, False]
    assert all(
        len(set(row)) == K and 0 <= min(row) <= max(row) < V for row in read.top_ids.tolist()
    )


@pytest.mark.parametrize(
    ("widths", "dtype"),
    [(WIDTHS["two"], torch.float32), (HARD, torch.float32), (HARD, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_equal_full_vocabulary_autograd(
    widths: list[int], name: str, dtype: torch.dtype, device: str
) -> None:
    logits = make_logits("iid", 3, V, dtype).to(device)
    ids = list_top(make_ids(3, N_OWN, S).to(device), logits[:, :N_OWN], 4)
    teacher = make_teacher(ids)
    weight = torch.tensor([1.0, 0.5, 0.0], device=device)

    def autograd(z: Tensor, t: Teacher) -> tuple[Tensor, Tensor]:
        z = z.requires_grad_()
        total = (weight.to(z.dtype) * full_vocab_loss(LOSSES[name](t), z, t, K, N_OWN)).sum()
        return total.detach(), torch.autograd.grad(total, z)[0]

    objective_fn = objective(LOSSES[name](teacher))
    ours, grad = on_shards(logits, ids, objective_fn, widths, N_OWN, row_weight=weight)
    exact, exact_grad = autograd(logits.double(), teacher.to(torch.float64))
    naive, naive_grad = autograd(logits.float(), teacher)
    floor = 8 * ulp(logits, torch.float32)  # as in test_sparse_kl
    assert exact > 0.01
    assert_close(ours.loss, naive, exact, floor, "loss")
    rounding = ulp(exact_grad, dtype) if dtype in HALF else 0.0
    assert_close(grad, naive_grad, exact_grad, floor + rounding, "gradient")
    assert (grad[:, N_OWN:] == 0).all()
    assert (grad[2] == 0).all()


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize(
    "y", [PLAIN, LogitTransform(scale=0.7, softcap=9.0)], ids=["plain", "capped"]
)
def test_an_entropy_in_the_loss_is_that_of_whole_rows_on_every_shard(
    widths: list[int], y: LogitTransform, device: str
) -> None:
    """Expect the same coefficients on every shard, also on one without mass."""
    logits = make_logits("iid", 3, V, torch.float32)
    logits[1, :400] = -torch.inf
    logits = logits.to(device)
    ids = list_top(make_ids(3, N_OWN, S).to(device), logits[:, :N_OWN], 4)
    ids = ids.masked_fill(logits.gather(1, ids.clamp(min=0)).isinf(), -1)
    teacher, loss = make_teacher(ids), LOSSES["reverse_kl_renormalised"]
    weight = torch.tensor([1.0, 0.5, 0.0], device=device)
    factor = torch.tensor([0.7, -0.3, 1.0], device=device)

    def autograd(z: Tensor, t: Teacher) -> Tensor:
        z = z.requires_grad_()
        rows = full_vocab_loss(loss(t), y.apply(z), t, K, N_OWN)
        rows = rows + factor * entropy_of(y.apply(z), N_OWN)
        return torch.autograd.grad((weight * rows).sum(), z)[0]

    objective_fn = plus_entropy(objective(loss(teacher)), factor)
    _, grad = on_shards(
        logits, ids, objective_fn, widths, N_OWN, row_weight=weight, logit_transform=y
    )
    naive, exact = autograd(logits, teacher), autograd(logits.double(), teacher.to(torch.float64))
    assert_close(grad, naive, exact, 8 * ulp(logits, torch.float32), "gradient")
    assert (grad[:, N_OWN:] == 0).all()
    assert (grad[2] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_one_shard_is_sparse_kl_to_the_bit(name: str, device: str) -> None:
    logits = make_logits("iid", 3, V, torch.float32).to(device).requires_grad_()
    ids = list_top(make_ids(3, N_OWN, S).to(device), logits[:, :N_OWN], 4)
    objective_fn = objective(LOSSES[name](make_teacher(ids)))
    z = logits.clone()  # in place the gradient is computed from the logits, as of a shard
    expected = sparse_kl(z, ids, objective_fn, k=K, n_vocab=N_OWN, in_place=True)
    ours, grad = on_shards(logits, ids, objective_fn, [V], N_OWN)
    assert torch.equal(ours.row_loss, expected.row_loss)
    assert torch.equal(ours.metrics["entropy"], expected.metrics["entropy"])
    assert torch.equal(grad, torch.autograd.grad(expected.loss, z)[0])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int], int, int]:
    """Draw logits [P, V], ids [P, S], widths of 1 to 5 shards, k, n_vocab."""
    widths = draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    n_vocab = draw(st.integers(1, sum(widths))) if draw(st.booleans()) else sum(widths)
    k, n_ids = draw(st.integers(1, min(n_vocab, 40))), draw(st.integers(1, min(n_vocab, 20)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(draw(st.integers(1, 5)), sum(widths), generator=generator) * 3
    if draw(st.booleans()):
        logits = logits.round()  # ties, within shards and across
    if draw(st.booleans()):
        some = torch.rand(logits.shape, generator=generator) < draw(st.sampled_from([0.3, 0.95]))
        logits[some] = -torch.inf  # whole shards of it, at times
        logits[:, 0] = 0.0
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    ids = torch.rand(len(logits), n_vocab, generator=generator).argsort(1)[:, :n_ids].clone()
    ids = list_top(ids, logits[:, :n_vocab], min(3, n_ids))
    # Not at ids without mass: KL is infinite there, in one piece as in several.
    ids = ids.masked_fill(logits.gather(1, ids.clamp(min=0)).isinf(), -1)
    return logits.to(dtype), ids, widths, k, n_vocab


@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawn=problems(), name=st.sampled_from(["reverse_kl_overlap", "reverse_kl_renormalised"]))
def test_any_shards_equal_one_piece(
    drawn: tuple[Tensor, Tensor, list[int], int, int], name: str, device: str
) -> None:
    logits, ids, widths, k, n_vocab = drawn
    logits, ids = logits.to(device), ids.to(device)
    read = merged(logits, ids, widths, k, n_vocab)
    values, top_ids = topk_select(logits, k, n_vocab=n_vocab)
    assert torch.equal(read.top_ids, top_ids)
    assert torch.equal(read.top, values)
    expected_stats = row_stats(logits, n_vocab=n_vocab)
    assert torch.allclose(read.log_sum_exp, expected_stats.log_sum_exp, atol=4e-6, rtol=4e-7)
    assert torch.allclose(read.entropy, expected_stats.entropy, atol=2e-5)
    objective_fn = objective(LOSSES[name](make_teacher(ids)))
    z = logits.clone().requires_grad_()
    expected = sparse_kl(z, ids, objective_fn, k=k, n_vocab=n_vocab)
    expected.loss.backward()
    ours, grad = on_shards(logits, ids, objective_fn, widths, n_vocab, k)
    assert torch.allclose(ours.row_loss, expected.row_loss, atol=2e-5)
    step = torch.finfo(logits.dtype).eps * z.grad.abs()  # one step of the gradient's dtype
    assert ((grad - z.grad).abs() <= step + 2e-5).all()
    assert (grad[:, n_vocab:] == 0).all()


Z, IDS = torch.zeros(2, 10), torch.tensor([[0, 3, -1], [1, 12, 19]])


def call(logits: Tensor = Z, ids: Tensor = IDS, **changed: Any) -> SparseLoss:
    objective_fn = objective(LOSSES["reverse_kl_overlap"](make_teacher(IDS)))
    return vocab_parallel_sparse_kl(
        logits, ids, objective_fn, **{"first": 10, "n_vocab": 20} | changed
    )


def call_linear(weight: Tensor) -> SparseLoss:
    objective_fn = objective(LOSSES["reverse_kl_overlap"](make_teacher(IDS)))
    hidden = torch.zeros(2, 4)
    return vocab_parallel_linear_sparse_kl(hidden, weight, IDS, objective_fn, first=0, n_vocab=20)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "negative first": (lambda: call(first=-1), ValueError, "first=-1 must be at least 0"),
    "no ids count": (lambda: call(n_vocab=0), ValueError, "n_vocab=0 must be at least 1"),
    "k over n_vocab": (lambda: call(k=21), ValueError, "k=21 must lie in 1..n_vocab=20"),
    "id over n_vocab": (
        lambda: call(n_vocab=19),
        ValueError,
        "ids span -1..19, must be -1 (padding) or lie in 0..18",
    ),
    "int32 ids": (lambda: call(ids=IDS.int()), TypeError, "call ids.long()"),
    "3-D logits": (lambda: call(Z[None]), ValueError, "logits must be [rows, columns]"),
    "integer logits": (lambda: call(Z.long()), TypeError, "logits is torch.int64; supported are"),
    "weight per id": (
        lambda: call(row_weight=torch.ones(2, 3)),
        ValueError,
        "row_weight has shape (2, 3), must be [2]",
    ),
    "chunk_rows 0": (lambda: call(chunk_rows=0), ValueError, "chunk_rows=0 must be at least 1"),
    "weight transposed": (
        lambda: call_linear(torch.zeros(4, 10)),
        ValueError,
        "hidden has shape (2, 4) and weight (4, 10), must be [rows, D] and [V, D]",
    ),
    "no group": (
        lambda: call(),
        ValueError,
        "group=None must be a process group with this process in it, None for all; "
        "call torch.distributed.init_process_group",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_any_message(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_fingerprints_differ() -> None:
    ids = make_ids(5, V, S)
    others = [ids.flip(0), ids.flip(1), ids.roll(1), ids + 1, ids.where(ids != ids[0, 0], -1)]
    weights = [torch.rand(5), torch.zeros(5), torch.ones(5)]
    found = [int(fingerprint(tensor)) for tensor in (ids, *others, *weights)]
    assert len(set(found)) == len(found)
    assert int(fingerprint(ids.clone())) == found[0]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of vocab_parallel_rank.py in two processes over gloo."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("vocab_parallel_rank.py")
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", script, str(rank), folder / "init", out],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    return [torch.load(out) for out in outs]


@pytest.mark.parametrize("case", N_VOCAB)
@pytest.mark.parametrize("form", ["logits", "linear"])
def test_two_processes_equal_one(form: str, case: str, ranks: list[dict[str, Any]]) -> None:
    inputs = problem(case)
    if form == "logits":
        expected = outcome(sparse_kl, [inputs["logits"]], **inputs["shared"])
    else:
        expected = outcome(
            linear_sparse_kl, [inputs["hidden"], inputs["weight"]], **inputs["shared"]
        )
    assert expected["loss"] > 0.01
    by_columns = sorted(range(2), key=lambda rank: own(case, rank).start)
    lower, upper = (ranks[rank]["good"][case][form] for rank in by_columns)
    assert torch.equal(lower["loss"], upper["loss"])
    assert torch.allclose(lower["loss"], expected["loss"], rtol=1e-6)
    for name, value in {"row_loss": expected["row_loss"], **expected["metrics"]}.items():
        ours, other = ((rank | rank["metrics"])[name] for rank in (lower, upper))
        assert torch.equal(ours, other), name
        assert torch.allclose(ours, value, rtol=0 if "top" in name else 1e-5, atol=1e-6), name
    along = 1 if form == "logits" else 0
    grad = torch.cat([lower["grads"][-1], upper["grads"][-1]], along)
    assert torch.allclose(grad, expected["grads"][-1], atol=1e-6)
    padding = V - N_VOCAB[case]
    assert (grad.narrow(along, V - padding, padding) == 0).all()
    if form == "linear":
        assert torch.equal(lower["grads"][0], upper["grads"][0])
        # A column of weight is -40: what it adds on one shard, it takes away on the other.
        assert torch.allclose(lower["grads"][0], expected["grads"][0], atol=2e-5)


def test_chunks_and_no_rows_on_two_processes(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for form, inputs in {"logits": [(0, 350)], "linear": [(0, 24), (350, 24)]}.items():
            one, many = rank["good"]["one chunk"][form], rank["good"]["narrow"][form]
            assert torch.equal(one["row_loss"], many["row_loss"])
            none = rank["good"]["no rows"][form]
            assert none["loss"] == 0
            assert [tuple(grad.shape) for grad in none["grads"]] == inputs
            assert all((grad == 0).all() for grad in none["grads"])


BOTH = {
    "overlap": "first=340 on rank 1 of the group must be 350",
    "gap": "first=351 on rank 1 of the group must be 350",
    "n_vocab over all": "n_vocab=701 must lie in 1..700, the columns of all shards",
    "k": "k: 6 on rank 0 and 7 on rank 1 of the group, must be equal",
    "ids": "fingerprint of ids: ",
    "fewer ids": "ids per row: 12 on rank 0 and 11 on rank 1",
    "row_weight": "fingerprint of row_weight: ",
    "chunk_rows": " on rank 0 and 1 on rank 1 of the group, must be equal",
    "refused by both": "k=0 must lie in 1..n_vocab=690",
    "forms": "hidden size (0: logits): 0 on rank 0 and 24 on rank 1",
    "hidden frozen": "hidden needs a gradient: 1 on rank 0 and 0 on rank 1",
}


def test_a_mismatch_is_refused_by_both(ranks: list[dict[str, Any]]) -> None:
    for wrong, message in BOTH.items():
        for rank in ranks:
            assert message in rank["bad"][wrong].get("error", "no error"), wrong


def test_what_one_refuses_the_other_learns(ranks: list[dict[str, Any]]) -> None:
    zero, one = (rank["bad"]["refused by one"]["error"] for rank in ranks)
    assert zero.startswith("ValueError: rank 1 of the group rejected its input")
    assert one.startswith("TypeError: ids is torch.int32, must be int64")
