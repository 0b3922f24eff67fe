"""The command `logitcask`: its verbs, and how every one of them ends."""

import importlib
import sys
import traceback
from difflib import get_close_matches

import rich_click as click
from click.exceptions import Exit

from logitcask.cli.output import visible
from logitcask.engine.errors import LogitcaskError

VERBS = (
    "rollout",
    "score",
    "train",
    "distill",
    "ablate",
    "objectives",
    "store",
    "probe",
    "doctor",
    "demo",
    "bench",
)
"""In the data's order. The module of a verb is cli/VERB.py, imported only when it is used."""


class Verbs(click.RichGroup):
    """Imports a verb when it is used: `--help` must not load torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module = importlib.import_module(f"logitcask.cli.{name}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS and args[0][0] != "-":
            near = get_close_matches(args[0], VERBS, n=1, cutoff=0.0)[0]
            raise click.UsageError(f"no verb {args[0]!r}; the nearest is {near!r}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitcask", prog_name="logitcask")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Score once, train many: distillation of language models from a store of teacher scores.

    Exit codes: 0 ok, 1 error, 2 usage, 3 incomplete, 4 damaged data, 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a verb and turns its end into an exit code and at most two lines."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(run(arguments))


def run(arguments: list[str]) -> int:
    """Exit code of `logitcask ARGUMENTS`; messages go to stderr."""
    try:
        cli.main(args=arguments, prog_name="logitcask", standalone_mode=False)
    except LogitcaskError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        _say(error.cause, error.hint)
        return error.exit_code
    except Exit as end:
        return end.exit_code
    except SystemExit as end:
        # rich_click exits by itself: a group without a verb shows its help, and a closed pipe.
        return end.code if isinstance(end.code, int) else 1
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: committed units stay. Rerun the same command to resume.", err=True)
        return 130
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        _say(error.format_message(), f"{context.command_path if context else 'logitcask'} --help")
        return error.exit_code
    return 0


def _say(cause: str, hint: str) -> None:
    """One line each, whatever a library's message or a file's name holds."""
    cause, hint = (visible(" ".join(text.splitlines())) for text in (cause, hint))
    click.echo(f"error: {cause}\nhint: {hint}", err=True)
