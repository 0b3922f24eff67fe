"""Six objectives by three seeds of training from the store of one demo: what separates, what not.

Run: .venv/bin/python bench/bench_ablate.py [SEEDS]      (default: 3; ten seconds a training)

The demo, its store and the runs are below build/bench_ablate, so a bench that was stopped goes on.
Evaluation is greedy on the demo's own test problems, as the accuracies of the demo's models are.
One row is appended to bench/results/ablate.jsonl at the end.
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
"""Of the demo: all trainings start from one student and one store."""
JOB = """\
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
"""The demo's own training, evaluated."""


def main(seeds: int) -> None:
    folder = ROOT / "build" / "bench_ablate" / results.code_commit()
    folder.mkdir(parents=True, exist_ok=True)
    demo = folder / "demo"
    logitcask("demo", "--fast", "--seed", str(SEED), "--out", str(demo))
    teacher = json.loads((demo / "demo.json").read_text())["accuracy"]["teacher"]
    made = job(folder, demo)
    options = ["--vary", f"objective={','.join(OBJECTIVES)}", "--seeds", str(seeds)]
    options += ["--eval-teacher-accuracy", str(teacher)]
    start = time.perf_counter()
    report = logitcask("ablate", str(made), *options, "--out", str(folder / "runs"))
    row = {
        "bench": "ablate",
        "command": " ".join(["logitcask", "ablate", made.name, *options]),
        "wall_s": round(time.perf_counter() - start, 1),
        "teacher": teacher,
        **{name: report[name] for name in report if name != "out"},
        **results.circumstances(*PACKAGES),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }
    results.append("ablate", row)
    print((folder / "runs" / "ablate.md").read_text())


def job(folder: Path, demo: Path) -> Path:
    """The training's file, and the problems that it is examined on."""
    task, file = Task(FAST.digits), folder / "evaluation.jsonl"
    write_prompts(file, task.draw("evaluation", FAST.evaluation, SEED))
    made = folder / "train.toml"
    made.write_text(
        JOB.format(
            demo=demo,
            prompts=file,
            tokens=FAST.pack_length,
            accumulation=FAST.accumulation,
            new_tokens=task.max_new_tokens,
        )
    )
    return made


def logitcask(*arguments: str) -> dict[str, Any]:
    """What the command says as a process of its own."""
    program = str(Path(sys.executable).with_name("logitcask"))
    answer = subprocess.run(
        [program, *arguments, "--format", "json"], check=True, stdout=subprocess.PIPE
    )
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
