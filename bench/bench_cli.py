"""Wall time of `--help` of every command, as a whole process; the aim is 0.4 s.

Run: .venv/bin/python bench/bench_cli.py [RUNS]      (default: 7)
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

AIM_S = 0.4
VERBS = ["", "rollout", "score", "train", "distill", "store", "demo", "bench"]


def seconds(verb: str) -> float:
    """Return the wall seconds of one `logitcask VERB --help`."""
    command = [str(Path(sys.executable).with_name("logitcask")), *verb.split(), "--help"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(arguments: list[str]) -> None:
    """Print a row for each command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="?", type=int, default=7, help="Runs of each command.")
    runs = parser.parse_args(arguments).runs
    for verb in VERBS:
        seconds(verb)  # the first run pays for cold files
    times: dict[str, list[float]] = {verb: [] for verb in VERBS}
    for _ in range(runs):
        for verb in VERBS:  # interleaved, so that a slow minute affects all
            times[verb].append(seconds(verb))
    for verb, found in times.items():
        row = {
            "bench": "cli_help",
            "verb": verb or "(none)",
            "median_s": round(statistics.median(found), 3),
            "max_s": round(max(found), 3),
            "runs": runs,
            "within_aim": statistics.median(found) <= AIM_S,
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main(sys.argv[1:])
