"""The house rules that a machine can hold: fences, layers, packaging, README against the disk."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "kernels", "cli")

# A file imports only from lines above its own; files on one line do not import each other.
ENGINE_LAYERS = [
    ["config", "rows", "teachers", "training"],
    ["notices"],
    ["types", "errors", "heads", "waiting"],
    ["behaviour"],
    ["prompts", "targets", "grade"],
    ["config.section"],
    ["config.training", "config.teacher"],
    ["identity", "config.jobs", "privileged"],
    ["config.file"],
    ["store.medium", "store.schema"],
    ["store.files", "store.objects", "store.claims"],
    ["store.codecs", "store.ragged"],
    ["store.shards", "store.layout"],
    ["store.checks"],
    ["store.segment", "store.rollouts", "store.widen"],
    ["store.record", "store.pin"],
    ["store.log", "store.root", "store.unit"],
    ["store.publish"],
    ["store.commit"],
    ["store.reader"],
    ["store.store"],
    ["store"],
    ["store.view", "store.verify", "store.cache", "store.keep", "store.transfer"],
    ["backends.base", "backends.sampling", "backends.scoring", "backends.answers"],
    ["backends.hf", "backends.parity", "backends.server.wire", "backends.server.budget"],
    ["backends.server.link"],
    ["backends.server.fleet", "backends.server.probe"],
    ["backends.server.asking"],
    ["backends.server.scorer"],
    ["backends.server"],
    ["backends.vllm_engine"],
    ["backends.vllm_hidden"],
    ["backends.vllm"],
    [
        "teachers.token_maps",
        "score_asked",
        "score_given",
        "teachers.served",
        "teachers.same_teacher",
    ],
    ["teachers.checks", "teachers.doctor"],
    ["rollout_unit"],
    ["rollout"],
    ["score_unit"],
    ["score"],
    ["work"],
    ["wide_rows"],
    ["estimate"],
    ["rows.plan", "rows.columns"],
    ["rows.source"],
    ["rows.batches"],
    ["metrics"],
    ["metrics_released"],
    ["objectives.supports", "objectives.divergences", "objectives.columns"],
    ["objectives.outside"],
    ["objectives.modifier"],
    ["objectives.modifiers"],
    ["objectives.advantage"],
    ["objectives.objective"],
    ["objectives.presets", "objectives.bounds", "objectives.fused", "objectives.row_factors"],
    ["objectives.find", "objectives.exactness", "objectives.row_objective"],
    ["objectives"],
    ["training.row_loss"],
    ["training.rundir", "training.student"],
    ["training.settings"],
    ["probes"],
    ["probes.metrics"],
    ["training.trainer"],
    ["training.facts"],
    ["training.held_out"],
    ["training.evaluate"],
    ["training.run"],
    ["training.train"],
    ["opened"],
    ["named"],
    ["jobs"],
    ["rounds", "ablate", "watch"],
    ["distill"],
    ["demo.task"],
    ["demo.models"],
    ["demo.pretrain", "demo.record", "demo.scale"],
    ["demo.run"],
    ["demo"],
]

FENCES = {
    "click": {"cli"},
    "rich_click": {"cli"},
    "rich": {"cli"},
    "zarr": {"engine/store"},
    "numcodecs": {"engine/store"},
    "pcodec": {"engine/store"},
    "obstore": {"engine/store/objects.py"},
    "aiohttp": {"engine/backends/server/link.py"},
    "transformers": {
        "engine/backends/hf.py",
        "engine/backends/sampling.py",
        "engine/prompts.py",
        "engine/training/student.py",
        "engine/training/trainer.py",
        "engine/training/run.py",
        "engine/training/settings.py",
        "engine/demo",
    },
    "peft": {"engine/training/student.py"},
    "vllm": {"engine/backends/vllm"},
    "triton": {"kernels"},
    "pickle": set(),
    "dill": set(),
}
"""Library -> the only folders or files that may import it."""

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
)
VERBS = [
    *("", "rollout", "score", "train", "distill", "ablate", "objectives", "store", "probe"),
    *(
        "demo",
        "bench",
        "doctor",
        "doctor teacher",
        "probe metrics",
        "store verify",
        "store gc",
        "store estimate",
    ),
    "bench kernels",
]


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in the file, inside functions too."""
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
        f"{relative(path)}:{line} imports {module}: only {sorted(FENCES[top]) or 'nobody'} may"
        for path in sources(*PACKAGES)
        for line, module in imports(path)
        if (top := module.split(".")[0]) in FENCES
        and not any(relative(path).startswith(place) for place in FENCES[top])
    ]
    assert not broken, "\n".join(broken)


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
                allowed = PACKAGES[::-1][PACKAGES[::-1].index(package) :]
                allowed = {
                    "cli": PACKAGES,
                    "engine": ("engine", "kernels"),
                    "kernels": ("kernels",),
                }[package]
                if parts[1] not in allowed:
                    broken.append(f"{relative(path)}:{line} imports {module}: {package} is below")
    assert not broken, "\n".join(broken)


