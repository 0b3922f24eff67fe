"""Check of every kernel against float64 on the device, before the timing.

Run: python bench/gpu_check.py [--device cuda|cpu] [--out FILE]

On a GPU at real and at odd sizes, also beyond 2^31 logits. On a CPU the same checks at tiny sizes
in Triton's interpreter, which needs TRITON_INTERPRET=1 in the environment. Exit code 1 if a check
is wrong. Tolerance: our error against float64 is at most twice that of plain torch in the same
dtype, plus the rounding of inputs and outputs.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import results
import torch
from kernel_calls import (
    Call,
    Results,
    has_oracle,
    our_hidden,
    our_indexed,
    our_logits,
    plain_gradients,
)
from kernel_fused import FORMS
from kernel_losses import LOSSES
from kernel_machine import about, machine, name_of
from kernel_providers import KL, LIVE
from kernel_shapes import Case, Shape, make_case
from torch import Tensor

from logitcask.kernels.launch import triton_on_cpu
from logitcask.kernels.row_grad import row_grad, row_grad_reference
from logitcask.kernels.row_stats import RowStats, row_stats, row_stats_reference
from logitcask.kernels.topk_select import topk_select, topk_select_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("iid", "ties", "thirds -inf", "ramp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of all checks on one device."""

    rows: int
    vocabularies: tuple[int, ...]
    k: int
    other_ks: tuple[int, ...]
    """More k for the largest vocabulary with ties."""
    case: Shape
    chunk_rows: int
    """Rows of a chunk from hidden states: no divisor of the case's rows."""
    half: bool
    """True to check gradients in half precision: the interpreter truncates, the hardware rounds."""


SIZES = {
    "cuda": Sizes(
        rows=16,
        vocabularies=(5, 151_669, 151_936),
        k=16,
        other_ks=(1, 64, 128),
        case=Shape(200, 151_669, 256, 16, 16),
        chunk_rows=96,
        half=True,
    ),
    "cpu": Sizes(
        rows=2,
        vocabularies=(5, 4801),
        k=5,
        other_ks=(),
        case=Shape(3, 300, 16, 8, 8),
        chunk_rows=2,
        half=False,
    ),
}


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


def statistics(sizes: Sizes, device: str) -> Iterator[Check]:
    """Check row_stats."""
    for n_vocab in sizes.vocabularies:
        for kind in KINDS:
            for dtype in DTYPES:
                z = made(kind, sizes.rows, n_vocab, dtype, device)
                ours, naive, exact = row_stats(z), row_stats_reference(z), _exact_stats(z)
                floor = 2 * step(z, torch.float32) + 4 * step(exact.log_sum_exp, torch.float32)
                name = f"row_stats, {kind}"
                yield against(f"{name}: log-sum-exp", dtype, ours[0], naive[0], exact[0], floor)
                # 32 log2 units of shift at most, see scan_kernel.
                floor += 32 * torch.finfo(torch.float32).eps
                yield against(f"{name}: entropy", dtype, ours[1], naive[1], exact[1], floor)


def _exact_stats(z: Tensor) -> RowStats:
    return row_stats_reference(z.double())


def selection(sizes: Sizes, device: str) -> Iterator[Check]:
    """Check topk_select against a stable sort; few k, because each is another kernel to compile."""
    for n_vocab in sizes.vocabularies:
        for kind in KINDS:
            for dtype in DTYPES:
                z = made(kind, sizes.rows, n_vocab, dtype, device)
                other = n_vocab == sizes.vocabularies[-1] and kind == "ties"
                for k in (sizes.k, *(sizes.other_ks if other else ())):
                    values, ids = topk_select(z, min(k, n_vocab))
                    expected_values, expected_ids = topk_select_reference(z, min(k, n_vocab))
                    name = f"topk_select, {kind}, k={k}"
                    yield same(f"{name}: ids", dtype, ids, expected_ids)
                    yield same(f"{name}: values", dtype, values, expected_values)


