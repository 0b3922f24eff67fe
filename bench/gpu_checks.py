"""Comparisons of each op with float64, for gpu_check."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from kernel_calls import (
    Call,
    Results,
    has_oracle,
    leaves,
    our_hidden,
    our_indexed,
    our_logits,
    plain_gradients,
)
from kernel_fused import make_objective
from kernel_machine import name_of
from kernel_providers import KL, LIVE, TAIL
from kernel_shapes import Case, Shape, make_case
from torch import Tensor

from logitcask.kernels import library
from logitcask.kernels.row_grad import row_grad, row_grad_reference
from logitcask.kernels.row_stats import RowStats, row_stats, row_stats_reference
from logitcask.kernels.topk_select import topk_select, topk_select_reference

KINDS = ("iid", "ties", "thirds -inf", "ramp")
BEYOND = (14_160, 151_936)
"""[P, V] of more than 2^31 logits."""
BEYOND_BYTES = 6 * BEYOND[0] * BEYOND[1]
"""Their 2 bytes each, and room for the statistics' and the allocator's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison and its tolerance."""

    check: str
    dtype: str
    size: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Return whether the error is allowed; NaN is not."""
        return self.error <= self.allowed


def made(kind: str, n_rows: int, n_columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return logits [P, V] of a kind that broke kernels before."""
    generator = torch.Generator(device).manual_seed(0)
    z = torch.randn(n_rows, n_columns, generator=generator, device=device) * 3
    if kind == "ties":
        z = z.round()
    elif kind == "thirds -inf":
        z[:, ::3] = -torch.inf
    elif kind == "ramp":
        z += torch.linspace(0, 300, n_columns, device=device)
    return z.to(dtype)


def against(
    name: str, dtype: torch.dtype, ours: Tensor, naive: Tensor, exact: Tensor, floor: float
) -> Check:
    """Return the check of this file's rule; infinities and NaN must agree with float64."""
    size = "x".join(map(str, exact.shape))
    ours, naive, exact = (t.detach().double() for t in (ours, naive, exact))
    odd = ~exact.isfinite()
    if not torch.equal(ours[odd].nan_to_num(nan=0.5), exact[odd].nan_to_num(nan=0.5)):
        error, allowed = float("inf"), floor
    else:
        error, plain_error = (
            (t - exact).masked_fill(odd, 0.0).abs().max().item() for t in (ours, naive)
        )
        allowed = 2 * plain_error + floor
    return Check(check=name, dtype=name_of(dtype), size=size, error=error, allowed=allowed)


def same(name: str, dtype: torch.dtype, one: Tensor, other: Tensor) -> Check:
    """Return the check that both are equal bit by bit."""
    size, error = "x".join(map(str, one.shape)), float((one != other).sum())
    return Check(check=name, dtype=name_of(dtype), size=size, error=error, allowed=0.0)


def step(x: Tensor, dtype: torch.dtype) -> float:
    """Return the distance of neighboring numbers of dtype at the largest finite |x|, at least 1."""
    finite = x[x.isfinite()].abs()
    largest = finite.max().item() if len(finite) else 1.0
    return float(torch.finfo(dtype).eps * max(largest, 1.0))


def statistics(z: Tensor, kind: str) -> Iterator[Check]:
    """Check row_stats of z [P, V]."""
    ours, naive, exact = row_stats(z), row_stats_reference(z), _exact_stats(z)
    floor = 2 * step(z, torch.float32) + 4 * step(exact.log_sum_exp, torch.float32)
    name = f"row_stats, {kind}"
    yield against(f"{name}: log-sum-exp", z.dtype, ours[0], naive[0], exact[0], floor)
    # 32 log2 units of shift at most, see scan_kernel.
    floor += 32 * torch.finfo(torch.float32).eps
    yield against(f"{name}: entropy", z.dtype, ours[1], naive[1], exact[1], floor)


def _exact_stats(z: Tensor) -> RowStats:
    return row_stats_reference(z.double())


def selection(z: Tensor, kind: str, k: int) -> Iterator[Check]:
    """Check topk_select of z [P, V] against a stable sort."""
    k = min(k, z.shape[1])
    values, ids = topk_select(z, k)
    expected_values, expected_ids = topk_select_reference(z, k)
    name = f"topk_select, {kind}, k={k}"
    yield same(f"{name}: ids", z.dtype, ids, expected_ids)
    yield same(f"{name}: values", z.dtype, values, expected_values)


def gradient(z: Tensor, kind: str) -> Iterator[Check]:
    """Check row_grad of z [P, V]; overwrites z."""
    generator = torch.Generator(z.device).manual_seed(1)
    dense = torch.rand(len(z), generator=generator, device=z.device) + 0.1
    ids = z.double().masked_fill(z.isinf(), 0.0).topk(min(4, z.shape[1])).indices
    ids[0, 0] = -1
    at = torch.randn(ids.shape, generator=generator, device=z.device)
    exact = row_grad_reference(z.double(), _exact_stats(z)[0], dense.double(), ids, at.double())
    naive = row_grad_reference(z, row_stats_reference(z)[0], dense, ids, at)
    lse = row_stats(z)[0]
    ours = row_grad(z, lse, dense, ids, at, out=torch.empty_like(z, dtype=torch.float32))
    floor = 2 * step(z, torch.float32)  # softmax is as close as log-sum-exp
    yield against(f"row_grad, {kind}", z.dtype, ours, naive, exact, floor)
    separate = row_grad(z, lse, dense, ids, at)
    inside = row_grad(z, lse, dense, ids, at, out=z)
    yield same(f"row_grad, {kind}: in place", z.dtype, inside, separate)


def from_logits(
    shape: Shape, dtype: torch.dtype, device: torch.device, loss: str, forms: Sequence[str]
) -> Iterator[Check]:
    """Check sparse_kl: loss, gradient, its sum over the vocabulary, and equal bits of two runs."""
    case = make_case("logits", shape, dtype, device)
    for form in forms:
        name = f"sparse_kl, {loss}, {form}"
        yield from _of_loss(name, loss, case, our_logits(loss, form)(case))


def in_chunks(
    shape: Shape, dtype: torch.dtype, device: torch.device, loss: str, chunk_rows: int
) -> Iterator[Check]:
    """Check linear_sparse_kl, some rows at a time."""
    case = make_case("hidden", shape, dtype, device)
    if has_oracle(loss, case):
        ours = our_hidden(loss, chunk_rows)(case)
        yield from _of_loss(f"linear_sparse_kl, {loss}", loss, case, ours)


def on_ids(
    shape: Shape, dtype: torch.dtype, device: torch.device, chunk_rows: int, wider: bool
) -> Iterator[Check]:
    """Check indexed_linear with the teacher's ids; wider: also as rows, and with a live top-k."""
    case = make_case("hidden", shape, dtype, device)
    calls = [("indexed_linear", KL, our_indexed(KL))]
    if wider:
        calls.append(("indexed_linear as rows", KL, our_indexed(KL, rows=True)))
        for loss in (KL, LIVE):
            ours = our_indexed(loss, live=True, chunk_rows=chunk_rows)
            calls.append(("indexed_linear live", loss, ours))
    for name, loss, make in calls:
        if has_oracle(loss, case):
            yield from _of_loss(f"{name}, {loss}", loss, case, make(case))


def compiled(shape: Shape, dtype: torch.dtype, device: torch.device, name: str) -> Iterator[Check]:
    """Check an op of library.py within torch.compile(fullgraph=True) against the op alone."""
    case = make_case("hidden", shape, dtype, device)
    loss = KL if name == "indexed_linear" else TAIL
    objective = make_objective(loss, case.teacher, shape.k)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        inputs = (hidden @ weight.T,) if name == "sparse_kl" else (hidden, weight)
        done = getattr(library, name)(*inputs, case.teacher.ids, objective, k=shape.k)
        return done.loss * 3

    torch.compiler.reset()
    found = []
    for step in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        inputs = leaves(case.hidden, case.weight)
        value = step(*inputs)
        found.append([value.detach(), *torch.autograd.grad(value, inputs)])
    for what, alone, within in zip(("loss", "gradient", "head's gradient"), *found, strict=True):
        yield same(f"compiled {name}, {loss}: {what}", dtype, within, alone)


def _of_loss(name: str, loss: str, case: Case, ours: Call) -> Iterator[Check]:
    once, again = (_dense(ours()) for _ in range(2))
    naive, exact = plain_gradients(loss, case), plain_gradients(loss, case, exact=True)
    dtype, half = case.dtype, torch.finfo(case.dtype).eps
    floor = 8 * step(case.logits if case.logits is not None else exact[0], torch.float32)
    yield against(f"{name}: loss", dtype, once[0], naive[0], exact[0], floor)
    for what, i in (("gradient", 1), ("head's gradient", 2)):
        if i < len(once):
            rounding = half * exact[i].abs().max().item()
            rest = floor / case.shape.T + rounding
            yield against(f"{name}: {what}", dtype, once[i], naive[i], exact[i], rest)
            yield same(f"{name}: {what} again", dtype, once[i], again[i])
    if case.logits is not None:
        row_sum = once[1].double().sum(-1)
        # Each entry is rounded by itself, and so is the coefficient of the row's softmax.
        floor = half * once[1].double().abs().sum(-1).max().item()
        floor += 8 * torch.finfo(torch.float32).eps / case.shape.T
        # float16 has nothing between 0 and 6e-8, where most of a large vocabulary is.
        floor += half * torch.finfo(dtype).smallest_normal * case.shape.V
        zero = torch.zeros_like(row_sum)
        yield against(f"{name}: sum over the vocabulary", dtype, row_sum, zero, zero, floor)


def _dense(found: Results) -> list[Tensor]:
    return [t.to_dense() if t.is_sparse else t for t in found]


def beyond_int32(device: str) -> Iterator[Check]:
    """Check the last rows of more than 2^31 logits."""
    (T, V), last = BEYOND, slice(-4, None)
    z = torch.empty(T, V, dtype=torch.bfloat16, device=device)
    for start in range(0, T, 1024):
        z[start : start + 1024].normal_(std=3.0)
    few = z[last].clone()
    lse, entropy = row_stats(z)
    exact, naive = _exact_stats(few), row_stats_reference(few)
    floor = 4 * step(exact[0], torch.float32)
    kind = "beyond 2^31"
    yield against(f"row_stats, {kind}: log-sum-exp", z.dtype, lse[last], naive[0], exact[0], floor)
    yield against(f"row_stats, {kind}: entropy", z.dtype, entropy[last], naive[1], exact[1],
                  floor + 4e-6)  # fmt: skip
    ids = topk_select(z, 16)[1]
    yield same(f"topk_select, {kind}: ids", z.dtype, ids[last], topk_select_reference(few, 16)[1])
    dense, at = torch.ones(T, device=device), torch.full(ids.shape, -0.5, device=device)
    row_grad(z, lse, dense, ids, at, out=z)
    expected = row_grad_reference(few.double(), exact[0], dense[last].double(), ids[last],
                              at[last].double())  # fmt: skip
    rounded = expected.to(z.dtype)
    yield against(f"row_grad, {kind}: in place", z.dtype, z[last], rounded, expected, 1e-7)
