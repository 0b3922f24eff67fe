"""The kernels: time, memory and error of losses on a vocabulary, compared with other projects.

Run: .venv/bin/python bench/bench_kernels.py      (or logitcask bench kernels; --help lists options)

  logits    loss, gradient and metrics from logits [T, V]
  hidden    the same from hidden states [T, H] and the head [V, H]
  indexed   losses renormalised on a support, from hidden states and the head
  topk      the live top-k alone

Without options on a CPU about seven minutes on two cores: few rows, Qwen3's vocabulary, float32; on
a GPU the shapes of the preset in bfloat16. On a CPU plain torch with a dense head gets 1024 rows at
a time, which keeps it under 16 GB. Each provider and shape appends a row to --out, which names the
results that it computes, for not every comparison is fair; one that did not run has a row with the
reason. Then the bars, met or MISSED. bench/README.md explains how to read them. Exit code 1: one of
ours failed.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator

import results
import torch
from kernel_bars import bars
from kernel_calls import Call, has_oracle, plain_gradients
from kernel_limits import limit_ms
from kernel_machine import about, digits, failure, machine, name_of, short
from kernel_peers import PEERS
from kernel_providers import PROVIDERS, Provider
from kernel_shapes import PRESETS, SECTIONS, Case, Shape, make_case, shapes
from kernel_timing import Timing, Warm, interleaved, measured_rates, warm_up
from results import Row
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECK_ROWS = 64
"""Rows on which gradients are compared with float64."""
NAMES = sorted({p.name for p in (*PROVIDERS, *PEERS)})


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = results.option_parser(__doc__, "kernels")
    option = parser.add_argument
    option(
        "--shape",
        action="append",
        type=_shape,
        metavar="T,V,H,K,k",
        help="Rows, vocabulary, hidden size, teacher's ids, live ids; repeatable. Replaces the "
        "preset's shapes.",
    )
    option(
        "--preset",
        choices=list(PRESETS),
        default="qwen3",
        help="Model family with this vocabulary and these hidden sizes. [default: qwen3]",
    )
    option(
        "--section",
        action="append",
        choices=SECTIONS,
        help="Section to measure; repeatable. [default: all]",
    )
    option(
        "--providers",
        type=lambda text: text.split(","),
        metavar="NAME,NAME",
        help="Providers to measure; a wrong name lists all. [default: all that can run]",
    )
    option("--device", choices=["cpu", "cuda"], help="[default: cuda if there is one]")
    option(
        "--dtype",
        choices=list(DTYPES),
        help="[default: float32 on a CPU, bfloat16 on a GPU]",
    )
    option("--quick", action="store_true", help="Fewer shapes, and fewer rows on a CPU.")
    results.add_budget(parser)
    return parser


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: list[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = option_parser()
    options = parser.parse_args(arguments)
    for name in options.providers or []:
        if name not in NAMES:
            parser.error(f"--providers: no {name!r}; there are {', '.join(NAMES)}")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; use --device cpu")
    dtype = DTYPES[options.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    ends = time.monotonic() + options.budget
    run = Run(device, dtype, options, ends)
    for section, shape in planned(options, device.type):
        run.measure(section, shape)
    print()
    for bar in bars(run.rows, device.type):
        print(f"{'met ' if bar['met'] else 'MISSED'}  {bar['bar']}: {bar['value']:.4g}")
    return 1 if run.ours_failed else 0


def planned(options: argparse.Namespace, device: str) -> Iterator[tuple[str, Shape]]:
    """Yield the first shape of every section, then the second: a budget cuts off the rest."""
    listed = {
        section: options.shape or shapes(options.preset, section, device, options.quick)
        for section in options.section or SECTIONS
    }
    for i in range(max(map(len, listed.values()))):
        yield from ((section, each[i]) for section, each in listed.items() if i < len(each))


def command_line(options: argparse.Namespace) -> str:
    """Return the command that repeats the run, without its file and budget."""
    words = ["python bench/bench_kernels.py"]
    for name, value in vars(options).items():
        if name in ("out", "budget") or value in (None, False):
            continue
        if name == "shape":
            value = [",".join(map(str, dataclasses.astuple(shape))) for shape in value]
        if name == "providers":
            value = ",".join(value)
        for each in value if isinstance(value, list) else [value]:
            words.append(f"--{name}" if each is True else f"--{name} {each}")
    return " ".join(words)


class Run:
    """One run on one device: its rates, its budget, and its rows."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        options: argparse.Namespace,
        ends: float,
    ) -> None:
        self.device, self.dtype, self.options, self.ends = device, dtype, options, ends
        self.rows: list[Row] = []
        self.errors: dict[tuple[object, ...], float] = {}
        self.ours_failed = False
        self.rates = measured_rates(device, dtype, options.quick)
        self.common = about(device, self.rates) | {
            "dtype": name_of(dtype),
            "command": command_line(options),
        }
        copy, product = self.common["copy_gb_s"], self.common["gemm_tflop_s"]
        print(f"{machine(self.common)}: copy {copy:.4g} GB/s, product {product:.4g} TFLOP/s")

    def measure(self, section: str, shape: Shape) -> None:
        """Measure all providers of a section at a shape: errors, memory and interleaved times."""
        print(f"\n== {section}  {shape}  {name_of(self.dtype)}", flush=True)
        picked = [p for p in (*PROVIDERS, *PEERS) if p.section == section]
        names = self.options.providers
        picked = [p for p in picked if not names or p.name in names]
        status = {
            p.name: p.missing(self.device, shape.T, bool(names)) or self._spent() for p in picked
        }
        able = [p for p in picked if status[p.name] is None]
        case = None
        if able:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # blocks of the previous sizes
            try:
                case = make_case(section, shape, self.dtype, self.device)
            except torch.OutOfMemoryError as error:
                status |= dict.fromkeys([p.name for p in able], failure(error))
        if case is None:
            for each in picked:
                self._record(each, shape, {"status": status[each.name]})
            return
        self._check(case, able, status)
        works: dict[str, Call] = {}
        warm: dict[str, Warm] = {}
        for each in able:
            status[each.name] = status[each.name] or self._spent()
            if status[each.name] is None:
                try:
                    work = each.make(case)
                    warm[each.name] = warm_up(work, self.device)
                    works[each.name] = work
                except Exception as error:
                    status[each.name] = failure(error)
        times = interleaved(works, warm, self.device, quick=self.options.quick)
        for each in picked:
            found = times.get(each.name)
            row: Row = {"status": status[each.name] or "ok"}
            if isinstance(found, Exception):
                row["status"] = failure(found)
            elif found is not None:
                row |= found.as_row() | self._measured(each, shape, found, warm[each.name])
            self._record(each, shape, row)

    def _measured(self, each: Provider, shape: Shape, found: Timing, warm: Warm) -> Row:
        """Return the numbers of a row besides its times."""
        limit = limit_ms(each.task, shape, self.dtype.itemsize, self.rates)
        return {
            "peak_bytes": warm.peak_bytes,
            "limit_ms": digits(limit),
            "of_limit": digits(limit / found.ms),
            "gradient_error": self.errors.get(_error_key(each, shape)),
        }

    def _check(self, case: Case, able: list[Provider], status: dict[str, str | None]) -> None:
        """Store the gradient error on the first rows of all that compute a loss of ours.

        Once for each V, H, K, k.
        """
        few = case.first(CHECK_ROWS)
        exact: dict[tuple[str, bool], tuple[Tensor, ...]] = {}
        for each in able:
            is_done = _error_key(each, case.shape) in self.errors
            if each.loss is None or not has_oracle(each.loss, case) or is_done or self._spent():
                continue
            key = (each.loss, each.student_ids)
            if key not in exact:
                supported = dataclasses.replace(few, teacher=each.teacher(few))
                exact[key] = plain_gradients(each.loss, supported, exact=True)[1:]
            try:
                gradients = each.make(few)()[1:]
            except Exception as error:  # its row has it
                status[each.name] = failure(error)
                continue
            pairs = zip(gradients, exact[key], strict=False)  # a frozen head has none
            worst = max(relative_error(got, expected) for got, expected in pairs)
            self.errors[_error_key(each, case.shape)] = float(f"{worst:.3g}")

    def _spent(self) -> str | None:
        if time.monotonic() < self.ends:
            return None
        return f"left out: the budget of {self.options.budget:g} s was spent"

    def _record(self, each: Provider, shape: Shape, row: Row) -> None:
        full = {
            "bench": "kernels",
            "section": each.section,
            "provider": each.name,
            "shape": dataclasses.asdict(shape),
            **row,
            "computes": each.computes,
            "task": each.task,
            "ours": each.ours,
            "best": each.best,
            **self.common,
        }
        self.rows.append(full)
        results.append(self.options.out, full)
        self.ours_failed |= each.ours and row["status"].startswith(("failed", "out of memory"))
        print(line(full), flush=True)


def _error_key(each: Provider, shape: Shape) -> tuple[object, ...]:
    return each.section, each.name, shape.V, shape.H, shape.K, shape.k


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest entry; infinity for NaN."""
    got = (got.to_dense() if got.is_sparse else got).double()
    error = (got - expected).abs().max().item() / expected.abs().max().item()
    return error if error == error else float("inf")


def line(row: Row) -> str:
    """Return a row as a line of the output."""
    if row["status"] != "ok":
        return f"{row['provider']:<20} {row['status']}"
    peak, error = row["peak_bytes"], row["gradient_error"]
    return (
        f"{row['provider']:<20} {short(row['ms']):>7} ms "
        f"({short(row['ms_p20'])}-{short(row['ms_p80'])}), "
        f"{row['of_limit']:>6.1%} of the limit"
        + ("" if peak is None else f", {peak / 1e6:,.0f} MB")
        + ("" if error is None else f", error {error:.1e}")
        + f"; {row['computes']}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
