"""The scripts of bench/: each has --help, and the store's sections run on few rows."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
SCRIPTS = sorted(
    file.name for file in BENCH.glob("*.py") if "\ndef main(arguments" in file.read_text()
)
FEW = """
import sys
sys.path.insert(0, sys.argv[1])
import json, pathlib
import score_rows, store_common, store_commits, store_peers, store_rates, store_sizes
score_rows.CONTEXTS, score_rows.LISTED = 2, 600
for module in (store_common, store_rates, store_sizes):
    module.POSITIONS = 600
for module in (store_common, store_rates, store_commits):
    module.RUNS = 1
store_common.WORK = pathlib.Path(sys.argv[2])
store_peers.FORMATS = store_peers.FORMATS[1:]  # without parquet, whose package may be missing
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python with a script or code."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_every_script_is_in_this_test() -> None:
    assert {name for name in SCRIPTS if name.startswith(("bench", "gpu", "report"))} == {
        *(
            f"bench_{name}.py"
            for name in ("ablate", "cli", "demo", "kernels", "real", "scale", "soak", "store")
        ),
        *(
            "bench_cross_tokenizer.py",
            "bench_exchange.py",
            "bench_paper.py",
            "bench_pipeline.py",
            "bench_real.py",
            "bench_real_probes.py",
            "bench_report.py",
            "bench_teachers.py",
            "gpu_check.py",
            "gpu_run.py",
            "gpu_sweep.py",
            "report.py",
            "report_kernels.py",
            "report_picture.py",
            "report_pipeline.py",
        ),
    }


def test_help_of_every_script() -> None:
    code = (
        "import importlib, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "for name in sys.argv[2:]:\n"
        "    sys.argv[0] = name\n"
        "    try:\n"
        "        importlib.import_module(name.removesuffix('.py')).main(['--help'])\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, name\n"
    )
    done = run("-c", code, BENCH, *SCRIPTS)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^usage: (\S+)", done.stdout, re.M) == SCRIPTS


def test_an_unknown_section_is_named() -> None:
    done = run(BENCH / "bench_store.py", "size")
    assert done.returncode == 2
    assert "no section size; there are sizes, pair" in done.stderr


def test_sections_of_the_store_on_few_rows(tmp_path: Path) -> None:
    sections = {
        "store_sizes.sizes()": {"rows", "positions", "table", "bars"},
        "store_rates.random()": {"sequences", "sequences_per_core_second", "cache_bytes"},
    }
    code = f"{FEW}\nprint(json.dumps([{', '.join(sections)}]))"
    done = run("-c", code, BENCH, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for content, keys in zip(found, sections.values(), strict=True):
        assert content.keys() >= keys


def test_the_model_of_many_workers_is_the_stores_own_code(tmp_path: Path) -> None:
    """Commit with both: 40 workers whose units of 2 s offer more than one record at a time."""
    code = (
        f"{FEW}\n"
        "from scale_model import Costs, simulate\n"
        "from scale_real import run_real\n"
        "costs = Costs(put=0.12, create=0.06, names=0.06, read=0.03, remove=0.04, head=4e-5,\n"
        "              record=6e-5, add=1e-3)\n"
        "times = {'unit_s': 2.0, 'warm_s': 4.0, 'end_s': 19.0}\n"
        "found = [run_real(40, costs, **times), simulate('group', 40, costs, **times),\n"
        "         simulate('race', 40, costs, **times)]\n"
        "print(json.dumps(found))"
    )
    done = run("-c", code, BENCH, tmp_path)
    assert done.returncode == 0, done.stderr
    real, model, race = json.loads(done.stdout.splitlines()[-1])
    assert abs(real["worker_use"] - model["worker_use"]) <= 0.05
    assert abs(real["commits_per_s"] / model["commits_per_s"] - 1) <= 0.15
    assert abs(real["commits_per_record"] / model["commits_per_record"] - 1) <= 0.35
    assert real["commits_per_record"] > 2
    assert race["commits_per_s"] < 0.8 * model["commits_per_s"]


def test_the_tables_of_the_pages_are_those_of_the_results() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import report, report_pages, results\n"
        "made = report.tables()\n"
        "for page in report_pages.pages():\n"
        "    text = page.read_text()\n"
        "    assert report_pages.filled(text, made) == text, page\n"
        "print(len(made))"
    )
    done = run("-c", code, BENCH)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_another_tokenizer_and_two_experts_on_a_few_problems(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run all stages with models that learn nothing; work the tables' figures by hand."""
    monkeypatch.syspath_prepend(str(BENCH))
    report_cross_tokenizer = importlib.import_module("report_cross_tokenizer")
    importlib.import_module("bench_cross_tokenizer").main(
        ["--smoke", "--only", "merged alm", "routed opd"]
    )
    rows = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert [(row["part"], row["variant"]) for row in rows] == [
        ("spans", "merged alm"),
        ("experts", "routed opd"),
    ]
    assert [*rows[0]["teachers"][0]] == ["merged"]
    assert [*rows[1]["teachers"][0]] == ["sums", "differences"]
    rows[0] |= {"before": [{"all": 0.5}], "after": [{"all": 0.8}]}
    rows[0]["teachers"] = [{"merged": {"all": 0.9}}]
    assert report_cross_tokenizer.recoveries(rows[0]) == [pytest.approx(0.75)]
    # A variance of 7/300 over three seeds.
    few = [0.1, 0.2, 0.4], [0.3, 0.4, 0.6]
    of = [report_cross_tokenizer.standard_error(each) for each in few]
    assert of == [pytest.approx((7 / 900) ** 0.5)] * 2
    distance = report_cross_tokenizer.independent(few[1], few[0])
    assert distance == pytest.approx(0.2 / (14 / 900) ** 0.5)
    # Differences of 0.2, 0.3 and 0.4: a mean of 0.3 and a variance of 1/100.
    paired = report_cross_tokenizer.paired([0.3, 0.5, 0.8], few[0])
    assert paired == pytest.approx(0.3 / (1 / 300) ** 0.5)
