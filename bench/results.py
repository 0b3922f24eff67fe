"""What every benchmark's row says of the code and the machine, and where rows are kept."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


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
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def cpu() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def code_commit() -> str:
    """The newest commit that touches what is measured; rows and texts may change meanwhile."""
    code = ["engine", "kernels", "cli"]
    newest = git("log", "-1", "--format=%H", "--", *code)[:12]
    return f"{newest}-dirty" if git("status", "--porcelain", "--", *code) else newest


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()
