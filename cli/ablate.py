"""`logitcask ablate`: train every combination of some settings, and compare them in one table."""

from pathlib import Path
from typing import Any

import rich_click as click

from logitcask.cli.approve import approve_with, yes_option
from logitcask.cli.options import (
    config_file_arguments,
    config_from_flags,
    config_options,
    format_option,
)
from logitcask.cli.output import print_event, print_result, print_table
from logitcask.cli.progress import progress_bar
from logitcask.engine.config.parse.toml import read_job
from logitcask.engine.config.sections import AblateConfig, TrainConfig
from logitcask.engine.config.training import Ablate


@click.command("ablate")
@config_file_arguments
@click.option(
    "--vary",
    multiple=True,
    required=True,
    metavar="KEY=VALUE,VALUE",
    help="A key of the file and its values; repeatable: all combinations are trained.",
)
@config_options(AblateConfig, {"ablate": list(Ablate.model_fields)})
@yes_option
@format_option
def ablate_command(
    config: Path,
    vary: tuple[str, ...],
    overrides: tuple[str, ...],
    yes: bool,
    form: str,
    **flags: Any,
) -> None:
    """Train every combination of some settings from one snapshot, and compare them.

    CONFIG is a file with the output of `logitcask train --dry-run`. No rollout is sampled and no
    teacher is needed. Means and spreads over the seeds go to stdout, ablate.json and ablate.md.
    Rerun the same command to resume: finished runs are not trained again.

    Example: logitcask ablate train.toml --vary objective=opd,overlap --seeds 3 --out ./ablation
    """
    settings = config_from_flags(AblateConfig, flags).ablate
    base = read_job(TrainConfig, config, overrides)
    from logitcask.engine.ablate import ablate
    from logitcask.engine.ablate_table import footnotes, table

    with progress_bar() as progress:
        report = ablate(
            base,
            vary,
            settings,
            progress=progress,
            on_event=print_event,
            approve=approve_with(yes),
        )
    if form == "json":
        print_result(report, form)
        return
    print_table(table(report.rows), form)
    for line in footnotes(report):
        click.echo(line)
