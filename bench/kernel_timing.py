"""Time and memory of calls, and the highest rates of the machine.

Time: the calls are interleaved in a random, seeded order, so that a slow minute hits all alike. On
a GPU between CUDA events, after a write of FLUSH bytes that clears the L2 cache; at
least 200 ms and 20 runs each. On a CPU by the wall clock, at least three runs, or two of a call of
over three seconds. The median counts; the 20th and 80th percentile show its uncertainty.

Memory: the peak of a call beyond the memory before it, its results included. On a GPU by torch's
allocator. On a CPU the peak of the process's resident pages (VmHWM of /proc), after the heap has
returned its free pages; a system without that file is not measured.
"""

import ctypes
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from kernel_limits import Rates
from kernel_machine import digits

Work = Callable[[], object]

FLUSH = 1 << 28
"""Bytes; the L2 cache of an H200 has 60 MB."""
GPU_LEAST_S, GPU_LEAST_RUNS, GPU_MOST_RUNS = 0.2, 20, 200
CPU_LEAST_S, CPU_MOST_RUNS, CPU_SLOW_S = 2.0, 15, 3.0
WARM_AGAIN_S = 2.0
"""A first call that took longer is not repeated before it is timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Time of a call."""

    ms: float
    """Median."""
    ms_p20: float
    ms_p80: float
    runs: int

    def as_row(self) -> dict[str, float]:
        """Return the numbers of a row."""
        return {name: digits(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """Time and memory of a call before the timing, which compiles it."""

    seconds: float
    peak_bytes: int | None


def warm_up(work: Work, device: torch.device) -> Warm:
    """Call `work` once or twice."""
    first = _once(work, device)
    return first if first.seconds > WARM_AGAIN_S and device.type == "cpu" else _once(work, device)


def _once(work: Work, device: torch.device) -> Warm:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int | None = torch.cuda.memory_allocated(device)
    else:
        before = _reset_peak()
    start = time.perf_counter()
    kept = work()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    after = torch.cuda.max_memory_allocated(device) if on_gpu else _status_bytes("VmHWM")
    del kept
    known = before is not None and after is not None
    return Warm(seconds=seconds, peak_bytes=max(0, after - before) if known else None)


def _reset_peak() -> int | None:
    """Reset VmHWM and return the resident bytes; None on a system without VmHWM."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else a call could use memory that another has freed
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def interleaved(
    works: Mapping[str, Work],
    warm: Mapping[str, Warm],
    device: torch.device,
    *,
    quick: bool = False,
    seed: int = 0,
) -> dict[str, Timing | Exception]:
    """Return the times of warmed-up calls, in one random order of all their runs.

    An error of a call replaces its time, and the others go on. quick: a tenth of the time on a CPU.
    """
    order = random.Random(seed)
    planned = {name: _runs(warm[name].seconds, device, quick) for name in works}
    rounds = max(planned.values(), default=0)
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device) if device.type == "cuda" else None
    taken: dict[str, list[float]] = {name: [] for name in works}
    failed: dict[str, Exception] = {}
    for i in range(rounds):
        # Fewer runs of slow ones, spread over all rounds.
        due = [n for n, runs in planned.items() if (i + 1) * runs // rounds > i * runs // rounds]
        order.shuffle(due)
        for name in due:
            if name in failed:
                continue
            try:
                taken[name].append(_milliseconds(works[name], flush))
            except Exception as error:
                failed[name] = error.with_traceback(None)  # else it keeps its tensors
    return {name: failed.get(name) or _summary(times) for name, times in taken.items()}


def timed(work: Work, device: torch.device, *, quick: bool = False) -> Timing:
    """Warm up and time one call alone."""
    found = interleaved({"": work}, {"": warm_up(work, device)}, device, quick=quick)[""]
    if isinstance(found, Exception):
        raise found
    return found


def _runs(seconds: float, device: torch.device, quick: bool) -> int:
    if device.type == "cuda":
        return min(GPU_MOST_RUNS, max(GPU_LEAST_RUNS, int(GPU_LEAST_S / max(seconds, 1e-6)) + 1))
    if seconds > CPU_SLOW_S:
        return 2
    least_s = CPU_LEAST_S / 10 if quick else CPU_LEAST_S
    return min(CPU_MOST_RUNS, max(3, int(least_s / max(seconds, 1e-6))))


def _milliseconds(work: Work, flush: torch.Tensor | None) -> float:
    if flush is None:
        begun = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()  # runs while the host queues the call: its launches are not waited for
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _summary(times: list[float]) -> Timing:
    p20, median, p80 = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Timing(ms=float(median), ms_p20=float(p20), ms_p80=float(p80), runs=len(times))


def measured_rates(device: torch.device, dtype: torch.dtype, quick: bool) -> Rates:
    """Measure the copy rate and the rate of a square product on the device in the dtype."""
    on_gpu = device.type == "cuda"
    n_bytes = 1 << ((28 if quick else 31) if on_gpu else (24 if quick else 28))
    source = torch.zeros(n_bytes, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device, quick=quick)
    n = (4096 if quick else 8192) if on_gpu else (512 if quick else 2048)
    square = torch.randn(n, n, dtype=torch.float32, device=device).to(dtype)
    out = torch.empty_like(square)
    product = timed(lambda: torch.mm(square, square, out=out), device, quick=quick)
    return Rates(
        copy_bytes_per_s=2e3 * n_bytes / copy.ms,
        flop_per_s=2e3 * n**3 / product.ms,
    )
