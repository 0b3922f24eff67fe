"""All measurements of a GPU in one call of limited time, the most decisive first.

Run: python bench/gpu_run.py [--device cuda|cpu] [--budget SECONDS] [--out FILE]

A stage is a script in a process of its own, so that a broken context ends one alone. It gets a
share of the time that is left, starts nothing after it, and is killed GRACE_S later. Each row is
appended at once: a run that is stopped at any time keeps all rows so far, correctness first. A
summary ends it, also after SIGTERM, and a picture if there is matplotlib. Exit code 1: a check was
wrong, or a stage failed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import results

GRACE_S = 30.0
"""For the measurement that runs when a stage's time is over."""
LEAST_S = 15.0
"""Less is not enough to start a stage."""
SUMMARY_S = 10.0
"""For the tables at the end."""
BENCH = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One script."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    share: float
    """Of the time that is left at its start."""


STAGES = (
    Stage(
        name="correctness of every op",
        script="gpu_check.py",
        arguments=("--part", "first"),
        share=0.3,
    ),
    Stage(name="Qwen3's vocabulary", script="bench_kernels.py", share=0.5),
    Stage(
        name="wider correctness",
        script="gpu_check.py",
        arguments=("--part", "wider"),
        share=0.5,
    ),
    Stage(name="launch parameters", script="gpu_sweep.py", share=0.5),
    Stage(
        name="Llama 3's vocabulary",
        script="bench_kernels.py",
        arguments=("--preset", "llama3"),
        share=0.6,
    ),
    Stage(
        name="Gemma's vocabulary",
        script="bench_kernels.py",
        arguments=("--preset", "gemma"),
        share=1.0,
    ),
)
Call = Callable[[list[str], dict[str, str], float], int | None]
"""(command, variables, seconds) -> exit code, None if it was killed after so many seconds."""


def main(arguments: list[str]) -> int:
    """Run all stages; return the exit code."""
    parser = results.option_parser(__doc__, "gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="[default: cuda]")
    results.add_budget(parser)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    code = 0
    try:
        for name, outcome in run(options.device, options.budget, options.out, called):
            print(f"\n== {name}: {outcome}", flush=True)
            code |= outcome.startswith("failed")
    except KeyboardInterrupt:
        code = 128 + signal.SIGTERM
    subprocess.run(
        [sys.executable, BENCH / "report_kernels.py", options.out, "--roofline"], check=False
    )
    return code


def run(
    device: str, budget: float, out: Path, call: Call, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[str, str]]:
    """Run the stages within the budget; yield name and outcome of each."""
    ends = clock() + budget - SUMMARY_S
    for stage in STAGES:
        left = ends - clock()
        if left < LEAST_S:
            yield stage.name, "left out, the budget was spent"
            continue
        most = stage.share * left
        print(f"\n== {stage.name}, {most:.0f} s at most", flush=True)
        code = call(*command(stage, device, most, out), min(most + GRACE_S, left))
        outcomes = {0: "done", None: "stopped, for a measurement took too long"}
        yield stage.name, outcomes.get(code, f"failed: exit code {code}")


def command(
    stage: Stage, device: str, budget: float, out: Path
) -> tuple[list[str], dict[str, str]]:
    """Return the command of a stage, and its variables."""
    words = [sys.executable, str(BENCH / stage.script), "--device", device, *stage.arguments]
    words += ["--budget", f"{budget:.0f}", "--out", str(out)]
    if device == "cuda":
        return words, {}
    if stage.script == "bench_kernels.py":
        return [*words, "--quick"], {}
    return words, {"TRITON_INTERPRET": "1"}  # Triton reads it at import


def called(words: list[str], variables: dict[str, str], seconds: float) -> int | None:
    """Run a command in its own process; return its exit code, None if it had to be killed."""
    with subprocess.Popen(words, env={**os.environ, **variables}) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
