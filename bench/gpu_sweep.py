"""Launch parameters of the kernels on a GPU: the shipped ones, and others.

Run: python bench/gpu_sweep.py [--device cuda|cpu] [--budget SECONDS] [--out FILE]

The most useful parts come first, so that a budget cuts off the rest:

  scan    row_stats: warps, logits a step, stages of its loop; share of the copy rate
  grad    row_grad, likewise
  select  the exact top-k after scan: warps; compared with torch.topk
  chunks  linear_sparse_kl: rows of logits that exist at a time
  few     row_stats and sparse_kl of few rows, which do not fill the chip
  forms   an objective between the launches, or in one of them

The results of every setting are compared with the package's. On a CPU the same at tiny sizes in
Triton's interpreter (TRITON_INTERPRET=1 in the environment), to try the script: its times mean
nothing.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gpu_launch
import results
import torch
from kernel_calls import Results, our_hidden, our_logits
from kernel_fused import FORMS
from kernel_machine import about, digits, failure, interpreted, machine, name_of, short
from kernel_shapes import Case, Shape, make_case
from kernel_timing import measured_rates, timed
from results import Row
from torch import Tensor

from logitcask.kernels.row_grad import row_grad
from logitcask.kernels.row_stats import row_stats, scan_rows
from logitcask.kernels.topk_select import group_size, select_rows, topk_select

LOSS = "forward_kl_tail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Settings to try on one device."""

    rows: int
    V: int
    dtype: torch.dtype
    warps: tuple[int, ...]
    tiles: tuple[int, ...]
    stages: tuple[int, ...]
    """1: the kernel as it is."""
    ks: tuple[int, ...]
    hidden: tuple[tuple[int, int], ...]
    """(rows, hidden size)"""
    chunks: tuple[int, ...]
    few: tuple[int, ...]


