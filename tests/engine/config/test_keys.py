"""Each key of the configuration is read by a stage, and each default has one place."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("engine", "kernels", "cli")
MYPY = """
[mypy]
mypy_path = .src
namespace_packages = True
explicit_package_bases = True
plugins = pydantic.mypy
follow_imports = silent
[mypy-torch.*,transformers.*,numpy.*,triton.*,numcodecs.*,pcodec.*,peft.*,vllm.*,google_crc32c.*]
follow_imports = skip
ignore_missing_imports = True
[mypy-zarr.*,ray.*,obstore.*,aiohttp.*,rich_click.*,rich.*,click.*,accelerate.*]
follow_imports = skip
ignore_missing_imports = True
"""


FILES = ("prompts", "cost", "runner", "tap", "teacher", "loop", "training", "sections")
"""Files of sections, each after those of the bases of its sections."""
BASES = {
    **{"StageRunner": "Runner", "LoopRunner": "Runner"},
    **{"LoopTeacher": "Teacher", "LoopScore": "Score"},
    "Train": "TeacherMix",
}
"""Section -> the section whose keys it has too."""


def declared(root: Path) -> Iterator[tuple[Path, str, ast.AnnAssign]]:
    """Yield (file, class, field) of each key: of each field of a section."""
    sections = {"Section"}
    for name in ("types.py", *(f"config/{each}.py" for each in FILES)):
        path = root / "engine" / name
        for node in ast.parse(path.read_text()).body:
            # The fields of a command's configuration are sections, not keys.
            if not isinstance(node, ast.ClassDef) or node.name.endswith("Config"):
                continue
            if sections & {ast.unparse(base) for base in node.bases}:
                sections.add(node.name)
                yield from (
                    (path, node.name, line) for line in node.body if isinstance(line, ast.AnnAssign)
                )


def keys(root: Path = ROOT) -> set[tuple[str, str]]:
    """Return (class, key) of each key."""
    return {(kind, ast.unparse(line.target)) for _, kind, line in declared(root)}


def unread(root: Path) -> set[tuple[str, str]]:
    """Return the keys that no code reads: mypy finds the reads of a renamed key."""
    found = keys(root)
    for path, _, line in list(declared(root)):
        lines = path.read_text().splitlines(keepends=True)
        key = ast.unparse(line.target)
        lines[line.lineno - 1] = lines[line.lineno - 1].replace(key, f"{key}_renamed", 1)
        path.write_text("".join(lines))
    (root / "mypy.ini").write_text(MYPY)
    output = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", os.devnull]
        + [f".src/logitcask/{name}" for name in PACKAGES],
        cwd=root,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    ).stdout
    read = set(re.findall(r'"(\w+)" has no attribute "(\w+)"', output))
    read |= {(BASES[kind], key) for kind, key in read if kind in BASES}
    # The stages read the parameters of Rollout and Eval as those of their base class.
    sampled = {key for kind, key in read if kind in ("SamplingParams", "Rollout", "Eval")}
    read |= {
        (kind, key)
        for kind, key in found
        if kind in ("SamplingParams", "Eval")
        and key in sampled
        and ("SamplingParams", key) in found
    }
    return found - read


def test_every_key_is_read(tmp_path: Path) -> None:
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".src", tmp_path / ".src", symlinks=True)
    config = tmp_path / "engine" / "config" / "training.py"
    text = config.read_text()
    head = "class Train(TeacherMix):\n"
    config.write_text(text.replace(head, f"{head}    spare: int = 0\n"))
    assert len(keys(tmp_path)) > 90
    assert unread(tmp_path) == {("Train", "spare")}


def literals(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yield (name, default) of each parameter and of each field of a class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            args = node.args
            positional = args.posonlyargs + args.args
            pairs = [
                *zip(
                    positional[len(positional) - len(args.defaults) :], args.defaults, strict=True
                ),
                *zip(args.kwonlyargs, args.kw_defaults, strict=True),
            ]
            yield from ((name.arg, value) for name, value in pairs if value is not None)
        elif isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    value = line.value
                    if isinstance(value, ast.Call) and value.args:
                        value = value.args[0]  # Field(default, ...)
                    if value is not None:
                        yield line.target.id, value


def test_every_default_has_one_place() -> None:
    names = {key for _, key in keys()}
    seen: dict[tuple[str, str], list[str]] = {}
    for path in (path for name in PACKAGES for path in (ROOT / name).rglob("*.py")):
        for name, value in literals(ast.parse(path.read_text())):
            if name not in names or not isinstance(value, ast.Constant):
                continue
            # "none", "all" and "default" are no sizes to change.
            if value.value in (None, "", 0, 1, "auto", "default", "main", "inline"):
                continue
            seen.setdefault((name, repr(value.value)), []).append(str(path.relative_to(ROOT)))
    assert {default: where for default, where in seen.items() if len(where) > 1} == {}
    assert seen[("max_new_tokens", "512")] == ["engine/types.py"]
