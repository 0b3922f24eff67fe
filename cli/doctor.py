"""`logitcask doctor`: what works, and how to repair what does not."""

import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich_click as click

from logitcask.cli.doctor_tokenizers import tokenizers_command
from logitcask.cli.options import format_option, set_option
from logitcask.cli.output import print_result, visible
from logitcask.engine.errors import IdentityError
from logitcask.engine.findings import Finding

CHECK = 13
INDENT = len("fault") + 2 + CHECK + 2


class Checks(click.RichGroup):
    """A group with a command for all other words: `doctor FILE` is `doctor check FILE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `check` where no word is given, or options alone."""
        options = not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names)
        # A completion of the first word offers the commands.
        if options and not ctx.resilient_parsing:
            args = ["check", *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of `args`: `check` for a word that is none."""
        if args[0] not in self.commands:
            args = ["check", *args]
        return super().resolve_command(ctx, args)


@click.group("doctor", cls=Checks)
def doctor_command() -> None:
    """Check this machine, a configuration, a store, a server, or two tokenizers.

    Without a command below it does what `check` does.

    Example: logitcask doctor distill.toml
    """


doctor_command.add_command(tokenizers_command)


@doctor_command.command("check")
@click.argument("target", required=False, default="", type=click.Path())
@set_option
@format_option
def check_command(target: str, overrides: tuple[str, ...], form: str) -> None:
    """Check this machine, and what a configuration or a store needs.

    TARGET is a TOML file of `distill`, or the path or URL of a store. Versions of packages are
    compared with the bounds of this installation; nothing is downloaded and no weights are read.
    Exit code 1 if a check finds a fault.

    Example: logitcask doctor check distill.toml
    """
    from logitcask.engine.doctor.check import check_all

    _print_findings(check_all(target, overrides), form)


@doctor_command.command("teacher")
@click.argument("url")
@click.option(
    "--served", default="", help="The server's name of the teacher, if it serves several."
)
@click.option(
    "--server",
    type=click.Choice(["auto", "vllm", "sglang"]),
    default="auto",
    show_default=True,
    help="What the server is; auto: what its /v1/models says.",
)
@click.option(
    "--tokenizer",
    default="",
    help="Folder or hub id with the teacher's tokenizer and config.json; default: the source that "
    "the server names.",
)
@click.option("--revision", default="", help="The revision that the server should declare.")
@click.option(
    "--student",
    default="",
    help="Model folder or hub id of the student: tokens, stop ids and chat template are compared.",
)
@click.option(
    "--against",
    default="",
    help="Model folder or hub id of the weights that it should serve: they are loaded here, and "
    "the log-probs compared.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Compute type of --against.",
)
@click.option(
    "--server-wait",
    "wait_s",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds to wait for a server that does not answer.",
)
@click.option(
    "--teacher-topk-max",
    "k_max",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Log-probs per position that scoring will request.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File with the API key; default: the environment's LOGITCASK_API_KEY.",
)
@format_option
def teacher_command(url: str, form: str, **settings: Any) -> None:
    """Check a server as a teacher, with hints on its flags.

    Exit code 1 if a check finds a fault: nothing should be scored then.

    Example: logitcask doctor teacher http://127.0.0.1:8000
    """
    from logitcask.engine.teachers.server_check import ServerCheck, check_server

    _print_findings(check_server(ServerCheck(url=url, **settings)), form)


def _print_findings(findings: Iterable[Finding], form: str) -> None:
    """Print each finding when it is there; raise IdentityError at the end for a fault."""
    found = []
    for each in findings:
        found.append(each)
        if form == "text":
            lines = textwrap.wrap(
                visible(each.message), _width(), break_long_words=False, break_on_hyphens=False
            )
            click.echo(f"{each.state:<5}  {each.check:<{CHECK}}  {lines[0]}")
            for line in lines[1:]:
                click.echo(f"{'':<{INDENT}}{line}")
            if each.hint:
                click.echo(f"{'':<{INDENT}}hint: {visible(each.hint)}")
    if form == "json":
        print_result({"checks": [asdict(each) for each in found]}, form)
    faults = [each for each in found if each.state == "fault"]
    if not faults and form == "text":
        notes = sum(each.state == "note" for each in found)
        click.echo(f"no fault in {len(found)} checks, {notes} notes")
    if faults:
        raise IdentityError(
            f"{len(faults)} of {len(found)} checks found a fault, the first: {faults[0].check}",
            hint=faults[0].hint,
        )


def _width() -> int:
    """Return the columns of a message: those of a terminal, and no bound for a program."""
    if not sys.stdout.isatty():
        return sys.maxsize
    return max(40, shutil.get_terminal_size().columns - INDENT)
