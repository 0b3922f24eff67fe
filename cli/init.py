"""`logitcask init`: a first configuration for `distill`, from questions or from flags."""

import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from logitcask.cli.completion import complete_folder, complete_recipe
from logitcask.cli.options import format_option, set_option
from logitcask.cli.output import print_event, print_result, visible, visible_lines
from logitcask.engine.config.prompts import Prompts
from logitcask.engine.config.sections import Student
from logitcask.engine.config.teacher import Teacher
from logitcask.engine.errors import ConfigError, LogitcaskError

if TYPE_CHECKING:
    from logitcask.engine.init.draft import Answers

HELP = {
    "student": Student.model_fields["model"].description or "",
    "teacher": Teacher.model_fields["model"].description or "",
    "prompts": Prompts.model_fields["file"].description or "",
}
"""Answer -> help of its key."""

HEAD = """\
Read by `logitcask distill`. Each key stands below its help; one in a comment is not set.
All keys and their values: `logitcask distill FILE --dry-run`. Paths are relative to this file."""


@click.command("init")
@click.option(
    "--student", default="", shell_complete=complete_folder, help=HELP["student"], metavar="MODEL"
)
@click.option(
    "--teacher", default="", shell_complete=complete_folder, help=HELP["teacher"], metavar="MODEL"
)
@click.option("--prompts", default="", type=click.Path(), help=HELP["prompts"])
@click.option(
    "--chat-template/--no-chat-template",
    default=None,
    help=Prompts.model_fields["chat_template"].description,
)
@click.option(
    "--recipe",
    default="",
    metavar="NAME",
    shell_complete=complete_recipe,
    help="Begin with the named settings of a recipe; one for a pair answers all questions. "
    "`logitcask recipe list` shows all.",
)
@set_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="distill.toml",
    show_default=True,
    help="File to write.",
)
@click.option("--force", is_flag=True, help="Replace the file if there is one.")
@format_option
def init_command(
    student: str,
    teacher: str,
    prompts: str,
    chat_template: bool | None,
    recipe: str,
    overrides: tuple[str, ...],
    output: Path,
    force: bool,
    form: str,
) -> None:
    """Write a commented configuration for a student, a teacher and prompts.

    On a terminal it asks for each of them that no flag gives. It looks at models and prompts that
    are on this machine, and downloads nothing: tokenizers have to fit, and the prompts have to be
    readable. `distill` accepts the file as it is.

    Example: logitcask init --student ./student --teacher ./teacher --prompts prompts.jsonl
    """
    from logitcask.engine.init.commented import commented_toml
    from logitcask.engine.init.draft import Answers, draft
    from logitcask.engine.models.digests import replace_text

    if output.exists() and not force:
        raise ConfigError(
            f"{output} is there already", hint="give --force to replace it, or another --output"
        )
    if not output.parent.is_dir():
        raise ConfigError(f"{output.parent} is no folder", hint="make it, or give another --output")
    answers = Answers(
        student=student,
        teacher=teacher,
        prompts=prompts,
        chat_template=chat_template,
        recipe=recipe,
    )
    found = draft(_ask(answers), output.parent, overrides)
    head = f"{HEAD}\nSettings of the recipe {recipe}." if recipe else HEAD
    replace_text(output, commented_toml(found.values, head))
    for note in found.notes:
        print_event(f"note: {note}")
    out = output.parent / found.values["run"]["out"]
    steps = {
        f"logitcask doctor {output}": "check this machine for it",
        f"logitcask distill {output} --dry-run": "load the models, read all prompts",
        f"logitcask distill {output}": "run it, or resume it",
        f"logitcask report {out}": "see what happened",
    }
    if form == "json":
        print_result({"file": output, "notes": found.notes, "next": list(steps)}, form)
        return
    click.echo(visible(f"wrote {output}; next:"))
    width = max(map(len, steps))
    for command, meaning in steps.items():
        click.echo(visible(f"  {command:<{width}}  {meaning}"))


def _ask(answers: "Answers") -> "Answers":
    """Return the answers with those that a user gives on a terminal, each checked at once."""
    from logitcask.engine.init.draft import find_model, find_prompts, needs_template

    checks: dict[str, Callable[[str], Any]] = {
        "student": find_model,
        "teacher": lambda text: find_model(text, remote=True),
        "prompts": find_prompts,
    }
    known = answers.with_recipe()
    missing = [name for name in checks if not getattr(known, name)]
    if not _is_terminal():
        if missing:
            flags = ", ".join(f"--{name}" for name in missing)
            raise click.UsageError(
                f"{flags} is missing, and there is no terminal to ask",
                click.get_current_context(),
            )
        return answers
    for name in missing:
        click.echo(f"\n{textwrap.fill(HELP[name], 96, break_on_hyphens=False)}")
        there = name == "prompts" and Path("prompts.jsonl").is_file()
        text = click.prompt(
            name,
            default="prompts.jsonl" if there else None,
            value_proc=lambda text, check=checks[name]: _checked(text, check),
        )
        answer: dict[str, Any] = {name: text}
        known = replace(known, **answer)
    if known.chat_template is None:
        source, student = find_prompts(known.prompts), find_model(known.student)
        if needs_template(source, student) is None:
            click.echo(f"\n{Prompts.model_fields['chat_template'].description}")
            known = replace(known, chat_template=click.confirm("chat template", default=True))
    return known


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _checked(text: str, check: Callable[[str], Any]) -> str:
    """Return an answer that passes its check; UsageError, after which click asks again."""
    text = text.strip()
    try:
        check(text)
    except LogitcaskError as error:
        raise click.UsageError(visible_lines(f"{error.cause}\nhint: {error.hint}")) from error
    return text
