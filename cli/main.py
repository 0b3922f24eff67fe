"""The command `logitcask`: its verbs, its error messages and its exit codes."""

import importlib
import logging
import re
import signal
import sys
import threading
import traceback

import rich_click as click
from click.exceptions import Exit

from logitcask.cli.options import flag_hint
from logitcask.cli.output import visible, visible_lines
from logitcask.engine.config.parse.other_names import suggest
from logitcask.engine.errors import LogitcaskError

VERBS = (
    "init",
    *("rollout", "import", "score", "tap", "train", "distill", "recipe", "ablate"),
    *("objectives", "evaluate", "store", "probe", "report", "doctor", "demo", "bench"),
    "completion",
)
"""In the order of the data. The module of a verb is cli/VERB.py, imported when it is used."""

OTHER_VERBS = {
    "init": "new quickstart",
    "rollout": "generate sample",
    "import": "convert adopt load",
    "score": "label logprobs teacher",
    "tap": "proxy record serve",
    "train": "sft fit finetune",
    "distill": "run loop",
    "recipe": "cold-start best-of-n reverse co-evolve",
    "ablate": "sweep",
    "store": "info ls show verify snapshot gc cache",
    "evaluate": "eval",
    "probe": "metrics",
    "report": "html view dashboard plot",
    "doctor": "check",
}
"""Verb -> other words for it, and the commands below it."""

EXIT_CODES = {
    0: "ok",
    1: "error",
    2: "usage",
    3: "incomplete",
    4: "damaged data",
    130: "interrupted",
}


class Verbs(click.RichGroup):
    """A group that imports a verb when it is used: `--help` must not load torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all verbs."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a verb and return its command."""
        if name not in VERBS:
            return None
        module = importlib.import_module(f"logitcask.cli.{name}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb of `args`; raise UsageError with the nearest name."""
        # A completion of a command that is not finished is no error.
        if args[0] not in VERBS and args[0][0] != "-" and not ctx.resilient_parsing:
            same = [verb for verb, others in OTHER_VERBS.items() if args[0] in others.split()]
            hint = suggest(args[0], VERBS, same) or f"known: {', '.join(VERBS)}"
            raise click.UsageError(f"no verb {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Score once, train many: distillation of language models from a store of teacher scores."
    f"\n\nExit codes: {', '.join(f'{code} {name}' for code, name in EXIT_CODES.items())}.",
)
@click.version_option(package_name="logitcask", prog_name="logitcask")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Hold the verbs; `run` reads --debug itself."""


def main(arguments: list[str] | None = None) -> None:
    """Run a verb as the process's entry point, and exit with its code."""
    # Libraries log and warn on stderr, with names from files and servers.
    logging.setLogRecordFactory(_VisibleRecord)
    logging.captureWarnings(True)
    sys.unraisablehook = _interrupt_again
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def _interrupt_again(lost: "sys.UnraisableHookArgs") -> None:
    """Repeat a Ctrl-C that reached a finaliser: Python drops what is raised there."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        # Later, and from another thread: here it would be dropped once more.
        again = (threading.main_thread().ident, signal.SIGINT)
        threading.Timer(0.05, signal.pthread_kill, again).start()
    else:
        sys.__unraisablehook__(lost)


class _VisibleRecord(logging.LogRecord):
    """A log record whose message is safe for a terminal."""

    def getMessage(self) -> str:
        return visible_lines(super().getMessage())


def run(arguments: list[str]) -> int:
    """Run `logitcask ARGUMENTS` and return its exit code; messages go to stderr."""
    try:
        cli.main(args=arguments, prog_name="logitcask", standalone_mode=False)
    except Exit as end:
        return end.exit_code
    except SystemExit as end:
        # rich_click exits by itself: for a group without a verb, and for a closed pipe.
        return end.code if isinstance(end.code, int) else 1
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: committed units stay. Rerun the same command to resume.", err=True)
        return 130
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        path = context.command_path if context else "logitcask"
        cause, hint = error.format_message(), f"{path} --help"
        if isinstance(error, click.NoSuchOption):
            # Without click's own matches, which include bad ones.
            cause, hint = error.message, "; ".join(filter(None, (flag_hint(error), hint)))
        _print_error(cause, hint)
        return error.exit_code
    except Exception as error:
        message = _message(error)
        if "--debug" in arguments or message is None:
            click.echo(visible_lines(traceback.format_exc()), err=True)
        if message is None:
            click.echo(BUG, err=True)
        else:
            _print_error(*message)
        return error.exit_code if isinstance(error, LogitcaskError) else 1
    return 0


BUG = (
    "bug: this error should have had a message; report the lines above with the command and the "
    "output of `pip freeze`. Committed units stay."
)
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


def _message(error: Exception) -> tuple[str, str] | None:
    """Return (cause, hint) of an error; None for one that only a programmer can mend."""
    if isinstance(error, LogitcaskError):
        return error.cause, error.hint
    text = next(iter(str(error).splitlines()), "")
    # torch's own error for a GPU is a RuntimeError, and for a CPU nothing but its text.
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(text)
    ):
        return (
            f"out of memory: {text or 'the system gave no more'}",
            "give smaller --batch-tokens or --pack-length, a smaller model, or more memory",
        )
    if isinstance(error, OSError):
        from logitcask.engine.store.storage.local import DISK_HINTS

        cause = error.strerror or f"{type(error).__name__}: {text}"
        place = f"{error.filename}: " if error.filename else ""
        hint = "check that path, its disk and the network; --debug shows the place in the program"
        return f"{place}{cause}", DISK_HINTS.get(error.errno or 0, hint)
    return None


def _print_error(cause: str, hint: str) -> None:
    """Print one line each, for any text of a library's message or a file's name."""
    cause, hint = (visible(" ".join(text.splitlines())) for text in (cause, hint))
    click.echo(f"error: {cause}\nhint: {hint}", err=True)


if __name__ == "__main__":
    main()