GRIDS = {
    "cuda": Grid(
        rows=4096,
        V=151_936,
        dtype=torch.bfloat16,
        warps=(4, 8, 16),
        tiles=(2048, 4096, 8192),
        stages=(1, 3),
        ks=(16, 64),
        hidden=((8192, 4096), (8192, 2048)),
        chunks=(1024, 2048, 4096, 8192),
        few=(1, 16, 64, 132, 256, 528),
    ),
    "cpu": Grid(
        rows=2,
        V=1100,
        dtype=torch.float32,
        warps=(4,),
        tiles=(1024,),
        stages=(1, 3),
        ks=(4,),
        hidden=((4, 16),),
        chunks=(2,),
        few=(1,),
    ),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting of one kernel."""

    setting: str
    run: Callable[[], object]
    """May raise: a setting can need more than the chip has."""
    moved: int = 0
    """Least bytes that it reads and writes; 0: no share of the copy rate."""
    right: Callable[[], bool] = lambda: True
    """Returns after a run whether its results are the package's."""


class Sweep:
    """Trials of every part on one device."""

    def __init__(self, device: torch.device, grid: Grid) -> None:
        self.device, self.grid = device, grid
        K = max(grid.ks)
        self.case = make_case("logits", Shape(grid.rows, grid.V, 1, K, K), grid.dtype, device)
        assert self.case.logits is not None
        self.z = self.case.logits  # [P, V]
        self.stats = row_stats(self.z)
        self.size = self.z.numel() * self.z.element_size()

    def scan(self) -> Iterator[Trial]:
        """Yield the trials of row_stats."""
        z, V = self.z, self.grid.V
        for k in reversed(self.grid.ks):
            name = "as shipped" if k == self.grid.ks[-1] else f"as shipped for k={k}"
            yield Trial(name, partial(scan_rows, z, V, group_size(z, k, V)), self.size)
        yield Trial("without groups", partial(row_stats, z), self.size)
        lse, entropy = (torch.empty_like(t) for t in self.stats)
        group_max = lse.new_empty(len(lse), -(-V // (16 * 64)) * 16)

        def right() -> bool:
            return torch.allclose(lse, self.stats.log_sum_exp, atol=1e-5)

        def run(warps: int, tile: int, stages: int) -> None:
            kernel = gpu_launch.staged("row_stats", stages)
            gpu_launch.scan(kernel, z, lse, entropy, group_max, group=64, tile=tile, warps=warps)

        yield from self._settings(run, self.size, right)

    def grad(self) -> Iterator[Trial]:
        """Yield the trials of row_grad."""
        z, lse, teacher = self.z, self.stats.log_sum_exp, self.case.teacher
        dense, at_ids = torch.ones_like(lse), -teacher.log_q.exp()
        out, moved = torch.empty_like(z), 2 * self.size
        shipped = partial(row_grad, z, lse, dense, teacher.ids, at_ids, out=out)
        yield Trial("as shipped", shipped, moved)
        expected = row_grad(z, lse, dense, teacher.ids, at_ids)

        def right() -> bool:  # of some rows; half precision may round to the other side
            ours, other = out[::64].float(), expected[::64].float()
            return torch.allclose(ours, other, rtol=1e-2, atol=1e-8)

        def run(warps: int, tile: int, stages: int) -> None:
            kernel = gpu_launch.staged("row_grad", stages)
            rest = (lse, dense, teacher.ids, at_ids)
            gpu_launch.grad(kernel, z, out, *rest, tile=tile, warps=warps)

        yield from self._settings(run, moved, right)

    def _settings(
        self, run: Callable[[int, int, int], None], moved: int, right: Callable[[], bool]
    ) -> Iterator[Trial]:
        for stages in self.grid.stages:
            for tile in self.grid.tiles:
                for warps in self.grid.warps:
                    name = f"warps={warps} tile={tile} stages={stages}"
                    yield Trial(name, partial(run, warps, tile, stages), moved, right)

    def select(self) -> Iterator[Trial]:
        """Yield the trials of topk_select after its scan."""
        z, V = self.z, self.grid.V
        for k in self.grid.ks:
            group = group_size(z, k, V)
            maxima = scan_rows(z, V, group).group_max
            assert maxima is not None
            yield Trial(f"k={k} as shipped", partial(select_rows, z, maxima, k, V, group))
            expected = select_rows(z, maxima, k, V, group)[1]
            for warps in (2, *self.grid.warps):
                run = partial(gpu_launch.select, z, maxima, k=k, group=group, warps=warps)
                right = partial(_equal, run, expected)
                yield Trial(f"k={k} warps={warps}", run, right=right)
            yield Trial(f"k={k} with its scan", partial(topk_select, z, k), self.size)
            yield Trial(f"k={k} torch.topk", partial(torch.topk, z, k), self.size)

    def chunks(self) -> Iterator[Trial]:
        """Yield the trials of linear_sparse_kl's chunk_rows."""
        K = max(self.grid.ks)
        for T, H in self.grid.hidden:
            shape = Shape(T, self.grid.V, H, K, K)
            case = make_case("hidden", shape, self.grid.dtype, self.device)
            for chunk in self.grid.chunks:
                yield Trial(f"T={T} H={H} chunk={chunk}", our_hidden(LOSS, chunk)(case))

    def few(self) -> Iterator[Trial]:
        """Yield the trials of few rows."""
        for T in self.grid.few:
            case = self.case.first(T)
            assert case.logits is not None
            size = T * self.grid.V * self.z.element_size()
            yield Trial(f"T={T} row_stats", partial(row_stats, case.logits), size)
            yield Trial(f"T={T} sparse_kl", our_logits(LOSS)(case), 3 * size)

    def forms(self) -> Iterator[Trial]:
        """Yield the trials of both forms of an objective."""
        for T in (self.grid.rows, *self.grid.few):
            case, moved = self.case.first(T), 3 * self.size * T // self.grid.rows
            for form in FORMS:
                yield self._form(f"T={T} {form}", our_logits(LOSS, form)(case), case, moved)

    def _form(self, name: str, run: Callable[[], Results], case: Case, moved: int) -> Trial:
        def right() -> bool:  # of some rows; half precision may round to the other side
            got, expected = (
                call()[1][::64].float() for call in (run, our_logits(LOSS, "plain")(case))
            )
            return torch.allclose(got, expected, rtol=1e-2, atol=1e-8)

        return Trial(name, run, moved, right)


def _equal(run: Callable[[], Tensor], expected: Tensor) -> bool:
    return torch.equal(run(), expected)


PARTS = ("scan", "grad", "select", "chunks", "few", "forms")


def main(arguments: list[str]) -> int:
    """Run the sweep; return the exit code."""
    parser = results.option_parser(__doc__, "gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="[default: cuda]")
    results.add_budget(parser)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu tries the script")
    ends = time.monotonic() + options.budget
    device, grid = torch.device(options.device), GRIDS[options.device]
    with interpreted() if options.device == "cpu" else nullcontext():
        left, wrong = sweep(device, grid, ends, options.out)
    for name in left:
        print(
            f"left out, the budget of {options.budget:g} s was spent: {name}, and what follows it"
        )
    return 1 if wrong else 0


def sweep(device: torch.device, grid: Grid, ends: float, out: Path) -> tuple[list[str], bool]:
    """Run all trials; return the parts that the budget left out, and whether a result was wrong."""
    quick = device.type == "cpu"
    rates = measured_rates(device, grid.dtype, quick)
    common = about(device, rates) | {"dtype": name_of(grid.dtype)}
    print(f"{machine(common)}: copy {common['copy_gb_s']:.4g} GB/s", flush=True)
    left, wrong = [], False
    made = Sweep(device, grid)
    for part in PARTS:
        if time.monotonic() > ends:
            left.append(part)
            continue
        for trial in getattr(made, part)():
            if time.monotonic() > ends:
                left.append(f"{part}, {trial.setting}")
                break
            row: Row = {"bench": "kernels", "section": "sweep", "what": part}
            row |= {"setting": trial.setting, "rows": grid.rows, "V": grid.V, "status": "ok"}
            try:
                taken = timed(trial.run, device, quick=quick)
                row |= taken.as_row()
                if trial.moved:
                    rate = trial.moved / (taken.ms / 1e3)
                    row["of_copy"] = digits(rate / rates.copy_bytes_per_s)
                if not trial.right():
                    row["status"], wrong = "wrong", True
            except Exception as error:  # too much shared memory for a setting, say
                row["status"] = failure(error)
            results.append(out, row | common)
            print(f"{part:<7} {trial.setting:<32} {result_text(row)}", flush=True)
    return left, wrong


def result_text(row: Row) -> str:
    """Return time and share of a trial's row, or its status."""
    if "ms" not in row:
        return str(row["status"])
    share = f", {row['of_copy']:.1%} of the copy rate" if "of_copy" in row else ""
    return f"{short(row['ms']):>7} ms{share}" + ("" if row["status"] == "ok" else "  WRONG")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
