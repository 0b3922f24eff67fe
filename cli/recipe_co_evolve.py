"""`logitcask recipe co-evolve`: two students that score each other."""

import shlex
from pathlib import Path

import rich_click as click

from logitcask.cli.approve import approve_with, yes_option
from logitcask.cli.options import config_file_arguments, flags_of, format_option
from logitcask.cli.output import print_event, print_result
from logitcask.cli.progress import progress_bar
from logitcask.engine.config.parse.toml import read_toml


@click.command("co-evolve")
@config_file_arguments
@yes_option
@format_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check prompts and models, print the commands of all rounds, and stop.",
)
def co_evolve_command(
    config: Path, overrides: tuple[str, ...], yes: bool, form: str, dry_run: bool
) -> None:
    """Train two students that score each other's responses, in rounds (arXiv 2604.27083).

    The teacher of the file is the second student. In each round both sample the next prompts, each
    scores the other one's responses, and each learns from the other one's scores, by `rollout`,
    `score` and `train`; --dry-run prints these commands. Rerun the same command to resume, and with
    a larger loop.rounds to go on.

    Example: logitcask recipe co-evolve distill.toml --set loop.rounds=4
    """
    resolved = read_toml(config, overrides)
    if dry_run:
        from logitcask.engine.recipes.co_evolve.plan import steps
        from logitcask.engine.recipes.co_evolve.run import prove_co_evolve

        with progress_bar():
            pairing = prove_co_evolve(resolved, print_event)
        for step in steps(resolved, pairing):
            click.echo(shlex.join(["logitcask", step.command, *flags_of(step.config)]))
        return
    from logitcask.engine.recipes.co_evolve.run import run_co_evolve

    with progress_bar() as progress:
        report = run_co_evolve(
            resolved,
            file=str(config),
            overrides=overrides,
            progress=progress,
            on_event=print_event,
            approve=approve_with(yes),
        )
    print_result(report, form)
