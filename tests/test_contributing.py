"""Carry out each row of CONTRIBUTING's table in a copy of the repository, and run its tests."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Edit:
    """Insert `text` before or after the first match of `at`; without `at`, at the file's end."""

    file: str
    text: str
    at: str = ""
    before: bool = False

    def apply(self, root: Path) -> None:
        """Change the file below `root`, or create it."""
        path = root / self.file
        if not self.at:
            with path.open("a") as file:
                file.write(self.text)
            return
        old = path.read_text()
        match = re.search(self.at, old, re.MULTILINE)
        assert match, f"{self.file} has no {self.at!r}: update CONTRIBUTING and this test"
        place = match.start() if self.before else match.end()
        path.write_text(old[:place] + self.text + old[place:])


@dataclass(frozen=True)
class Row:
    edits: tuple[Edit, ...]
    select: str
    """Part of the name of every test that runs for the row; also an expression of pytest -k."""


def entry(file: str, table: str, text: str) -> Edit:
    """Insert a first entry into a table of the file: a dict, a tuple or a list."""
    return Edit(file, text, rf"^{table}\b[^=\n]*= ?[({{\[]+")


OBJECTIVES = "engine/objectives"
FULL_ROWS = "tests/engine/objectives/full_rows.py"
SECTIONS = "engine/config/sections.py"

DIVERGENCE = Row(
    (
        Edit(
            f"{OBJECTIVES}/divergences.py",
            "def square(log_p: Tensor, log_q: Tensor, mask: Tensor, _: float = 0.0) -> Tensor:\n"
            "    return torch.where(mask, (log_p.exp() - log_q.exp()) ** 2, 0.0).sum(-1)\n\n\n",
            "^DIVERGENCES",
            before=True,
        ),
        entry(f"{OBJECTIVES}/divergences.py", "DIVERGENCES", '"square": square,'),
        Edit(
            FULL_ROWS,
            '    if objective.divergence == "square":\n        return ((p - q) ** 2).sum()\n',
            '^    if objective.divergence == "reverse_kl"',
            before=True,
        ),
    ),
    "teacher-square-renormalize",
)
SUPPORT = Row(
    (
        Edit(
            f"{OBJECTIVES}/supports.py",
            "def head(topk_index: Tensor, rows: Targets, k: int) -> Tensor:\n"
            "    return teacher(topk_index, rows, max(2, k - 1))\n\n\n",
            "^SUPPORTS",
            before=True,
        ),
        entry(f"{OBJECTIVES}/supports.py", "SUPPORTS", '"head": head,'),
        Edit(f"{OBJECTIVES}/objective.py", '"head", ', r'(?="teacher", "student", "overlap")'),
        Edit(f"{OBJECTIVES}/exactness.py", '"head": "exact",\n        ', '(?="teacher": f"exact)'),
        Edit(f"{OBJECTIVES}/exactness.py", '"head": "fixed",\n        ', '(?="teacher": "fixed)'),
        Edit(FULL_ROWS, '"head": teacher[: max(2, k - 1)],\n        ', '(?="teacher": teacher,)'),
    ),
    "head-reverse_kl-renormalize",
)
METRIC = Row(
    (
        Edit(
            "engine/metrics/metrics.py",
            "def overlap_twice(rows: Any) -> Tensor:\n    return 2 * overlap_ratio(rows)\n\n\n",
            "^METRICS",
            before=True,
        ),
        Edit("engine/metrics/metrics.py", "from typing import Any\n", r"(?=^import torch$)"),
        entry("engine/metrics/metrics.py", "METRICS", '"overlap/twice": Metric(overlap_twice),'),
        entry("tests/engine/metrics/test_metrics.py", "BY_HAND", '"overlap/twice": 4 / 3,'),
    ),
    "by_hand",
)
BACKEND = Row(
    (
        Edit(
            "engine/backends/echo.py",
            "from logitcask.engine.backends.hf import HF\n\n\nclass Echo(HF):\n    pass\n",
        ),
        entry(
            "engine/backends/base.py",
            "BACKENDS",
            '"echo": "logitcask.engine.backends.echo:Echo",',
        ),
    ),
    "dtypes_and_backends",
)
CONFIGURATION_KEY = Row(
    (
        Edit(
            SECTIONS,
            '    echo: Positive = Field(5, description="How often it is echoed.")\n',
            r"^class Rollout\(SamplingParams\):\n(    \"\"\"(.|\n)*?\"\"\"\n\n?)?",
        ),
    ),
    "every_option_has_help",
)
ARRAY = Row(
    (
        Edit(
            "engine/store/format/schema.py",
            '\nLAYOUTS[ROLLOUT] += ("plain+note",)\n'
            '_SPECS["plain+note"] = _SPECS["plain"] | {"note": Spec("uint8", "N")}\n'
            'COUNTS["plain+note"] = COUNTS["plain"]\n',
        ),
    ),
    "decodes_to_what_it_was",
)
PROFILE = Row(
    (
        entry(
            "engine/store/format/codecs.py",
            "PROFILES",
            '"fine": Profile(entry="float32", codec="blosc", rounding=0.0),',
        ),
        Edit(SECTIONS, '"fine", ', r"^    profile: Literal\["),
    ),
    "fine",
)
VERB = Row(
    (
        Edit(
            "cli/hello.py",
            "import rich_click as click\n\n\n"
            '@click.command("hello")\n'
            "def hello_command() -> None:\n"
            '    """Say hello.\n\n    Example: logitcask hello\n    """\n'
            '    click.echo("hello")\n',
        ),
        entry("cli/main.py", "VERBS", '"hello",'),
    ),
    "every_option_has_help",
)
ROWS = {
    "divergence": DIVERGENCE,
    "support": SUPPORT,
    "metric": METRIC,
    "backend": BACKEND,
    "configuration key": CONFIGURATION_KEY,
    "array on disk": ARRAY,
    "codec profile": PROFILE,
    "verb": VERB,
}

