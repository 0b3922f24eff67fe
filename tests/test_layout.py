"""Rules of the repository: fences, layers, light imports, README against the disk."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "kernels", "cli")

# A folder of engine/ imports only from folders to the left of its own, and from itself.
LAYERS = [
    *("config/section", "types", "errors", "findings", "quantities", "events"),
    *("config", "prompts", "models", "alignment"),
    *("store/storage", "store/format", "store/log", "store", "store/transfer"),
    *("backends", "backends/vllm", "backends/server", "teachers"),
    *("rollout", "score", "packing", "metrics", "objectives"),
    *("exchange", "estimate", "probes", "tap", "training", "integrations"),
    *("workers", "workers/ray", "commands", "distill", "recipes", "init", "doctor"),
    *("ablate_table", "ablate"),
    *("report/panels", "report/runs", "report/change", "report/sections", "report/viewer"),
    *("report", "demo"),
]

FENCES = {
    "click": {"cli"},
    "rich_click": {"cli"},
    "rich": {"cli"},
    "zarr": {"engine/store"},
    "numcodecs": {"engine/store"},
    "pcodec": {"engine/store"},
    "obstore": {"engine/store/storage/object_store.py"},
    "aiohttp": {"engine/backends/server", "engine/tap"},
    "transformers": {
        "engine/backends",
        "engine/prompts",
        "engine/models",
        "engine/training",
        "engine/demo",
    },
    "tokenizers": {"engine/alignment", "engine/demo", "engine/report/viewer/texts.py"},
    "peft": {"engine/models"},
    "matplotlib": {"engine/probes/figures.py"},
    "trl": {"engine/integrations"},
    "deepspeed": {"engine/training/sharding"},
    "vllm": {"engine/backends/vllm"},
    "sentence_transformers": {"engine/recipes/duplicates.py"},
    "faiss": {"engine/recipes/duplicates.py"},
    "ray": {"engine/workers/ray", "engine/integrations/verl.py"},
    "verl": {"engine/integrations/verl.py"},
    "triton": {"kernels"},
    "pickle": set(),
    "dill": set(),
}
"""Library -> the folders and files that may import it."""

KERNELS_MAY_IMPORT = {"torch", "triton", "logitcask"} | set(sys.stdlib_module_names)
HEAVY = (
    "torch",
    "transformers",
    "triton",
    "zarr",
    "numcodecs",
    "obstore",
    "aiohttp",
    "vllm",
    "ray",
    "matplotlib",
    "peft",
    "deepspeed",
    "trl",
    "datasets",
    "pyarrow",
    "sentence_transformers",
    "faiss",
)
VERBS = [
    *("", "rollout", "score", "tap", "train", "distill", "ablate", "objectives", "store", "probe"),
    *(
        "demo",
        "bench",
        "completion",
        "report",
        "doctor",
        "doctor check",
        "doctor teacher",
        "init",
        "doctor tokenizers",
        "probe correctness",
        "probe drift",
        "probe k",
        "probe compatibility",
        "probe continuation",
        "probe metrics",
        "probe compare",
        "probe positions",
        "probe regions",
        "probe reward",
        "recipe",
        "recipe reverse",
        "recipe list",
        "recipe show",
        "recipe cold-start",
        "recipe best-of-n",
        "recipe prompts",
        "recipe co-evolve",
        "store verify",
        "store gc",
        "store estimate",
        "store push",
        "store pull",
    ),
    "bench kernels",
]


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


@cache
def imports(path: Path) -> tuple[tuple[int, str], ...]:
    """Return (line, dotted module) of every import in the file, inside functions too."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; import absolutely"
            assert node.module is not None
            yield node.lineno, node.module
            # `from logitcask.engine import identity` names a module too.
            for alias in node.names:
                if (
                    (
                        ROOT
                        / f"{node.module}.{alias.name}".replace("logitcask.", "").replace(".", "/")
                    )
                    .with_suffix(".py")
                    .exists()
                ):
                    yield node.lineno, f"{node.module}.{alias.name}"


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_fences() -> None:
    broken = [
        f"{relative(path)}:{line} imports {module}: only {sorted(FENCES[top]) or 'no file'} may"
        for path in sources(*PACKAGES)
        for line, module in imports(path)
        if (top := module.split(".")[0]) in FENCES
        and not any(relative(path).startswith(place) for place in FENCES[top])
    ]
    assert not broken, "\n".join(broken)


def test_every_fence_is_used() -> None:
    """Check that each place of FENCES imports its library."""
    used = {
        (module.split(".")[0], relative(path))
        for path in sources(*PACKAGES)
        for _, module in imports(path)
    }
    unused = [
        f"{place} does not import {library}"
        for library, places in FENCES.items()
        for place in places
        if not any(name == library and file.startswith(place) for name, file in used)
    ]
    assert not unused, "\n".join(unused)


