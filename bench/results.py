"""What every benchmark's row says of the code and the machine, and where rows are kept."""

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
UNKNOWN = "unknown"
"""What a machine cannot tell: a commit without git, a driver without its tool."""


def circumstances(*packages: str) -> dict[str, Any]:
    """Commit, machine and versions."""
    return {
        "commit": code_commit(),
        "machine": f"{cpu()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def read(name: str) -> list[dict[str, Any]]:
    """The rows of bench/results/NAME.jsonl."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(name: str, row: dict[str, Any]) -> None:
    write(RESULTS / f"{name}.jsonl", row)


def write(file: Path, row: dict[str, Any]) -> None:
    """Adds one line; whoever is stopped keeps all that came before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")


def cpu() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def code_commit() -> str:
    """The newest commit that touches what is measured; rows and texts may change meanwhile.

    UNKNOWN where there is no git, or no repository.
    """
    code = ["engine", "kernels", "cli"]
    try:
        newest = git("log", "-1", "--format=%H", "--", *code)[:12]
        return f"{newest}-dirty" if git("status", "--porcelain", "--", *code) else newest
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def kernels_digest() -> str:
    """Of the kernels' source: says what ran where no commit can be told."""
    text = b"".join(file.read_bytes() for file in sorted((ROOT / "kernels").glob("*.py")))
    return hashlib.sha256(text).hexdigest()[:12]


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
