"""The kernel benchmark at tiny sizes: complete rows, correct gradients, bars that can fail."""

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
TINY = ["--device", "cpu", "--quick", "--shape", "9,500,16,6,5"]
ALWAYS = {
    "bench", "section", "provider", "shape", "status", "computes", "task", "ours", "device",
    "started", "dtype", "command", "copy_gb_s", "gemm_tflop_s", "threads", "commit", "kernels",
    "machine", "python", "torch", "triton",
}  # fmt: skip
MEASURED = {
    "ms", "ms_p20", "ms_p80", "runs", "peak_bytes", "limit_ms", "of_limit", "gradient_error",
}  # fmt: skip
SAME_LOSS = {
    ("logits", "ours"), ("logits", "eager"), ("logits", "trl"), ("hidden", "ours"),
    ("hidden", "eager"), ("indexed", "ours-dense"), ("indexed", "dense"),
    ("indexed", "dense-frozen"), ("indexed", "dense-live"), ("indexed", "gathered"),
    ("logits", "closed"), ("hidden", "closed"), ("indexed", "closed-live"),
    ("indexed", "gathered-rows"), ("indexed", "gathered-frozen"), ("indexed", "train"),
    ("indexed", "train-frozen-metrics"),
}  # fmt: skip
"""Providers that run anywhere and have a loss of ours."""


@dataclass(frozen=True)
class Result:
    """Exit code and output of a script."""

    returncode: int
    stdout: str
    stderr: str


Script = Callable[..., Result]


@pytest.fixture(scope="module", autouse=True)
def modules() -> Iterator[None]:
    """Put the folder of the scripts on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield


@pytest.fixture
def script(capfd: pytest.CaptureFixture[str]) -> Script:
    """Return a function that runs a script in this process."""

    def run_script(name: str, *arguments: object) -> Result:
        capfd.readouterr()
        code = run_main(name, *arguments)
        return Result(code, *capfd.readouterr())

    return run_script


def run_main(name: str, *arguments: object) -> int:
    """Return the exit code of a script's main function."""
    try:
        code = importlib.import_module(name).main(list(map(str, arguments)))
    except SystemExit as end:
        code = end.code
    return int(code or 0)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, modules: None) -> Path:
    """Return the file of one run of all sections."""
    file = tmp_path_factory.mktemp("kernels") / "rows.jsonl"
    assert run_main("bench_kernels", *TINY, "--out", file) == 0
    return file


def test_rows_are_complete_and_a_skipped_provider_has_a_reason(tiny: Path) -> None:
    rows = read(tiny)
    assert {row["section"] for row in rows} == {"logits", "hidden", "indexed", "topk"}
    for row in rows:
        assert row.keys() >= ALWAYS, row
        if row["status"] == "ok":
            assert row.keys() >= MEASURED
            assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
            assert row["runs"] >= 3
            assert row["of_limit"] > 0
        else:
            assert row["status"].startswith(("not installed: ", "needs a GPU", "slow on a CPU"))
    status = {(row["section"], row["provider"]): row["status"] for row in rows}
    assert len(status) == len(rows)
    assert status["logits", "compile"] == "slow on a CPU: --providers compile runs it"
    assert {status["logits", name] for name in ("ours", "eager", "verl", "distillkit")} == {"ok"}


def test_gradients_of_a_loss_of_ours_are_those_of_float64(tiny: Path) -> None:
    rows = [row for row in read(tiny) if row["status"] == "ok"]
    errors = {(r["section"], r["provider"]): r["gradient_error"] for r in rows}
    held = {name: error for name, error in errors.items() if error is not None}
    assert held.keys() >= SAME_LOSS
    assert all(error < 2e-5 for error in held.values()), held
    claimed = [r for r in rows if r["ours"] and r["section"] != "topk"]
    assert all(r["gradient_error"] is not None for r in claimed)


def test_tables_of_the_rows(tiny: Path, script: Script) -> None:
    short = script("report_kernels", tiny)
    assert short.returncode == 0, short.stderr
    for line in ("logits T=9 V=500 H=16 K=6 k=5, ms: ours ", "topk T=9 V=500", "eager "):
        assert line in short.stdout
    device_tables = importlib.import_module("report_kernels").device_tables
    cpu, gpu = (device_tables(read(tiny), device) for device in ("cpu", "cuda"))
    for title in ("**logits**, 9 rows", "**hidden**, 9 rows", "**indexed**", "**topk**"):
        assert title in cpu
    assert "| `verl` |" in cpu
    assert "--shape 9,500,16,6,5" in cpu
    assert str(tiny) not in cpu, "the command has no --out"
    assert "No GPU has run this yet" in gpu


