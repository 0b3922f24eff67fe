"""Rows of the benchmarks: their files, and the code and machine that each row names."""

import argparse
import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
UNKNOWN = "unknown"
"""Value of a commit without git, of a driver without its tool, of a package that is not there."""


def option_parser(doc: str, name: str) -> argparse.ArgumentParser:
    """Return the parser of a script with this docstring and rows NAME.jsonl."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / f"{name}.jsonl",
        metavar="FILE",
        help=f"Rows are appended to it. [default: bench/results/{name}.jsonl]",
    )
    return parser


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Add the option of a time after which nothing starts."""
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        default=float("inf"),
        help="Start nothing after so many seconds, and list the rest as left out. [default: none]",
    )


def environment(*packages: str) -> Row:
    """Return commit, machine and versions."""
    return {
        "commit": code_commit(),
        "machine": f"{cpu()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return UNKNOWN


def read(file: Path) -> list[Row]:
    """Return the rows of a file; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(file: Path, row: Row) -> None:
    """Append a row in one write, so that a run that is stopped keeps all earlier rows whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as out:
        out.write(f"{json.dumps(row)}\n".encode())


def cpu() -> str:
    """Return the processor's name, or its architecture if the system does not name it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def code_commit() -> str:
    """Return the newest commit of the measured code, that of $COMMIT without a repository."""
    code = ["engine", "kernels", "cli"]
    try:
        newest = git("log", "-1", "--format=%H", "--", *code)[:12]
        return f"{newest}-dirty" if git("status", "--porcelain", "--", *code) else newest
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", UNKNOWN)


def kernels_digest() -> str:
    """Return a digest of the kernels' source, which names it also without git."""
    text = b"".join(file.read_bytes() for file in sorted((ROOT / "kernels").glob("*.py")))
    return hashlib.sha256(text).hexdigest()[:12]


def git(*arguments: str) -> str:
    """Return the output of a git command in the repository."""
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