def gradient(sizes: Sizes, device: str) -> Iterator[Check]:
    """Check row_grad."""
    generator = torch.Generator(device).manual_seed(1)
    for n_vocab in sizes.vocabularies:
        for kind in KINDS:
            for dtype in DTYPES:
                z = made(kind, sizes.rows, n_vocab, dtype, device)
                dense = torch.rand(sizes.rows, generator=generator, device=device) + 0.1
                ids = z.double().masked_fill(z.isinf(), 0.0).topk(min(4, n_vocab)).indices
                ids[0, 0] = -1
                at = torch.randn(ids.shape, generator=generator, device=device)
                exact = row_grad_reference(
                    z.double(), _exact_stats(z)[0], dense.double(), ids, at.double()
                )
                naive = row_grad_reference(z, row_stats_reference(z)[0], dense, ids, at)
                lse = row_stats(z)[0]
                ours = row_grad(
                    z, lse, dense, ids, at, out=torch.empty_like(z, dtype=torch.float32)
                )
                floor = 2 * step(z, torch.float32)  # softmax is as close as log-sum-exp
                yield against(f"row_grad, {kind}", dtype, ours, naive, exact, floor)
                separate = row_grad(z, lse, dense, ids, at)
                inside = row_grad(z, lse, dense, ids, at, out=z)
                yield same(f"row_grad, {kind}: in place", dtype, inside, separate)


def from_logits(sizes: Sizes, device: str) -> Iterator[Check]:
    """Check sparse_kl: loss, gradient, its sum over the vocabulary, and equal bits of two runs."""
    for dtype in DTYPES if sizes.half else DTYPES[:1]:
        case = make_case("logits", sizes.case, dtype, torch.device(device))
        for loss in LOSSES:
            for form in FORMS:
                name = f"sparse_kl, {loss}, {form}"
                yield from _of_loss(name, loss, case, our_logits(loss, form)(case))


def from_hidden(sizes: Sizes, device: str) -> Iterator[Check]:
    """Check linear_sparse_kl in chunks, and indexed_linear."""
    chunk = sizes.chunk_rows
    for dtype in DTYPES if sizes.half else DTYPES[:1]:
        case = make_case("hidden", sizes.case, dtype, torch.device(device))
        calls = [
            *(("linear_sparse_kl", loss, our_hidden(loss, chunk)) for loss in LOSSES),
            ("indexed_linear", KL, our_indexed(KL)),
            ("indexed_linear as rows", KL, our_indexed(KL, rows=True)),
            ("indexed_linear live", KL, our_indexed(KL, live=True, chunk_rows=chunk)),
            ("indexed_linear live", LIVE, our_indexed(LIVE, live=True, chunk_rows=chunk)),
        ]
        for name, loss, make in calls:
            if has_oracle(loss, case):
                yield from _of_loss(f"{name}, {loss}", loss, case, make(case))


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


def beyond_int32(sizes: Sizes, device: str) -> Iterator[Check]:
    """Check the last rows of more than 2^31 logits, on a GPU alone (4.3 GB)."""
    if device != "cuda":
        return
    T, V, last = 14_160, 151_936, slice(-4, None)
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


GROUPS = (statistics, selection, gradient, from_logits, from_hidden, beyond_int32)


def main(arguments: list[str]) -> int:
    """Run all checks; return the exit code."""
    parser = results.option_parser(__doc__, "gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="[default: cuda]")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu tries the script")
    common = about(torch.device(options.device))
    print(f"{machine(common)}, torch {common['torch']}, triton {common['triton']}", flush=True)
    wrong = 0
    with triton_on_cpu() if options.device == "cpu" else nullcontext():
        for group in GROUPS:
            start = time.monotonic()
            checks = list(group(SIZES[options.device], options.device))
            bad = [check for check in checks if not check.ok]
            for check in bad:
                size = f"{check.dtype} {check.size}"
                print(f"WRONG  {check.check}  {size}: {check.error:.3g} > {check.allowed:.3g}")
            wrong += len(bad)
            seconds = round(time.monotonic() - start, 1)
            count = f"{len(checks)} checks, {len(bad)} wrong"
            print(f"{group.__name__:<12} {count}, {seconds} s", flush=True)
            row = {
                "bench": "kernels",
                "section": "check",
                "what": group.__name__,
                "status": "wrong" if bad else "ok",
                "checks": len(checks),
                "wrong": [asdict(check) for check in bad],
                "seconds": seconds,
            }
            results.append(options.out, row | common)
    print("wrong" if wrong else "all right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
