"""The demo's gap recovery over seeds and objectives, and the time of a second run.

Run: .venv/bin/python bench/bench_demo.py [SEED ...]      (default: 0 1 2; about 8 minutes a seed)

Each seed has a folder below build/bench_demo, so the objectives of a seed share one store, and a
stopped run continues. Each run appends its row to bench/results/demo.jsonl at once; a row of the
same code (the newest commit that touches it) is not made again.
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
"""Aims of the gap recovery over seeds, and of the speedup of a run from a filled store."""


def main(arguments: list[str]) -> None:
    """Run the missing demos, and print a summary."""
    parser = results.option_parser(__doc__, "demo")
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2], help="[default: 0 1 2]")
    options = parser.parse_args(arguments)
    seeds, commit = options.seeds, results.code_commit()
    for seed in seeds:
        for objective in OBJECTIVES:
            if not any(
                (row["seed"], row["objective"], row["commit"]) == (seed, objective, commit)
                for row in results.read(options.out)
            ):
                results.append(options.out, run_demo(seed, objective, commit))
    rows = [row for row in results.read(options.out) if row["commit"] == commit]
    print_summary([row for row in rows if row["seed"] in seeds])


def run_demo(seed: int, objective: str, commit: str) -> dict[str, Any]:
    """Run `logitcask demo`; return its row."""
    out = ROOT / "build" / "bench_demo" / f"{commit}-seed{seed}"
    logitcask = str(Path(sys.executable).with_name("logitcask"))
    options = ["--objective", objective, "--seed", str(seed), "--format", "json"]
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    done = subprocess.run(
        [logitcask, "demo", "--out", str(out), *options], check=True, stdout=subprocess.PIPE
    )
    return {
        "bench": "demo",
        "command": " ".join(["logitcask", "demo", *options]),
        "seed": seed,
        "objective": objective,
        "wall_s": round(time.perf_counter() - start, 1),
        **json.loads(done.stdout),
        **results.environment(*PACKAGES),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


def print_summary(made: list[dict[str, Any]]) -> None:
    """Print the gap recovery of every objective, and the speedup of a filled store."""
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
    main(sys.argv[1:])