def test_the_first_table_begins_with_the_fastest_plain_form(tiny: Path) -> None:
    tasks = importlib.import_module("report_ratios").SHORT
    times = {"ours-teacher-frozen": 10.0, "gathered-frozen": 5.0}
    times |= {"train-frozen": 1.0, "train-frozen-metrics": 1.0}
    ran = [row for row in read(tiny) if row["status"] == "ok"]
    rows = [{**row, "ms": times.get(row["provider"], 1e3)} for row in ran]
    lines = importlib.import_module("report_ratios").ratio_table(rows).splitlines()
    assert lines[2].startswith("| known support, loss alone, frozen head; 9 rows, K = 6 | 10 ms")
    assert "| 0.50x" in lines[2]
    assert any("as `train` runs it" in line for line in lines)
    front = importlib.import_module("report_ratios").short_table(rows).splitlines()[2:]
    assert [line for line in lines if line in front] == front, "a part, in the same order"
    assert [sum(f"| {task};" in line for line in front) for task in tasks] == [1] * len(tasks)


def test_the_price_of_metrics_is_spread_over_the_updates_of_a_run() -> None:
    sampling = importlib.import_module("logitcask.engine.training.metric_sampling")
    steps = importlib.import_module("kernel_bars").STEPS
    assert steps == sampling.STEPS
    shape = {"T": 1024, "V": 151_936, "H": 1024, "K": 16, "k": 16}
    rows = [
        row(name, ms, section="indexed", shape=shape, peak_bytes=None)
        for name, ms in (("train", 100.0), ("train-metrics", 100.0 + 10 * steps), ("verl", 330.0))
    ]
    found = bars(rows, "cpu")
    (price,) = (value for name, value in found.items() if "dense gradient" in name)
    assert price == (pytest.approx(0.1), True)
    (verl,) = (value for name, value in found.items() if name.startswith("`verl` over what"))
    assert verl == (pytest.approx(3.0), True)


def test_a_spent_budget_starts_nothing_and_is_reported(tmp_path: Path, script: Script) -> None:
    file = tmp_path / "rows.jsonl"
    names = ["--providers", "ours,eager", "--section", "logits", "--budget", "0"]
    done = script("bench_kernels", *TINY, *names, "--out", file)
    assert done.returncode == 0, done.stderr
    assert {row["status"] for row in read(file)} == {"left out: the budget of 0 s was spent"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--providers", "ours,other"], "no 'other'; there are"),
        (["--shape", "4,10,8,11,2"], "K and k at most V"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], words: str, script: Script) -> None:
    done = script("bench_kernels", *arguments)
    assert done.returncode == 2
    assert words in done.stderr


def bars(rows: list[dict[str, Any]], device: str) -> dict[str, tuple[float, bool]]:
    made = importlib.import_module("kernel_bars").bars(rows, device)
    return {bar["bar"]: (bar["value"], bar["met"]) for bar in made}


def row(provider: str, ms: float, started: int = 1, **more: Any) -> dict[str, Any]:
    shape = {"T": 128, "V": 151_936, "H": 1024, "K": 64, "k": 64}
    made = {"section": "logits", "device": "cpu", "dtype": "float32", "status": "ok"}
    return {**made, "provider": provider, "ms": ms, "started": started, "shape": shape, **more}


def test_a_bar_is_met_or_missed_by_the_newest_run_alone() -> None:
    gradient = 4 * 128 * 151_936  # bytes, which no memory bar counts

    def run(started: int, ours: tuple[float, int], eager: tuple[float, int]) -> list[Any]:
        both = {"ours": ours, "eager": eager}
        return [
            row(name, ms, started, peak_bytes=gradient + extra)
            for name, (ms, extra) in both.items()
        ]

    old, new = run(1, (10.0, 10), (90.0, 100)), run(2, (50.0, 30), (90.0, 100))
    time, memory = "`eager` over `ours` >= 2", "`ours` over `eager` <= 0.25"
    met, missed = [(9.0, True), (0.1, True)], [(1.8, False), (0.3, False)]
    for rows, expected in ((old, met), (old + new, missed)):
        found = bars(rows, "cpu")
        assert [value for name, value in found.items() if name.endswith((time, memory))] == expected
    assert bars([*old, row("ours", 50.0, 2)], "cpu") == {}, "the newest run has no peer"
    assert bars(old, "cuda") == {}
