"""The experiments of arXiv 2604.13016 in miniature: does each of its claims show?

Run: .venv/bin/python bench/bench_paper.py [--seeds 3] [--jobs 2]      (about 15 minutes a seed)

A seed has its own models (paper_family.py), distillations (paper_runs.py) and probes
(paper_probes.py), all on one thread and in build/bench_paper/SEED: a stopped run continues, and
after a change of the code the folder has to go.
The claims and the rule of the verdicts are in paper_claims.py. One row for each seed and experiment
is appended to bench/results/paper.jsonl as soon as all that the experiment needs is there.
`python bench/report.py` writes the table.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import results
import torch
from paper_claims import CLAIMS, NEEDS
from paper_family import Family
from paper_probes import PROBES, probe
from paper_runs import run
from results import ROOT

PACKAGES = ["torch", "transformers"]


def main(arguments: list[str]) -> None:
    """Run the missing seeds, in several processes if asked to."""
    parser = results.option_parser(__doc__, "paper")
    parser.add_argument("--seeds", type=int, default=3, help="Seeds 0, 1, ... [default: 3]")
    parser.add_argument("--seed", type=int, help="Run this seed alone.")
    parser.add_argument("--jobs", type=int, default=1, help="Seeds at once. [default: 1]")
    parser.add_argument("--experiments", default=",".join(NEEDS), help="[default: all]")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        torch.set_num_threads(1)
        run_seed(options.seed, options.experiments.split(","), options.out)
        return
    command = [sys.executable, __file__, "--out", str(options.out)]
    command += ["--experiments", options.experiments, "--seed"]
    with ThreadPoolExecutor(options.jobs) as pool:
        ends = pool.map(lambda seed: subprocess.run([*command, str(seed)]), range(options.seeds))
    if failed := sum(end.returncode != 0 for end in ends):
        sys.exit(f"{failed} seeds failed: see above")


def run_seed(seed: int, experiments: list[str], out: Path) -> None:
    """Make what some experiments of a seed need, and append the row of each."""
    commit = results.code_commit()
    done = {
        row["experiment"]
        for row in results.read(out)
        if (row["seed"], row["commit"]) == (seed, commit)
    }
    folder = ROOT / "build" / "bench_paper" / str(seed)
    runs = folder / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    family = Family(folder / "models", seed)
    for experiment in experiments:
        if experiment in done:
            continue
        found: dict[str, Any] = {name: run(family, runs, name) for name in NEEDS[experiment]}
        if experiment in PROBES:
            found["probes"] = probe(family, runs, experiment)
        seconds = [each["cpu_s"] for each in found.values()]
        found["accuracy"] = family.accuracies
        row = {
            "bench": "paper",
            "command": "python bench/bench_paper.py",
            "experiment": experiment,
            "seed": seed,
            "claims": {c.text: c.measure(found) for c in CLAIMS if c.experiment == experiment},
            "cpu_s": {"models": family.seconds, "runs": dict(zip(found, seconds, strict=False))},
            "figures": {
                name: {k: v for k, v in each.items() if k != "curve"}
                for name, each in found.items()
            },
            **results.environment(*PACKAGES),
            "threads": 1,
        }
        results.append(out, row)
        print(f"seed {seed}: {experiment} {row['claims']}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
