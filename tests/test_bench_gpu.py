"""The scripts for a GPU: checks and sweep in the interpreter, order, and a run that is stopped."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        engine = name.startswith("logitcask.") and not name.startswith("logitcask.kernels")
        if engine or name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"a GPU's machine has no {name}")
ABSENT = ("zarr", "numcodecs", "pcodec", "pydantic", "transformers", "matplotlib", "google_crc32c")
sys.meta_path.insert(0, Absent())
"""
"""Hides what a machine with nothing but torch, triton and numpy has not."""
RUN_MAIN = "import {0}\nsys.exit({0}.main(sys.argv[1:]))"


def interpreted(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in another process, with the scripts on the path and kernels interpreted."""
    begin = (
        f"{BARE}"
        f"sys.path.append({str(ROOT / 'tests')!r})\n"
        "from fast_interpreter import patch_language_once\n"
        f"sys.path[-1:] = [{str(BENCH)!r}]\n"
        "patch_language_once()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", begin + code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )


def read(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_kernel_passes_the_check_that_a_gpu_gets(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    done = interpreted(RUN_MAIN.format("gpu_check"), "--device", "cpu", "--out", file)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(file)
    assert [row["status"] for row in rows] == ["ok"] * len(rows)
    assert sum(row["checks"] for row in rows) > 150


def test_the_check_finds_a_wrong_kernel_and_goes_on_after_a_failed_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    code = (
        "import gpu_check, gpu_checks\n"
        "right = gpu_checks.row_stats\n"
        "gpu_checks.row_stats = lambda z: right(z)._replace(entropy=right(z).entropy * 1.001)\n"
        "del gpu_checks.topk_select\n"
        "plan = gpu_check.plan\n"
        "gpu_check.plan = lambda part, sizes: plan(part, sizes)[:3]\n"
        "sys.exit(gpu_check.main(['--device', 'cpu', '--part', 'first', '--out', sys.argv[1]]))"
    )
    done = interpreted(code, file)
    assert done.returncode == 1, done.stderr
    assert "WRONG  row_stats, iid: entropy" in done.stdout
    assert "WRONG  row_stats, iid: log-sum-exp" not in done.stdout
    statistics, selection, gradient = read(file)
    assert statistics["status"] == "wrong"
    assert selection["status"].startswith("failed: NameError")
    assert (gradient["status"], gradient["checks"]) == ("ok", 2)


def test_every_launch_setting_of_the_sweep_gives_the_same_answer(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    done = interpreted(RUN_MAIN.format("gpu_sweep"), "--device", "cpu", "--out", file)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(file)
    assert {row["status"] for row in rows} == {"ok"}, done.stdout
    assert {row["what"] for row in rows} == {"scan", "grad", "select", "chunks", "few", "forms"}
    assert "stages=3" in done.stdout


@pytest.fixture
def gpu_run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script of all stages."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_run")


class Machine:
    """Runs stages on a clock of its own."""

    def __init__(self, seconds: dict[str, float], code: int = 0) -> None:
        self.now, self.seconds, self.code = 0.0, seconds, code
        self.started: list[list[str]] = []

    def call(self, words: list[str], variables: dict[str, str], most: float) -> int | None:
        words = [Path(words[1]).name, *words[2:]]
        self.started.append(words)
        budget = float(words[words.index("--budget") + 1])
        takes = self.seconds.get(words[0], budget)
        self.now += min(takes, most)
        return None if takes > most else self.code


def outcomes(gpu_run: ModuleType, machine: Machine, budget: float) -> list[str]:
    """Return the outcome of each stage."""
    stages = gpu_run.run("cuda", budget, Path("rows.jsonl"), machine.call, lambda: machine.now)
    return [outcome for _, outcome in stages]


ORDER = ["gpu_check.py", "bench_kernels.py", "gpu_check.py", "gpu_sweep.py"]
ORDER += ["bench_kernels.py", "bench_kernels.py"]


def test_stages_run_in_order_and_end_within_the_budget(gpu_run: ModuleType) -> None:
    for seconds in ({}, {"gpu_check.py": 20.0}, {"bench_kernels.py": 9e9}, {"gpu_check.py": 9e9}):
        machine = Machine(seconds)
        found = outcomes(gpu_run, machine, 540)
        assert [words[0] for words in machine.started] == ORDER[: len(machine.started)]
        assert len(machine.started) >= 4, "a stage that takes too long leaves time to the next"
        assert machine.now <= 540
        late = [outcome == "left out, the budget was spent" for outcome in found]
        assert late == [i >= len(machine.started) for i in range(len(ORDER))]
    parts = [words[words.index("--part") + 1] for words in machine.started if "--part" in words]
    assert parts == ["first", "wider"]


def test_a_failed_stage_does_not_keep_the_others_from_running(gpu_run: ModuleType) -> None:
    machine = Machine(dict.fromkeys(ORDER, 1.0), code=1)
    assert outcomes(gpu_run, machine, 540) == ["failed: exit code 1"] * len(ORDER)
    assert outcomes(gpu_run, Machine({}), 10) == ["left out, the budget was spent"] * len(ORDER)


def test_a_run_that_is_stopped_ends_its_stage_and_shows_its_rows(tmp_path: Path) -> None:
    code = (
        f"import sys\nsys.path.append({str(BENCH)!r})\n"
        "import gpu_run\n"
        "gpu_run.command = lambda *rest: ([sys.executable, '-Sc', 'print(1, flush=True); "
        "import time; time.sleep(3600)'], {})\n"
        "gpu_run.subprocess.run = lambda words, check: print('summary of', words[2])\n"
        "sys.exit(gpu_run.main(['--out', sys.argv[1]]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "rows.jsonl"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "1\n":
            break
    process.send_signal(signal.SIGTERM)
    assert f"summary of {tmp_path}" in process.communicate(timeout=600)[0], "the stage was ended"
    assert process.returncode == 128 + signal.SIGTERM


def test_every_op_is_checked_first_at_a_production_shape(gpu_run: ModuleType) -> None:
    gpu_check = importlib.import_module("gpu_check")
    steps = gpu_check.plan("first", gpu_check.SIZES["cuda"])
    ops = ["row_stats", "topk_select", "row_grad", "sparse_kl", "linear_sparse_kl"]
    ops = [*ops, "indexed_linear"] * 2 + ["compiled"] * 3
    assert [step.what.split()[0] for step in steps] == ops
    assert all(("V=151936" in step.what) == (i < 6) for i, step in enumerate(steps))
    assert {str(step.dtype) for step in steps} == {"torch.bfloat16"}
    large = [s for s in gpu_check.plan("wider", gpu_check.SIZES["cuda"]) if s.needs_bytes]
    assert [step.what for step in large] == ["beyond 2^31"]
    assert large[0].needs_bytes > 2**32


def test_a_point_lies_below_the_roof_by_its_share_of_the_limit(gpu_run: ModuleType) -> None:
    roofline = importlib.import_module("report_roofline")
    limits = importlib.import_module("kernel_limits")
    shape = {"T": 4096, "V": 151_936, "H": 2048, "K": 64, "k": 64}
    rates = limits.Rates(copy_bytes_per_s=4e12, flop_per_s=7e14)
    at = roofline.Shape(**shape)
    for task in ("logits", "topk", "hidden", "teacher", "teacher rows", "teacher frozen"):
        ms = 2 * limits.limit_ms(task, at, 2, rates)
        row = {"provider": "ours", "task": task, "shape": shape, "dtype": "bfloat16", "ms": ms}
        row |= {"copy_gb_s": 4000.0, "gemm_tflop_s": 700.0, "ours": True, "status": "ok"}
        (point,) = roofline.points([row])
        assert point["y"] / point["roof"] == pytest.approx(0.5), task
    assert set(roofline.NAMES) == set(limits.TASKS)


def test_a_commit_is_named_where_there_is_no_git(
    gpu_run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert importlib.import_module("results").code_commit() == "unknown"
    monkeypatch.setenv("COMMIT", "0123456789ab")
    assert importlib.import_module("results").code_commit() == "0123456789ab"


def test_the_gpu_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(BENCH / "gpu.sh")], check=True)
