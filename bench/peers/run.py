"""The tests of other projects' distillation losses, with our ops in the place of theirs.

Run: python bench/peers/run.py [--peer NAME] [--checkout FOLDER] [--packages FOLDER] [--device
cpu|cuda]

A checkout is a clone of the project; its wheels hold no tests. With --peer, --checkout is that
clone; without, a folder of clones under the names of their repositories (or $PEER_CHECKOUTS).
--packages is a folder of pip install --target for what a project imports and this environment
lacks. Each project runs in a process of its own: an adapter of ours (adapters.py) replaces its
function, and its tests, sizes and tolerances stay as they are, except that on a CPU shapes made for
a GPU shrink. Where a project has no test of its loss, *_values.py compares its function with ours.
Each run appends a row to --out with all cases that hold, and a count for each reason of the others.
Exit code 1 if a case fails.
"""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import results  # noqa: E402
from suites import SUITES, Suite  # noqa: E402

TIMEOUT_S = 3600


def main(arguments: list[str]) -> int:
    """Run the suites; return the exit code."""
    parser = results.option_parser(__doc__, "peers")
    parser.add_argument("--peer", choices=list(SUITES), help="Suite to run. [default: all]")
    parser.add_argument(
        "--checkout",
        type=Path,
        metavar="FOLDER",
        default=os.environ.get("PEER_CHECKOUTS"),
        help="[default: $PEER_CHECKOUTS]",
    )
    parser.add_argument(
        "--packages",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="Put it on the path; repeatable. [default: none]",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="[default: cpu]")
    options = parser.parse_args(arguments)
    if options.checkout is None:
        parser.error("--checkout is missing: clone the project, and give its folder")
    failed = 0
    for name in [options.peer] if options.peer else SUITES:
        suite = SUITES[name]
        folder = Path(options.checkout).resolve()
        if not options.peer:
            folder /= suite.repository
        row = run(name, suite, folder, options.packages, options.device)
        results.append(options.out, row)
        print(text(row), flush=True)
        failed += row["fail"]
    return 1 if failed else 0


def run(name: str, suite: Suite, folder: Path, packages: list[Path], device: str) -> results.Row:
    """Run one suite; return its row."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "cases.jsonl"
        path = [HERE, HERE.parent, results.ROOT / ".src", folder / suite.source, folder]
        path[3:3] = [each.resolve() for each in packages]
        variables = {
            "PEER": name,
            "PEER_OUT": str(out),
            "PEER_DEVICE": device,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "PYTHONSAFEPATH": "1",
            "TORCHDYNAMO_DISABLE": "1" if device == "cpu" else "0",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        files = [
            HERE / file if (HERE / file).exists() else f"{folder}/{file}" for file in suite.files
        ]
        words = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider"]
        words += [
            "--noconftest",
            "-c",
            os.devnull,
            f"--rootdir={folder}",
            "--import-mode=importlib",
        ]
        words += ["-W", "ignore", "--basetemp", f"{scratch}/tmp", *map(str, files)]
        done = subprocess.run(
            words, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True,
            timeout=TIMEOUT_S,
        )  # fmt: skip
        cases = results.read(out)
    if not cases or done.returncode not in (0, 1):
        print(done.stdout[-3000:] + done.stderr[-3000:], file=sys.stderr)
    return summed(name, suite, cases) | {
        "bench": "peers",
        "peer_version": version(folder),
        "device": device,
        "pytest": done.returncode,
        **results.environment("torch", "triton"),
    }


def summed(name: str, suite: Suite, cases: list[results.Row]) -> results.Row:
    """Return the counts of a suite's cases by outcome and reason."""
    count = Counter(case["outcome"] for case in cases)
    reasons = Counter(case["reason"] for case in cases if case["outcome"] == "left out")
    return {
        "peer": name,
        "project": suite.project,
        "cases": len(cases),
        "hold": count["holds"],
        "fail": count["fails"],
        "left_out": [{"cases": n, "reason": reason} for reason, n in reasons.most_common()],
        "failed": [case for case in cases if case["outcome"] == "fails"],
    }


def version(folder: Path) -> str:
    """Return the commit of a checkout."""
    try:
        return results.git("-C", str(folder), "rev-parse", "HEAD")[:12]
    except (OSError, subprocess.CalledProcessError):
        return results.UNKNOWN


def text(row: results.Row) -> str:
    """Return a row as lines of the output."""
    lines = [f"{row['project']} {row['peer_version']}: {row['hold']} of {row['cases']} hold"]
    lines += [f"  {each['cases']} left out: {each['reason']}" for each in row["left_out"]]
    fails: dict[str, list[str]] = {}
    for case in row["failed"]:
        fails.setdefault(case["reason"], []).append(case["case"])
    lines += [f"  {len(c)} FAIL, {c[0]} for example: {reason}" for reason, c in fails.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
