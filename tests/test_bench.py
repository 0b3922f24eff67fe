"""The scripts of bench/: each has --help, and the store's sections run on few rows."""

import json
import os
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
        *(f"bench_{name}.py" for name in ("ablate", "cli", "demo", "kernels", "soak", "store")),
        *("bench_teachers.py", "gpu_check.py", "gpu_sweep.py", "report.py", "report_kernels.py"),
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_every_script(name: str) -> None:
    done = run(BENCH / name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}")


def test_an_unknown_section_is_named() -> None:
    done = run(BENCH / "bench_store.py", "size")
    assert done.returncode == 2
    assert "no section size; there are sizes, pair" in done.stderr


@pytest.mark.parametrize(
    ("call", "keys"),
    [
        ("store_sizes.sizes()", {"rows", "positions", "table", "bars"}),
        ("store_rates.random()", {"sequences", "sequences_per_core_second", "cache_bytes"}),
        ("store_commits.opening(count=8)", {"records", "open_seconds"}),
    ],
)
def test_sections_of_the_store_on_few_rows(tmp_path: Path, call: str, keys: set[str]) -> None:
    done = run("-c", f"{FEW}\nprint(json.dumps({call}))", BENCH, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]).keys() >= keys


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