def test_engine_layers() -> None:
    level = {name: i for i, names in enumerate(ENGINE_LAYERS) for name in names}
    broken = []
    for path in sources("engine"):
        name = relative(path).removeprefix("engine/").removesuffix(".py").replace("/", ".")
        name = name.removesuffix(".__init__")
        if name == "__init__":
            continue
        place = level.get(name)
        assert place is not None, f"{relative(path)} has no line in ENGINE_LAYERS"
        for line, module in imports(path):
            if not module.startswith("logitcask.engine."):
                continue
            other = module.removeprefix("logitcask.engine.")
            theirs = level.get(other)
            assert theirs is not None, f"{relative(path)}:{line}: {module} has no layer"
            if theirs >= place and other != name:
                broken.append(f"{relative(path)}:{line} imports {module}, which stands below it")
    assert not broken, "\n".join(broken)


def test_kernels_is_not_a_package_of_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels"
    assert not list((ROOT / "bench").glob("kernels*")), "scripts put their folder on sys.path"
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin).startswith(str(ROOT))


def test_packages_listed_are_those_on_disk() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"logitcask." + relative(path.parent).replace("/", ".") for path in sources(*PACKAGES)}
    assert set(listed) == found


def test_no_mention_of_pickle_or_remote_code() -> None:
    words = re.compile(
        r"trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True|weights_only\s*=\s*False"
    )
    for path in sources(*PACKAGES):
        assert not words.search(path.read_text()), relative(path)


@pytest.mark.parametrize("verb", VERBS)
def test_help_imports_nothing_heavy(verb: str) -> None:
    code = (
        "import json, sys\n"
        "from logitcask.cli.main import run\n"
        f"code = run({[*verb.split(), '--help']!r})\n"
        "print(json.dumps([code, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: logitcask" in done.stdout
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert not [m for m in modules if m.split(".")[0] in HEAVY]


def test_public_names_are_imported_when_they_are_used() -> None:
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


def test_readme_tree_is_what_is_on_disk() -> None:
    block = re.search(r"```text tree\n(.*?)```", readme(), re.DOTALL)
    assert block, "README has no tree"
    shown: set[str] = set()
    folder: list[str] = []
    for line in block.group(1).splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        for name in line.split("  ")[indent].split() if line.strip() else []:
            folder[indent:] = [name.rstrip("/")]
            if not name.endswith("/"):
                shown.add("/".join(folder))
    found = sources("engine", "kernels", "cli", "bench")
    on_disk = {relative(p) for p in found if p.name != "__init__.py"}
    assert shown == on_disk, f"only in README {shown - on_disk}; only on disk {on_disk - shown}"


def test_readme_commands_exist() -> None:
    """Every `logitcask VERB --flag` in README and CONTRIBUTING is one that `--help` knows."""
    import click

    from logitcask.cli.main import VERBS as NAMES
    from logitcask.cli.main import cli

    text = readme() + (ROOT / "CONTRIBUTING.md").read_text()
    commands = re.findall(
        r"^\s*(?:\$ )?(?:\.venv/bin/)?logitcask (.+?)$", text.replace("\\\n", " "), re.M
    )
    assert len(commands) >= 8
    for line in commands:
        words = line.split("#")[0].split()
        command: click.Command = cli
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            name = words.pop(0)
            assert command is not cli or name in NAMES, f"logitcask {line}: no verb {name}"
            found = command.get_command(click.Context(command), name)
            assert found is not None, f"logitcask {line}"
            command = found
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        unknown = [
            w.split("=")[0] for w in words if w.startswith("--") and w.split("=")[0] not in known
        ]
        assert not unknown, f"logitcask {line}: {unknown}"


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`?make ([a-z]+)", readme()))
    assert {"demo", "test"} <= named
    assert named <= targets, named - targets
