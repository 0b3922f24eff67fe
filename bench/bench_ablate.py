"""Six objectives by three seeds of training from the store of one demo.

Run: .venv/bin/python bench/bench_ablate.py [SEEDS]      (default: 3; ten seconds a training)

The demo, its store and the runs are below build/bench_ablate, so a stopped run continues. The
evaluation is greedy on the demo's own test problems, like the accuracies of the demo's models. One
row is appended to bench/results/ablate.jsonl at the end.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import results
from results import ROOT

from logitcask.engine.demo.scale import FAST
from logitcask.engine.demo.task import Task, write_prompts

OBJECTIVES = ["overlap", "opd", "opd_released", "forward_kl", "gkd", "sampled_token"]
PACKAGES = ["torch", "transformers", "zarr", "pcodec"]
SEED = 0
"""Seed of the demo: all trainings start from one student and one store."""
CONFIG = """\
[student]
model = "{demo}/student"

[store]
url = "{demo}/store"
rollouts = "main"

[train]
teacher = "teacher"
learning_rate = 1e-3
lr_scheduler_type = "cosine"
warmup_steps = 20
adam_beta2 = 0.98
pack_length = {tokens}
gradient_accumulation_steps = {accumulation}
save_steps = 1000

[eval]
prompts = "{prompts}"
grader = "logitcask.engine.demo.task:solves"
n = 1
temperature = 0
top_p = 1.0
max_new_tokens = {new_tokens}

[run]
device = "cpu"
dtype = "float32"
"""
"""The demo's own training, with evaluation."""


def main(arguments: list[str]) -> None:
    """Train all objectives and append the row."""
    parser = results.option_parser(__doc__, "ablate")
    parser.add_argument("seeds", nargs="?", type=int, default=3, help="[default: 3]")
    parsed = parser.parse_args(arguments)
    seeds = parsed.seeds
    folder = ROOT / "build" / "bench_ablate" / results.code_commit()
    folder.mkdir(parents=True, exist_ok=True)
    demo = folder / "demo"
    logitcask("demo", "--fast", "--seed", str(SEED), "--out", str(demo))
    teacher = json.loads((demo / "demo.json").read_text())["accuracy"]["teacher"]
    config = write_config(folder, demo)
    options = ["--vary", f"objective={','.join(OBJECTIVES)}", "--seeds", str(seeds)]
    options += ["--eval-teacher-accuracy", str(teacher)]
    start = time.perf_counter()
    report = logitcask("ablate", str(config), *options, "--out", str(folder / "runs"))
    row = {
        "bench": "ablate",
        "command": " ".join(["logitcask", "ablate", config.name, *options]),
        "wall_s": round(time.perf_counter() - start, 1),
        "teacher": teacher,
        **{name: report[name] for name in report if name != "out"},
        **results.environment(*PACKAGES),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }
    results.append(parsed.out, row)
    print((folder / "runs" / "ablate.md").read_text())


def write_config(folder: Path, demo: Path) -> Path:
    """Write the training's configuration and its evaluation problems."""
    task, file = Task(FAST.digits), folder / "evaluation.jsonl"
    write_prompts(file, task.draw("evaluation", FAST.evaluation, SEED))
    config = folder / "train.toml"
    config.write_text(
        CONFIG.format(
            demo=demo,
            prompts=file,
            tokens=FAST.pack_length,
            accumulation=FAST.accumulation,
            new_tokens=task.max_new_tokens,
        )
    )
    return config


def logitcask(*arguments: str) -> dict[str, Any]:
    """Return the JSON result of a command."""
    program = str(Path(sys.executable).with_name("logitcask"))
    done = subprocess.run(
        [program, *arguments, "--format", "json"], check=True, stdout=subprocess.PIPE
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
