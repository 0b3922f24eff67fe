"""Check of every kernel against float64 on the device, before the timing.

Run: python bench/gpu_check.py [--device cuda|cpu] [--part first|wider] [--budget SECONDS]

  first   every op at a production and at an odd shape, in the dtype of training; the ops of
          library.py within torch.compile
  wider   all kinds of logits, dtypes, k, forms of an objective, and more than 2^31 logits

A step at a time, with a row appended after each, so that a run that is stopped keeps the others. On
a GPU at real and at odd sizes; on a CPU the same at tiny sizes in Triton's interpreter, which needs
TRITON_INTERPRET=1 in the environment. A step that fails has a row with the reason, and the next
follows: in a fresh process, if the failure took the GPU's context along. Exit code 1 if a check is
wrong or a step failed. Tolerance: our error against float64 is at most twice that of plain torch in
the same dtype, plus the rounding of inputs and outputs.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import gpu_checks
import results
import torch
from gpu_checks import BEYOND_BYTES, KINDS, Check
from kernel_fused import FORMS
from kernel_losses import LOSSES
from kernel_machine import about, failure, interpreted, machine, name_of
from kernel_providers import TAIL
from kernel_shapes import Shape
from results import Row
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
PARTS = ("first", "wider")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of all checks on one device."""

    device: str
    rows: int
    vocabularies: tuple[int, ...]
    k: int
    other_ks: tuple[int, ...]
    """More k for the largest vocabulary with ties."""
    case: Shape
    production: Shape
    """Of the first checks, with `case`."""
    chunk_rows: int
    """Rows of a chunk from hidden states: no divisor of the rows of either."""
    dtypes: tuple[torch.dtype, ...]
    """Dtypes of gradients, that of training first: the interpreter truncates half precision, the
    hardware rounds."""


