"""Completion in a shell: what is offered, that it loads nothing heavy, and once in a real bash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete, CompletionItem

from logitcask.cli.main import cli, run
from logitcask.engine.objectives import PRESETS
from logitcask.engine.recipes.named import recipe_names
from tests.test_layout import HEAVY


def items(line: str) -> list[CompletionItem]:
    """Return what is offered for the last word of a line."""
    *words, begun = line.split(" ")[1:]
    shell = BashComplete(cli, {}, "logitcask", "_LOGITCASK_COMPLETE")
    return shell.get_completions(words, begun)


def offered(line: str) -> list[str]:
    return [item.value for item in items(line)]


def test_verbs_flags_and_names_are_offered() -> None:
    assert offered("logitcask ro") == ["rollout"]
    assert offered("logitcask store sna") == ["snapshot"]
    assert offered("logitcask doctor ") == ["check", "teacher", "tokenizers"]
    assert offered("logitcask train --learning-") == ["--learning-rate"]
    assert offered("logitcask rollout --dtype b") == ["bfloat16"]
    assert sorted(offered("logitcask train --objective ")) == sorted(PRESETS)
    assert offered("logitcask objectives ov") == ["overlap"]
    assert offered("logitcask distill --recipe ") == list(recipe_names())
    assert offered("logitcask recipe show opd-r") == ["opd-released"]
    assert offered("logitcask rollout --grader e") == ["exact"]
    assert "rollout" in offered("logitcask nothing ")  # no usage error below the prompt


def test_folders_and_files_are_left_to_the_shell() -> None:
    for line, kind in (
        ("logitcask rollout --model x", "dir"),
        ("logitcask score --store x", "dir"),
        ("logitcask rollout --prompts x", "file"),
        ("logitcask distill x", "file"),
    ):
        assert [item.type for item in items(line)] == [kind], line


def test_a_real_bash_completes_without_heavy_imports(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["completion", "bash"]) == 0
    program = tmp_path / "logitcask"
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "from logitcask.cli.main import run\n"
        "code = run(sys.argv[1:])\n"
        f"heavy = [m for m in sys.modules if m.split('.')[0] in {HEAVY!r}]\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    program.chmod(0o755)
    script = (
        f"{capsys.readouterr().out}\n"
        "COMP_WORDS=(logitcask train --objective opd) COMP_CWORD=3\n"
        "_logitcask_completion logitcask\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    expected = [name for name in PRESETS if name.startswith("opd")]
    assert (sorted(done.stdout.split()), done.stderr) == (sorted(expected), "")
    assert len(expected) > 1


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_each_script_states_how_to_load_it(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"logitcask completion {shell}" in script
    assert f"_LOGITCASK_COMPLETE={shell}_complete" in script
    assert script.startswith("#compdef logitcask") == (shell == "zsh")
