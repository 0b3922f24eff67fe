"""The text of cli/README.md, made from the commands themselves.

Run: python -m logitcask.cli.reference > cli/README.md
"""

import re
from collections.abc import Collection, Iterator

import rich_click as click

from logitcask.cli.main import EXIT_CODES, cli
from logitcask.cli.options import FLAGS
from logitcask.engine.config.loop import LoopTeacher
from logitcask.engine.config.runner import LoopRunner
from logitcask.engine.config.section import Section
from logitcask.engine.config.teacher import Teacher
from logitcask.engine.config.training import Loop

SHARED = ("--format", "--help", "--dry-run")
"""Flags of many verbs, described once."""

INTRO = """\
# Command line

Made by `python -m logitcask.cli.reference > cli/README.md` from the commands themselves; a test
compares the two. `logitcask VERB --help` prints the same.

Most flags are keys of a configuration: `--max-new-tokens` is `[rollout] max_new_tokens` in a TOML
file, with the same default. Exceptions: {exceptions}; keys of `[eval]` begin with `--eval-`, except
`--grader`. `--dry-run` of `rollout`, `score`, `train`, `distill` and `probe metrics` prints the
resolved configuration as TOML and stops. `distill` and `ablate` read such a file, and
`--set SECTION.KEY=VALUE` overrides one key.

Units: lengths are in tokens, times in seconds, log-probs and entropies in nats, sizes in bytes,
unless a description states another. `-h` and `--help` print help, `--version` the version, and
`logitcask --debug VERB` the traceback of an error.

Results go to stdout, as text or with `--format json` as one JSON value; progress and messages go to
stderr. Progress shows the running work unit, positions per second and the remaining time: as bars
on a terminal, in a log file as a line after 2 s and then every 30 s. An error is two lines,
`error: CAUSE` and `hint: WAY OUT`.

| exit code | meaning |
|---|---|
{codes}
"""


def reference() -> str:
    """Return the whole page."""
    exceptions = ", ".join(f"`[{s}] {key}` is `--{flag}`" for (s, key), flag in FLAGS.items())
    codes = "\n".join(f"| {code} | {name} |" for code, name in EXIT_CODES.items())
    parts = [INTRO.format(exceptions=exceptions, codes=codes)]
    for path, command in commands():
        parts.append(f"## logitcask {path}\n\n{_prose(command)}\n")
        rows = [_row(each) for each in command.params if not {*each.opts} & {*SHARED}]
        if rows and not isinstance(command, click.Group):
            parts.append(_table(["flag", "key", "default", "meaning"], rows))
        if path == "distill":
            flags = {str(each.name).rpartition("__")[2] for each in command.params}
            of_score = {*Teacher.model_fields}
            for name, section, known in (
                ("loop", Loop, flags),
                ("teacher", LoopTeacher, of_score),
                ("runner", LoopRunner, flags),
            ):
                head = f"Keys of `[{name}]`, which have no flag:\n\n"
                parts.append(head + _table(*_keys(section, known)))
    return "\n".join(parts)


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield (path, command) of every verb, and of the commands below it."""
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        yield name, command
        for child, inner in getattr(command, "commands", {}).items():
            yield f"{name} {child}", inner


def _prose(command: click.Command) -> str:
    """Return the help text, its paragraphs as lines and its example as a block."""
    text, _, example = (command.help or "").partition("Example: ")
    paragraphs = [" ".join(each.split()) for each in text.split("\n\n") if each.strip()]
    usage = " ".join([each.make_metavar(click.Context(command)) for each in _arguments(command)])
    if usage:
        paragraphs.append(f"Arguments: `{usage}`.")
    return "\n\n".join([*paragraphs, f"```\n{' '.join(example.split())}\n```"])


def _arguments(command: click.Command) -> list[click.Argument]:
    return [each for each in command.params if isinstance(each, click.Argument)]


def _row(option: click.Parameter) -> list[str]:
    if not isinstance(option, click.Option):
        return []
    section, _, name = (option.name or "").partition("__")
    text, _, default = (option.help or "").partition(" [default: ")
    default = default.rstrip("]")
    if text.startswith("[default: "):
        text, default = "", text.removeprefix("[default: ").rstrip("]")
    if not default and option.show_default and option.default is not None:
        default = str(option.default)
    spellings = [*option.opts, *option.secondary_opts]
    if choices := getattr(option.type, "choices", ()):
        text = f"One of {', '.join(f'`{each}`' for each in choices)}. {text}"
    if option.multiple and "repeatable" not in text:
        text += " Repeatable."
    flag = ", ".join(f"`{each}`" for each in spellings)
    shown = "required" if option.required else default and f"`{default}`"
    return [flag, f"`[{section}] {name}`" if name else "", shown, text]


def _keys(section: type[Section], flags: Collection[str]) -> tuple[list[str], list[list[str]]]:
    return ["key", "default", "meaning"], [
        [
            f"`{name}`",
            "required"
            if field.is_required()
            else ""
            if field.default in ("", {})
            else f"`{field.default}`",
            field.description or "",
        ]
        for name, field in section.model_fields.items()
        if name not in flags
    ]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *[row for row in rows if row]]
    cells = [[re.sub(r"\|", r"\\|", " ".join(cell.split())) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


if __name__ == "__main__":
    print(reference(), end="")