PROBE = """
from logitcask.cli.main import run
from logitcask.cli.options import config_from_flags
from logitcask.engine.backends.base import open_backend
from logitcask.engine.config.sections import RolloutConfig
from logitcask.engine.store.format import schema
from logitcask.engine.store.format.codecs import PROFILES
flags = {"student__model": "m", "prompts__file": "p", "store__url": "s"}
config = config_from_flags(RolloutConfig, flags | {"rollout__echo": 3, "store__profile": "fine"})
print(config.rollout.echo, config.store.profile in PROFILES)
print("note" in schema.specs("plain+note"), open_backend("echo").__name__)
run(["hello"])
run(["rollout", "--help"])
"""


def table() -> dict[str, list[list[str]]]:
    """Return the paths in backticks of each cell of each row, by the row's first cell."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {
        row[0].strip(): [re.findall(r"`([^`]*/[^`]*\.py)`", cell) for cell in row[1:]]
        for row in rows[1:]
    }


def test_the_table_names_the_files_that_are_edited() -> None:
    rows = table()
    assert list(rows) == list(ROWS)
    for name, (write, register, tests) in rows.items():
        named = {*write, *register}
        edited = {edit.file for edit in ROWS[name].edits}
        for path in (*named, *tests):
            assert "NAME" in path or (ROOT / path).exists(), f"{name}: no {path}"
        assert all(any(fnmatch(e, n.replace("NAME", "*")) for n in named) for e in edited), name
        assert all(any(fnmatch(e, n.replace("NAME", "*")) for e in edited) for n in named), name
        assert tests, f"{name}: the row names no test"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the repository's code and tests, and make the edits of all rows."""
    root = tmp_path_factory.mktemp("scratch")
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "Makefile"):
        shutil.copy2(ROOT / name, root / name)
    for name in ("engine", "kernels", "cli", "tests", ".src"):
        ignore = shutil.ignore_patterns("__pycache__", "test_contributing.py")
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=ignore)
    for row in ROWS.values():
        for edit in row.edits:
            edit.apply(root)
    return root


def run(root: Path, *arguments: str) -> str:
    """Run the interpreter in the copy, with the packages of the copy, and return its output."""
    env = {**os.environ, "PYTHONPATH": str(root / ".src"), "PYTHONSAFEPATH": "1"}
    env = {key: value for key, value in env.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_tests_of_every_row_pass(scratch: Path) -> None:
    paths = sorted({path for *_, tests in table().values() for path in tests})
    select = " or ".join(dict.fromkeys(row.select for row in ROWS.values()))
    options = ["-p", "no:cacheprovider", "-p", "no:randomly", "-v", "--durations=0", "-k", select]
    output = run(scratch, "-m", "pytest", *options, *paths)
    passed = re.findall(r"^(\S+\.py)::(.+) PASSED", output, re.MULTILINE)
    for name, (*_, tests) in table().items():
        assert any(file in tests and ROWS[name].select in test for file, test in passed), name


def test_the_additions_are_in_use(scratch: Path) -> None:
    output = run(scratch, "-c", PROBE)
    assert output.splitlines()[:3] == ["3 True", "True Echo", "hello"]
    assert "--echo" in output