def test_packages_import_downwards() -> None:
    broken = []
    for path in sources(*PACKAGES):
        package = relative(path).split("/")[0]
        for line, module in imports(path):
            parts = module.split(".")
            if package == "kernels" and parts[0] not in KERNELS_MAY_IMPORT:
                broken.append(f"{relative(path)}:{line} imports {module}: kernels need only torch")
            if parts[0] in PACKAGES:
                broken.append(f"{relative(path)}:{line} imports {module}: write logitcask.{module}")
            if parts[0] == "logitcask" and len(parts) > 1:
                allowed = {
                    "cli": PACKAGES,
                    "engine": ("engine", "kernels"),
                    "kernels": ("kernels",),
                }[package]
                if parts[1] not in allowed:
                    broken.append(f"{relative(path)}:{line} imports {module}: {package} is below")
    assert not broken, "\n".join(broken)


def layer(module: str) -> int:
    """Return the index in LAYERS of the longest folder or file that holds the engine module."""
    parts = module.split(".")
    names = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return LAYERS.index(next(name for name in names if name in LAYERS))


def test_engine_folders_import_only_folders_above() -> None:
    broken = []
    for path in sources("engine"):
        name = relative(path).removeprefix("engine/").removesuffix(".py").replace("/", ".")
        if name == "__init__":
            continue
        for line, module in imports(path):
            other = module.removeprefix("logitcask.engine.")
            if other != module and layer(other) > layer(name.removesuffix(".__init__")):
                broken.append(f"{relative(path)}:{line} imports {module}, a folder below")
    assert not broken, "\n".join(broken)


def test_no_module_imports_itself_through_others() -> None:
    graph = {}
    for path in sources(*PACKAGES):
        name = "logitcask." + relative(path).removesuffix(".py").replace("/", ".")
        graph[name.removesuffix(".__init__")] = {module for _, module in imports(path)}
    cycles = []
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycles.append(" -> ".join((*path[path.index(name) :], name)))
        elif name in graph and name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert not cycles, "\n".join(cycles)


def test_folders_stay_small() -> None:
    for folder in [ROOT / "engine", *(p for p in (ROOT / "engine").rglob("*") if p.is_dir())]:
        files = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(files) <= (8 if folder.name == "engine" else 12), folder


def test_kernels_is_not_a_package_of_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels"
    assert not list((ROOT / "bench").glob("kernels*")), "scripts put their folder on sys.path"
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin).startswith(str(ROOT))


def test_no_mention_of_pickle_or_remote_code() -> None:
    words = re.compile(
        r"trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True|weights_only\s*=\s*False"
    )
    for path in sources(*PACKAGES):
        assert not words.search(path.read_text()), relative(path)


def test_help_imports_nothing_heavy() -> None:
    """Print the help of all verbs in one process, so that each verb adds its imports."""
    code = (
        "import json, sys\n"
        "from logitcask.cli.main import run\n"
        "for verb in json.loads(sys.argv[1]):\n"
        "    code = run([*verb.split(), '--help'])\n"
        f"    heavy = [m for m in sys.modules if m.split('.')[0] in {HEAVY!r}]\n"
        "    assert not code and not heavy, (verb, code, heavy)\n"
    )
    command = [sys.executable, "-c", code, json.dumps(VERBS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f"Usage: logitcask {verb}".strip() in done.stdout, verb


def test_public_names_are_imported_lazily() -> None:
    code = (
        "import json, sys\n"
        "import logitcask.engine as engine\n"
        "before = sorted(sys.modules)\n"
        "found = {name: getattr(engine, name).__module__ for name in engine.__all__}\n"
        "print(json.dumps([before, found]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, found = json.loads(done.stdout)
    assert not [m for m in before if m.split(".")[0] in HEAVY]
    assert all(module.startswith("logitcask.engine.") for module in found.values())
    import logitcask.engine

    with pytest.raises(AttributeError, match="no attribute 'teach'"):
        _ = logitcask.engine.teach


def test_sampling_and_scoring_do_not_wait_for_the_trainer() -> None:
    code = (
        "import sys\n"
        "import logitcask.engine.commands.rollout, logitcask.engine.commands.worker\n"
        "print(*{'peft', 'transformers.trainer', 'accelerate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_option_has_help_and_every_verb_an_example() -> None:
    from logitcask.cli.main import VERBS as NAMES
    from logitcask.cli.main import cli

    def walk(command: object, path: str) -> Iterator[tuple[str, object]]:
        yield path, command
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, f"{path} {name}")

    import click

    for name in NAMES:
        top = cli.get_command(click.Context(cli), name)
        for path, command in walk(top, name):
            assert isinstance(command, click.Command)
            assert f"Example: logitcask {path}" in (command.help or ""), path
            for option in command.params:
                if isinstance(option, click.Option):
                    assert option.help, f"{path} {option.opts}"


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`?make ([a-z]+)", readme()))
    assert {"demo", "test"} <= named
    assert named <= targets, named - targets
