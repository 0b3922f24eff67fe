"""The tests of the store and its workers with the long counts: what was done, how often, and how
long it took.

Run: make soak      (or .venv/bin/python bench/bench_soak.py [pytest argument ...])

A row with every count is appended to bench/results/soak.jsonl when all have passed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results
from results import ROOT

TESTS = ["tests/engine/store", "tests/engine/workers/test_worker.py"]


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "counts.jsonl"
        start = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-q"]
        tests = arguments or TESTS
        done = subprocess.run(
            [*command, *tests],
            cwd=ROOT,
            env={**os.environ, "LOGITCASK_SOAK": str(told)},
            stdout=subprocess.PIPE,
            text=True,
        )
        print(done.stdout)
        if done.returncode:
            return done.returncode
        counts: dict[str, list[int]] = {}
        for line in told.read_text().splitlines():
            row = json.loads(line)
            counts.setdefault(row["test"].split("::")[-1], []).append(row["count"])
    passed = re.search(r"(\d+) passed", done.stdout)
    results.append(
        "soak",
        {
            "bench": "soak",
            "command": "make soak",
            "passed": int(passed[1]) if passed else 0,
            "seconds": round(time.monotonic() - start),
            "counts": {test: sorted(each) for test, each in sorted(counts.items())},
            **results.circumstances("zarr", "numcodecs", "pcodec", "obstore", "numpy"),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
