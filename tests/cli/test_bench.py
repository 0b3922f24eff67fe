"""`logitcask bench` runs the checkout's script with the options that it was given."""

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


def test_the_verb_and_the_script_have_the_same_options() -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": ""}
    command = [sys.executable, str(bench.SCRIPT), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert {f"--{option.name}" for option in bench.kernels.params} | {"--help"} == flags(
        done.stdout
    )
    choices = {option.name: getattr(option.type, "choices", ()) for option in bench.kernels.params}
    for name in ("preset", "section", "device", "dtype"):
        assert f"--{name} {{{','.join(choices[name])}}}" in done.stdout


def test_runs_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    file = tmp_path / "rows.jsonl"
    asked = "--device cpu --quick --section topk --shape 4,300,1,1,3 --shape 2,300,1,1,3"
    assert run(["bench", "kernels", *asked.split(), "--out", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    ran = [(row["section"], row["provider"], row["shape"]["T"]) for row in rows]
    assert ran == [("topk", name, T) for T in (4, 2) for name in ("ours", "torch")]
    assert "topk" in capfd.readouterr().out


def test_the_scripts_exit_code_is_the_verbs() -> None:
    assert run(["bench", "kernels", "--providers", "nobody"]) == 2


def test_an_installation_without_the_folder_says_where_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SCRIPT", tmp_path / "bench_kernels.py")
    assert run(["bench", "kernels"]) == 1
    error = capfd.readouterr().err
    assert "benchmarks are not installed" in error
    assert "hint: clone the repository" in error
