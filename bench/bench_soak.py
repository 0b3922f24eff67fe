"""The long tests of stores, workers, runs and models: operations, and the time for them.

Run: make soak      (or .venv/bin/python bench/bench_soak.py [--out FILE] [TEST ...])

A row with every count is appended to bench/results/soak.jsonl if all tests have passed.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results
from results import ROOT

TESTS = [
    *("tests/engine/store", "tests/engine/workers/test_worker.py", "tests/kernels/test_aot.py"),
    *("tests/engine/training/test_damaged_run.py", "tests/engine/packing/test_reading.py"),
    "tests/engine/distill/test_processes.py",
    "tests/models",
]


def main(arguments: list[str]) -> int:
    """Run the tests; return pytest's exit code."""
    parser = results.option_parser(__doc__, "soak")
    parser.add_argument("tests", nargs="*", default=TESTS, metavar="TEST", help="[default: all]")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        counts_file = Path(folder) / "counts.jsonl"
        start = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-q"]
        done = subprocess.run(
            [*command, *options.tests],
            cwd=ROOT,
            env={**os.environ, "LOGITCASK_SOAK": str(counts_file)},
            stdout=subprocess.PIPE,
            text=True,
        )
        print(done.stdout)
        if done.returncode:
            return done.returncode
        counts: dict[str, list[int]] = {}
        for row in results.read(counts_file):
            counts.setdefault(row["test"].split("::")[-1], []).append(row["count"])
    passed = re.search(r"(\d+) passed", done.stdout)
    results.append(
        options.out,
        {
            "bench": "soak",
            "command": "make soak",
            "passed": int(passed[1]) if passed else 0,
            "seconds": round(time.monotonic() - start),
            "counts": {test: sorted(each) for test, each in sorted(counts.items())},
            **results.environment("zarr", "numcodecs", "pcodec", "obstore", "numpy"),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