SIZES = {
    "cuda": Sizes(
        device="cuda",
        rows=16,
        vocabularies=(151_936, 151_669, 5),
        k=16,
        other_ks=(1, 64, 128),
        case=Shape(200, 151_669, 256, 16, 16),
        production=Shape(256, 151_936, 1024, 64, 64),
        chunk_rows=96,
        dtypes=DTYPES,
    ),
    "cpu": Sizes(
        device="cpu",
        rows=2,
        vocabularies=(4801, 5),
        k=5,
        other_ks=(),
        case=Shape(3, 300, 16, 8, 8),
        production=Shape(3, 512, 16, 16, 16),
        chunk_rows=2,
        dtypes=(torch.float32,),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Checks of one op at one size in one dtype."""

    what: str
    dtype: torch.dtype
    run: Callable[[], Iterator[Check]]
    needs_bytes: int = 0
    """Free memory of a GPU without which it is left out."""


def plan(part: str, sizes: Sizes) -> list[Step]:
    """Return the steps of a part, the most decisive first."""
    return list(_first(sizes) if part == "first" else _wider(sizes))


def _first(sizes: Sizes) -> Iterator[Step]:
    dtype = sizes.dtypes[0]
    for n_vocab, shape in zip(sizes.vocabularies, (sizes.production, sizes.case), strict=False):
        yield from _on_logits(sizes, dtype, n_vocab, KINDS[:1])
        yield from _of_losses(sizes, dtype, shape, (TAIL,), FORMS[:1])
    shape, device = sizes.case, torch.device(sizes.device)
    for name in ("sparse_kl", "linear_sparse_kl", "indexed_linear"):
        run = partial(gpu_checks.compiled, shape, dtype, device, name)
        yield Step(what=f"compiled {name} T={shape.T} V={shape.V}", dtype=dtype, run=run)


def _wider(sizes: Sizes) -> Iterator[Step]:
    for dtype in DTYPES:
        for n_vocab in sizes.vocabularies:
            yield from _on_logits(sizes, dtype, n_vocab, KINDS)
        if dtype in sizes.dtypes:
            yield from _of_losses(sizes, dtype, sizes.case, tuple(LOSSES), FORMS)
        if dtype == DTYPES[0] and sizes.device == "cuda":
            run = partial(gpu_checks.beyond_int32, sizes.device)
            yield Step(what="beyond 2^31", dtype=dtype, run=run, needs_bytes=BEYOND_BYTES)
    for k in sizes.other_ks:  # each is another kernel to compile
        for dtype in DTYPES:
            yield _step(f"topk_select k={k}", partial(gpu_checks.selection, k=k), sizes, dtype,
                        sizes.vocabularies[0], KINDS[1:2])  # fmt: skip


def _on_logits(
    sizes: Sizes, dtype: torch.dtype, n_vocab: int, kinds: Sequence[str]
) -> Iterator[Step]:
    """Yield the steps of the ops without a loss."""
    for name, op in (
        ("row_stats", gpu_checks.statistics),
        (f"topk_select k={sizes.k}", partial(gpu_checks.selection, k=sizes.k)),
        ("row_grad", gpu_checks.gradient),
    ):
        yield _step(name, op, sizes, dtype, n_vocab, kinds)


def _step(
    name: str,
    op: Callable[[Tensor, str], Iterator[Check]],
    sizes: Sizes,
    dtype: torch.dtype,
    n_vocab: int,
    kinds: Sequence[str],
) -> Step:
    def run() -> Iterator[Check]:
        for kind in kinds:
            z = gpu_checks.made(kind, sizes.rows, n_vocab, dtype, sizes.device)
            yield from op(z, kind)

    return Step(what=f"{name} V={n_vocab}, {', '.join(kinds)}", dtype=dtype, run=run)


def _of_losses(
    sizes: Sizes, dtype: torch.dtype, shape: Shape, losses: Sequence[str], forms: Sequence[str]
) -> Iterator[Step]:
    """Yield the steps of losses from logits, from hidden states, and on ids."""
    device, chunk = torch.device(sizes.device), sizes.chunk_rows
    ops = [
        *((f"sparse_kl {loss}", partial(gpu_checks.from_logits, loss=loss, forms=forms))
          for loss in losses),
        *((f"linear_sparse_kl {loss}", partial(gpu_checks.in_chunks, loss=loss, chunk_rows=chunk))
          for loss in losses),
        ("indexed_linear", partial(gpu_checks.on_ids, chunk_rows=chunk, wider=len(losses) > 1)),
    ]  # fmt: skip
    for name, op in ops:
        what = f"{name} T={shape.T} V={shape.V} H={shape.H} K={shape.K}"
        yield Step(what=what, dtype=dtype, run=partial(op, shape, dtype, device))


def main(arguments: list[str]) -> int:
    """Run the checks; return the exit code."""
    parser = results.option_parser(__doc__, "gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="[default: cuda]")
    parser.add_argument("--part", choices=PARTS, help="[default: both]")
    results.add_budget(parser)
    go_on = parser.add_argument_group("after a step that ended the GPU's context")
    go_on.add_argument("--start", type=int, default=0, metavar="N", help="Leave out N steps.")
    go_on.add_argument("--failed", action="store_true", help="Exit with code 1.")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu tries the script")
    ends = time.monotonic() + options.budget
    common = about(torch.device(options.device))
    print(f"{machine(common)}, torch {common['torch']}, triton {common['triton']}", flush=True)
    parts = PARTS if options.part is None else (options.part,)
    steps = [step for part in parts for step in plan(part, SIZES[options.device])]
    bad = int(options.failed)
    with interpreted() if options.device == "cpu" else nullcontext():
        for i, step in enumerate(steps[options.start :], options.start):
            late = time.monotonic() > ends
            row = left_out(step, options.budget) if late else checked(step)
            results.append(options.out, row | common)
            print(line(row), flush=True)
            bad += row["status"].startswith(("wrong", "failed"))
            if row["status"].startswith("failed") and not _context_lives():
                _go_on(arguments, i + 1, ends - time.monotonic())
    print(f"{bad} of {len(steps)} steps wrong or failed" if bad else "no check was wrong")
    return 1 if bad else 0


def checked(step: Step) -> Row:
    """Run the checks of a step; return its row."""
    checks: list[Check] = []
    start, status = time.monotonic(), "ok"
    try:
        if step.needs_bytes and (free := torch.cuda.mem_get_info()[0]) < step.needs_bytes:
            needs = f"needs {step.needs_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            return _row(step, f"left out: {needs}", [], start)
        for check in step.run():
            checks.append(check)
    except Exception as error:  # a launch that the chip refuses, say
        status = failure(error)
    if status == "ok" and not all(check.ok for check in checks):
        status = "wrong"
    return _row(step, status, checks, start)


def left_out(step: Step, budget: float) -> Row:
    """Return the row of a step that did not start in time."""
    return _row(step, f"left out: the budget of {budget:g} s was spent", [], time.monotonic())


def _row(step: Step, status: str, checks: list[Check], start: float) -> Row:
    return {
        "bench": "kernels",
        "section": "check",
        "what": step.what,
        "dtype": name_of(step.dtype),
        "status": status,
        "checks": len(checks),
        "wrong": [asdict(check) for check in checks if not check.ok],
        "seconds": round(time.monotonic() - start, 1),
    }


def line(row: Row) -> str:
    """Return a row as lines of the output."""
    lines = [f"{row['what']}  {row['dtype']}: {row['status']}, {row['checks']} checks, "
             f"{row['seconds']} s"]  # fmt: skip
    for check in row["wrong"]:
        lines.append(f"WRONG  {check['check']}  {check['dtype']} {check['size']}: "
                     f"{check['error']:.3g} > {check['allowed']:.3g}")  # fmt: skip
    return "\n".join(lines)


def _context_lives() -> bool:
    """Return whether the GPU still works: some failures of a kernel end its context."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _go_on(arguments: list[str], start: int, budget: float) -> None:
    """Replace this process by one that runs the steps from `start` on."""
    options = ["--start", str(start), "--budget", f"{budget:.0f}", "--failed"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, __file__, *arguments, *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
