"""`logitcask completion`: Tab in a shell completes verbs, flags, names and paths.

A completion is a process of its own, so nothing here imports torch.
"""

import re
from pathlib import Path

import rich_click as click
from click.shell_completion import CompletionItem, get_completion_class

PROGRAM = "logitcask"
LOAD = {
    "bash": 'eval "$(logitcask completion bash)"  # in ~/.bashrc',
    "zsh": 'eval "$(logitcask completion zsh)"  # in ~/.zshrc, after compinit',
    "fish": "logitcask completion fish > ~/.config/fish/completions/logitcask.fish",
}
"""Shell -> the line that loads the completion."""


@click.command("completion")
@click.argument("shell", type=click.Choice(list(LOAD)))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands in a shell.

    It completes verbs, flags, choices, objectives, recipes, graders and paths. The first lines of
    the script are comments on how to load it.

    Example: logitcask completion bash
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click has all of LOAD"
    script = kind(ctx.find_root().command, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source()
    # zsh reads the first line of the script, "#compdef", where it is loaded from a file.
    click.echo(f"{script.strip()}\n\n# To load it in every new shell:\n#   {LOAD[shell]}")


Items = list[CompletionItem]


def complete_objective(ctx: click.Context, param: click.Parameter, begun: str) -> Items:
    """Return the presets that begin with a text.

    Their names are read from their sources: importing these loads torch, which takes seconds.
    """
    from logitcask import engine

    folder = Path(engine.__path__[0]) / "objectives" / "presets"
    sources = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("on_*.py"))]
    names = [name for text in sources for name in re.findall(r'^ +name="(\w+)"', text, re.M)]
    return _beginning(names, begun)


def complete_recipe(ctx: click.Context, param: click.Parameter, begun: str) -> Items:
    """Return the recipes that begin with a text."""
    from logitcask.engine.recipes.named import recipe_names

    return _beginning(recipe_names(), begun)


def complete_grader(ctx: click.Context, param: click.Parameter, begun: str) -> Items:
    """Return the graders that begin with a text."""
    from logitcask.engine.config.prompts import GRADER_NAMES

    return _beginning(GRADER_NAMES, begun)


def complete_folder(ctx: click.Context, param: click.Parameter, begun: str) -> Items:
    """Let the shell complete a folder: of a model, or of a store."""
    return [CompletionItem(begun, type="dir")]


def _beginning(names: "list[str] | dict[str, str]", begun: str) -> Items:
    return [CompletionItem(name) for name in names if name.startswith(begun)]


COMPLETE = {
    ("train", "objective"): complete_objective,
    ("rollout", "grader"): complete_grader,
    ("eval", "grader"): complete_grader,
    ("student", "model"): complete_folder,
    ("teacher", "model"): complete_folder,
    ("store", "url"): complete_folder,
}
"""Key -> completion of its flag; choices and paths have click's own."""
