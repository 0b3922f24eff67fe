"""A loop whose stages run at once, against one after the other, and against a live teacher.

Run: .venv/bin/python bench/bench_pipeline.py [--quick]          (about ten minutes on two cores)

    synchronous    `distill` in one process: sample, score, update
    asynchronous   the roles of `distill` in three processes, max_age 3
    live           the teacher in the training loop: TRL's DistillationTrainer (pip install trl),
                   without TRL a plain loop; the row names which
    ablations      several trainings from one store, against as many live loops

The task is that of `logitcask demo --fast`, with its two models, which are trained first and kept
in build/bench_pipeline. Sampling, scoring and updates are real; each is made longer by sleeping, up
to the seconds of --stages for a round. The sleep stands for GPUs that work elsewhere: on this
machine all stages share two cores, and without it there would be nothing to overlap. Scoring takes
as long as an update then. Wall times begin with the first unit and end with the last update; the
start of the processes, a column of its own, is not in them.

Bars: asynchronous over synchronous, over its slowest stage with the fill, the accuracy of both over
three seeds, and the ablations. Appends a row to bench/results/pipeline.jsonl; `python
bench/report.py` writes its tables and its picture.
"""

import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pipeline_live
import results
from pipeline_loops import (
    Scale,
    ablated,
    asynchronous,
    calibrated,
    live,
    made_models,
    synchronous,
)
from results import ROOT

FULL = Scale(rounds=16, prompts=32, samples=2, seeds=3, trainings=3, max_age=3)
QUICK = Scale(rounds=4, prompts=4, samples=2, seeds=1, trainings=2, max_age=2, trained=False)
STAGES = {False: (1.0, 2.0, 2.0), True: (0.1, 0.2, 0.2)}
"""Quick? -> seconds of sampling, scoring and the update of a round."""
MOST = {"overlap": 0.60, "floor": 1.10, "accuracy": 1.0, "ablations": 1.05}
PACKAGES = ("torch", "transformers", "trl")


def main(arguments: list[str]) -> None:
    """Run all loops, and append the row."""
    parser = results.option_parser(__doc__, "pipeline")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="Few short rounds, untrained models: a trial, in which no bar has a meaning.",
    )
    parser.add_argument("--stages", metavar="S,S,S", help="Seconds of a round's stages.")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    scale = QUICK if options.quick else FULL
    target = STAGES[options.quick]
    if options.stages:
        target = tuple(map(float, options.stages.split(",")))
    begun = time.monotonic()
    folder = ROOT / "build" / "bench_pipeline" / ("quick" if options.quick else "full")
    models = made_models(folder / "models", trained=scale.trained)
    work = folder / "runs"
    shutil.rmtree(work, ignore_errors=True)
    measured = measure(scale, target, models, work)
    row = {
        "bench": "pipeline",
        "command": " ".join(["python bench/bench_pipeline.py", *arguments]),
        "seconds": round(time.monotonic() - begun),
        "scale": dataclasses.asdict(scale),
        "target_s": target,
        **measured,
        "bars": bars(measured),
        **results.environment(*PACKAGES),
    }
    for each in row["bars"]:
        print(f"{'met ' if each['met'] else 'MISSED'}  {each['bar']}: {each['value']:.4g}")
    results.append(options.out, row)


def measure(scale: Scale, target: tuple[float, ...], models: Path, work: Path) -> dict[str, Any]:
    """Run every loop. target: seconds of a round's stages."""
    alone, added = calibrated(scale, target, models, work / "calibration")
    show("calibration", {"real_s": alone, "added_s": str(added)})
    found: dict[str, list[dict[str, Any]]] = {"synchronous": [], "asynchronous": []}
    for seed in range(scale.seeds):
        # In turn, so that a machine that slows down slows both.
        for kind, run in (("synchronous", synchronous), ("asynchronous", asynchronous)):
            found[kind].append(run(scale, added, models, work / f"{kind}-{seed}", seed))
            show(kind, found[kind][-1])
    lively = live(scale, added, models, work / "live")
    show("live", lively)
    trained = ablated(scale, added, models, work / "ablations")
    show("ablations", trained)
    return {
        "real_s": alone,
        "added_s": dataclasses.asdict(added),
        "loops": found,
        "live": lively,
        "live_by": f"TRL {pipeline_live.trl_version()}" if pipeline_live.trl_version() else "plain",
        "ablations": trained,
    }


def bars(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the bars, the one that is nearest to its limit, or beyond it, first."""
    turns, at_once = (measured["loops"][kind] for kind in ("synchronous", "asynchronous"))
    ratios = [b["wall_s"] / a["wall_s"] for a, b in zip(turns, at_once, strict=True)]
    found = [
        limited(
            "asynchronous over synchronous, wall time, worst seed",
            max(ratios),
            MOST["overlap"],
        ),
        limited(
            "asynchronous over its slowest stage and the fill, worst seed",
            max(each["wall_s"] / each["floor_s"] for each in at_once),
            MOST["floor"],
        ),
        limited(
            "difference of the accuracies over two standard errors",
            difference([e["accuracy"] for e in turns], [e["accuracy"] for e in at_once]),
            MOST["accuracy"],
        ),
        limited(
            f"{measured['ablations']['trainings']} ablations over (r + s + t) + (N - 1) t",
            ablation_cost(measured["ablations"]),
            MOST["ablations"],
        ),
    ]
    return sorted(found, key=lambda each: each["of_limit"], reverse=True)


def limited(text: str, value: float, most: float) -> dict[str, Any]:
    """Return the row of a bar with an upper limit."""
    return {
        "bar": f"{text} <= {most:g}",
        "value": value,
        "met": value <= most,
        "of_limit": value / most,
    }


def difference(a: list[float], b: list[float]) -> float:
    """Return |mean a - mean b| over two standard errors of that difference.

    One value each, or no spread at all: 0 where they are equal, else infinite.
    """
    gap = abs(statistics.fmean(a) - statistics.fmean(b))
    if min(len(a), len(b)) > 1:
        error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
        if error:
            return gap / (2 * error)
    return 0.0 if gap == 0 else math.inf


def ablation_cost(found: dict[str, Any]) -> float:
    """Return the wall time of all trainings from one store over that of their stages.

    The stages: rollout and score once, and each training.
    """
    stages = found["rollout_s"] + found["score_s"] + found["trainings"] * found["train_s"]
    return float(found["wall_s"] / stages)


def show(name: str, found: dict[str, Any]) -> None:
    """Print the figures of one loop, without its picture."""
    short = {key: each for key, each in found.items() if key not in ("picture", "queue")}
    print(name, json.dumps(short, default=lambda value: f"{value:.3g}"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
