"""`logitcask bench`: its options, and the run of the script in the checkout."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from logitcask.cli import bench
from logitcask.cli.main import run


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z]+", text))


def test_command_and_script_have_the_same_options() -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": ""}
    command = [sys.executable, str(bench.SCRIPT), "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert {f"--{option.name}" for option in bench.kernels.params} | {"--help"} == flags(
        result.stdout
    )
    choices = {option.name: getattr(option.type, "choices", ()) for option in bench.kernels.params}
    for name in ("preset", "section", "device", "dtype"):
        assert f"--{name} {{{','.join(choices[name])}}}" in result.stdout


def test_runs_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    file = tmp_path / "rows.jsonl"
    args = "--device cpu --quick --section topk --shape 4,300,1,1,3 --shape 2,300,1,1,3"
    assert run(["bench", "kernels", *args.split(), "--out", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    ran = [(row["section"], row["provider"], row["shape"]["T"]) for row in rows]
    assert ran == [("topk", name, T) for T in (4, 2) for name in ("ours", "torch")]
    assert "topk" in capfd.readouterr().out


def test_the_exit_code_is_that_of_the_script() -> None:
    assert run(["bench", "kernels", "--providers", "nobody"]) == 2


def test_an_installation_without_the_scripts_is_an_error_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SCRIPT", tmp_path / "bench_kernels.py")
    assert run(["bench", "kernels"]) == 1
    error = capfd.readouterr().err
    assert "benchmarks are not installed" in error
    assert "hint: clone the repository" in error
