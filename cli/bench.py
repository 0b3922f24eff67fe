"""`logitcask bench`: measurements of this machine, from a checkout."""

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
    """Measure on this machine; from a checkout of the repository.

    Example: logitcask bench kernels --quick
    """


@bench_command.command("kernels")
@click.option(
    "--shape",
    multiple=True,
    metavar="T,V,H,K,k",
    help="Rows, vocabulary, hidden size, teacher's ids, live ids; repeatable. Instead of the "
    "preset's shapes.",
)
@click.option(
    "--preset",
    type=click.Choice(["qwen3", "llama3", "gemma"]),
    help="Model family whose vocabulary and hidden sizes are taken. [default: qwen3]",
)
@click.option(
    "--section",
    multiple=True,
    type=click.Choice(["logits", "hidden", "indexed", "topk"]),
    help="What is measured; repeatable. [default: all]",
)
@click.option(
    "--providers",
    metavar="NAME,NAME",
    help="Who is measured; a wrong name lists all. [default: all that can run]",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]"
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="[default: float32 on a CPU, bfloat16 on a GPU]",
)
@click.option("--quick", is_flag=True, help="Fewer shapes, and fewer rows on a CPU.")
@click.option(
    "--budget",
    type=float,
    metavar="SECONDS",
    help="Start nothing more after so many seconds, and say what was left out. [default: none]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Rows are added to it. [default: bench/results/kernels.jsonl of the checkout]",
)
def kernels(**options: Any) -> None:
    """Time, memory and error of the kernels, beside plain torch and others' kernels.

    About five minutes on two cores without a GPU. bench/README.md says how to read it.

    Example: logitcask bench kernels --device cpu --section logits
    """
    if not SCRIPT.exists():
        raise LogitcaskError(
            f"there is no {SCRIPT.name} beside this installation: benchmarks are not installed",
            hint="clone the repository and run `python bench/bench_kernels.py` in it",
        )
    # A script finds what stands beside it, which the variable would forbid.
    environment = {**os.environ, "PYTHONSAFEPATH": ""}
    done = subprocess.run([sys.executable, str(SCRIPT), *_words(options)], env=environment)
    sys.exit(done.returncode)


def _words(options: dict[str, Any]) -> list[str]:
    """The options that were given, as the script takes them."""
    words = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value not in (None, False, ()):
            for each in value if isinstance(value, tuple) else (value,):
                words += [f"--{name}", str(each)]
    return words
