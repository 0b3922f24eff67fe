"""`logitcask ablate`: every combination of some settings, from one snapshot, in one table."""

from pathlib import Path
from typing import Any

import rich_click as click

from logitcask.cli.options import format_option, job_from_flags, job_options
from logitcask.cli.output import print_result, print_table, progress_bar
from logitcask.engine.config.sections import AblateConfig, TrainConfig
from logitcask.engine.config.toml import read_job
from logitcask.engine.config.training import Ablate


@click.command("ablate")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--vary",
    multiple=True,
    required=True,
    metavar="KEY=VALUE,VALUE",
    help="A key of the file and its values; may be given again: all combinations are trained.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a key of the file; may be given again.",
)
@job_options(AblateConfig, {"ablate": list(Ablate.model_fields)})
@format_option
def ablate_command(
    config: Path, vary: tuple[str, ...], overrides: tuple[str, ...], form: str, **flags: Any
) -> None:
    """Train every combination of some settings from one snapshot of a store, and compare them.

    CONFIG is what `logitcask train --dry-run` prints. No rollout is sampled and no teacher is
    asked. Means and spreads over the seeds go to stdout and to ablate.json and ablate.md. Rerun the
    same command to resume; runs that are finished are not trained again.

    Example: logitcask ablate train.toml --vary objective=opd,overlap --seeds 3 --out ./ablation
    """
    settings = job_from_flags(AblateConfig, flags).ablate
    job = read_job(TrainConfig, config, overrides)
    from logitcask.engine.ablate import ablate, footnotes, table

    with progress_bar() as progress:
        report = ablate(
            job,
            vary,
            settings,
            progress=progress,
            on_event=lambda line: click.echo(line, err=True),
        )
    if form == "json":
        print_result(report, form)
        return
    print_table(table(report), form)
    for line in footnotes(report):
        click.echo(line)
