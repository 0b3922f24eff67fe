"""How much of the gap the demo closes, over seeds and objectives, and what a second run costs.

Run: .venv/bin/python bench/bench_demo.py [SEED ...]      (default: 0 1 2; about 8 minutes a seed)

Every seed has a folder of its own below build/bench_demo, so the objectives of a seed share one
store, and a bench that was stopped goes on. A row is appended to bench/results/demo.jsonl as soon
as it is there; rows of the same code (the newest commit that touches it) are not made again.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import results
from results import ROOT

OBJECTIVES = ["overlap", "opd", "teacher_topk", "forward_kl"]
PACKAGES = ["torch", "transformers", "zarr", "pcodec"]
MEDIAN_AIM, LEAST_AIM, FASTER_AIM = 0.75, 0.65, 2.0
"""Of the gap recovery over seeds, and of a run from a store against one that has to fill it."""


def main(seeds: list[int]) -> None:
    commit = results.code_commit()
    for seed in seeds:
        for objective in OBJECTIVES:
            if not any(
                (row["seed"], row["objective"], row["commit"]) == (seed, objective, commit)
                for row in results.read("demo")
            ):
                results.append("demo", measured(seed, objective, commit))
    spread(
        [row for row in results.read("demo") if row["commit"] == commit and row["seed"] in seeds]
    )


def measured(seed: int, objective: str, commit: str) -> dict[str, Any]:
    """One run of `logitcask demo` as a process of its own."""
    out = ROOT / "build" / "bench_demo" / f"{commit}-seed{seed}"
    logitcask = str(Path(sys.executable).with_name("logitcask"))
    options = ["--objective", objective, "--seed", str(seed), "--format", "json"]
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    answer = subprocess.run(
        [logitcask, "demo", "--out", str(out), *options], check=True, stdout=subprocess.PIPE
    )
    return {
        "bench": "demo",
        "command": " ".join(["logitcask", "demo", *options]),
        "seed": seed,
        "objective": objective,
        "wall_s": round(time.perf_counter() - start, 1),
        **json.loads(answer.stdout),
        **results.circumstances(*PACKAGES),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


def spread(made: list[dict[str, Any]]) -> None:
    """Gap recovery of every objective over the seeds, and how much a filled store saves."""
    for objective in OBJECTIVES:
        gaps = sorted(row["gap_recovery"] for row in made if row["objective"] == objective)
        middle = statistics.median(gaps)
        print(
            f"{objective:<13} gap recovery {' '.join(f'{gap:.1%}' for gap in gaps)}, "
            f"median {middle:.1%}, aims met: {middle >= MEDIAN_AIM and gaps[0] >= LEAST_AIM}"
        )
    for seed in sorted({row["seed"] for row in made}):
        of_seed = [row["seconds"] for row in made if row["seed"] == seed]
        whole = [s["rollout"] + s["score"] + s["train"] for s in of_seed if s["rollout"]]
        again = [s["train"] for s in of_seed if not s["rollout"]]
        if whole and again:
            faster = whole[0] / statistics.median(again)
            print(
                f"seed {seed}: rollout + score + train {whole[0]:.1f} s, another objective "
                f"{statistics.median(again):.1f} s: {faster:.1f} times faster, "
                f"aim met: {faster >= FASTER_AIM}"
            )


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [0, 1, 2])
