"""`logitcask bench`: time the kernels on this machine, from a checkout."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import rich_click as click

from logitcask.engine.errors import LogitcaskError

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "bench_kernels.py"


@click.group("bench", context_settings={"help_option_names": ["-h", "--help"]})
def bench_command() -> None:
    """Time the kernels on this machine, from a checkout of the repository.

    Example: logitcask bench kernels --quick
    """


@bench_command.command("kernels")
@click.option(
    "--shape",
    multiple=True,
    metavar="T,V,H,K,k",
    help="Positions, vocabulary, hidden size, teacher ids, student ids; repeatable. Replaces the "
    "preset's shapes.",
)
@click.option(
    "--preset",
    type=click.Choice(["qwen3", "llama3", "gemma"]),
    help="Model family that gives vocabulary and hidden sizes. [default: qwen3]",
)
@click.option(
    "--section",
    multiple=True,
    type=click.Choice(["logits", "hidden", "indexed", "topk"]),
    help="Section to measure; repeatable. [default: all]",
)
@click.option(
    "--providers",
    metavar="NAME,NAME",
    help="Implementations to measure; a wrong name lists all. [default: all that can run]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Device to measure. [default: cuda if present]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of the logits. [default: float32 on a CPU, bfloat16 on a GPU]",
)
@click.option("--quick", is_flag=True, help="Fewer shapes, and fewer rows on a CPU.")
@click.option(
    "--budget",
    type=float,
    metavar="SECONDS",
    help="Start no measurement after this time, and list those left out. [default: none]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File to append rows to. [default: bench/results/kernels.jsonl of the checkout]",
)
def kernels(**options: Any) -> None:
    """Measure time, memory and error of the kernels against torch and other libraries.

    Takes about seven minutes on two cores without a GPU. bench/README.md explains the output.

    Example: logitcask bench kernels --device cpu --section logits
    """
    if not SCRIPT.exists():
        raise LogitcaskError(
            f"{SCRIPT.name} is not part of this installation: benchmarks are not installed",
            hint="clone the repository and run `python bench/bench_kernels.py` in it",
        )
    # The script imports files of its own folder, which the variable would forbid.
    environment = {**os.environ, "PYTHONSAFEPATH": ""}
    done = subprocess.run([sys.executable, str(SCRIPT), *_words(options)], env=environment)
    sys.exit(done.returncode)


def _words(options: dict[str, Any]) -> list[str]:
    """Return the options as arguments of the script."""
    words = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value not in (None, False, ()):
            for each in value if isinstance(value, tuple) else (value,):
                words += [f"--{name}", str(each)]
    return words
