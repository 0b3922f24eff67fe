"""Build the sdist and the wheel without network, install them, and run the copy."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "kernels", "cli")
NEW = "logitcask/engine/new_room/inner/part.py"
"""A sub-package that no file lists: packaging has to find it."""

BUILD = """
import sys, setuptools.build_meta as backend
sdist, wheel = sys.argv[1:]
if sdist != "-":
    backend.build_sdist(sdist)
backend.build_wheel(wheel)
"""

IMPORT_ALL = """
import importlib, json, pathlib, sys
target = pathlib.Path(sys.argv[1])
places, absent = {}, {}
for path in sorted((target / "logitcask").rglob("*.py")):
    parts = path.relative_to(target).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    try:
        places[name] = importlib.import_module(name).__file__
    except ModuleNotFoundError as error:
        absent[name] = error.name
from transformers.utils import is_kernels_available
print(json.dumps([places, absent, is_kernels_available()]))
"""


@dataclass(frozen=True)
class Built:
    sdist: set[str]
    """Names in the sdist, below its one folder."""
    wheel: set[str]
    """Names in the wheel that was built from the sdist."""
    wheel_of_tree: set[str]
    target: Path
    """The folder that the wheel is installed into."""


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Run the tests' interpreter with `path` as the only PYTHONPATH and return its output."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def wheel_names(folder: Path) -> tuple[Path, set[str]]:
    """Return the one wheel in the folder and the names of its files."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        return wheel, set(file.namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build a copy of the tree that has one more sub-package, and install its wheel."""
    tmp = tmp_path_factory.mktemp("packaging")
    tree = tmp / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree / name)
    for name in (*PACKAGES, ".src"):
        shutil.copytree(
            ROOT / name,
            tree / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    (new := tree / NEW.removeprefix("logitcask/")).parent.mkdir(parents=True)
    new.write_text("VALUE = 1\n")
    for folder in (new.parent, new.parent.parent):
        (folder / "__init__.py").write_text("")

    python("-c", BUILD, str(tmp), str(tmp), cwd=tree)
    (archive,) = tmp.glob("*.tar.gz")
    _, wheel_of_tree = wheel_names(tmp)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp / "unpacked", filter="data")
    (unpacked,) = (tmp / "unpacked").iterdir()
    sdist = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    python("-c", BUILD, "-", str(tmp / "unpacked"), cwd=unpacked)
    wheel, names = wheel_names(tmp / "unpacked")
    pip = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    python(*pip, "--target", str(tmp / "target"), str(wheel), cwd=tmp)
    return Built(sdist, names, wheel_of_tree, tmp / "target")


def tracked_sources() -> set[str]:
    """Return the files that an installation has to contain, as logitcask/..."""
    return {
        f"logitcask/{path.relative_to(ROOT).as_posix()}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".md", ".toml", ".js", ".css", ".html")
        or path.name in ("py.typed", "LICENSE")
    }


def test_sdist_and_wheel_hold_every_module_manual_and_py_typed(built: Built) -> None:
    expected = tracked_sources() | {NEW}
    assert {f"logitcask/{package}/py.typed" for package in PACKAGES} <= expected
    assert not {f".src/{name}" for name in expected} - built.sdist
    assert not expected - built.wheel
    assert built.wheel == built.wheel_of_tree, "the sdist builds another wheel than the tree"
    others = {name for name in built.wheel if ".dist-info/" not in name} - expected
    assert {Path(name).parent.as_posix() for name in others} <= {
        "logitcask/engine/new_room",
        "logitcask/engine/new_room/inner",
    }, others


def test_the_wheel_has_one_top_level_name(built: Built) -> None:
    """Install no top-level `kernels`: transformers would use it as Hugging Face's package."""
    tops = {name.split("/")[0] for name in built.wheel}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"logitcask"}


def test_the_installed_copy_runs_from_another_folder(built: Built, tmp_path: Path) -> None:
    found, absent, kernels = json.loads(
        python("-c", IMPORT_ALL, str(built.target), cwd=tmp_path, path=built.target).splitlines()[
            -1
        ]
    )
    assert set(absent.values()) <= {"vllm", "verl"}, absent
    assert "logitcask.engine.new_room.inner.part" in found
    assert len(found) + len(absent) == sum(name.endswith(".py") for name in built.wheel)
    elsewhere = {name: place for name, place in found.items() if not inside(place, built.target)}
    assert not elsewhere, "imported from another copy"
    assert not kernels, "transformers uses our kernels as its own"


def test_the_installed_command_answers(built: Built, tmp_path: Path) -> None:
    command = built.target / "bin" / "logitcask"
    assert command.exists()
    text = python(str(command), "--help", cwd=tmp_path, path=built.target)
    assert "Usage: logitcask" in text
    assert {"rollout", "score", "train", "store"} <= set(text.split())


def inside(path: str, folder: Path) -> bool:
    """Return if the path is in the folder."""
    return Path(path).resolve().is_relative_to(folder.resolve())


def test_links_are_tracked_and_relative() -> None:
    """Check the links: an editable install, a type checker and a wheel read through them."""
    links = {path.name: os.readlink(path) for path in (ROOT / ".src" / "logitcask").iterdir()}
    assert links == {package: f"../../{package}" for package in PACKAGES}
