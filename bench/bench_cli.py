"""How long `--help` of every verb takes, as a whole process; the aim is 0.4 s.

Run: .venv/bin/python bench/bench_cli.py [RUNS]
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

AIM_S = 0.4
VERBS = ["", "rollout", "score", "train", "distill", "store", "demo", "bench"]


def seconds(verb: str) -> float:
    """Wall seconds of one `logitcask VERB --help`."""
    command = [str(Path(sys.executable).with_name("logitcask")), *verb.split(), "--help"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(runs: int) -> None:
    for verb in VERBS:
        seconds(verb)  # the first run pays for cold files
    taken: dict[str, list[float]] = {verb: [] for verb in VERBS}
    for _ in range(runs):
        for verb in VERBS:  # interleaved, so that a slow minute hits all alike
            taken[verb].append(seconds(verb))
    for verb, times in taken.items():
        row = {
            "bench": "cli_help",
            "verb": verb or "(none)",
            "median_s": round(statistics.median(times), 3),
            "max_s": round(max(times), 3),
            "runs": runs,
            "within_aim": statistics.median(times) <= AIM_S,
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
