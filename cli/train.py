"""`logitcask train`: a student learns from stored scores."""

from typing import Any

import rich_click as click

from logitcask.cli.options import dry_run_option, format_option, job_from_flags, job_options
from logitcask.cli.output import print_result, progress_bar
from logitcask.engine.config.sections import TrainConfig
from logitcask.engine.config.toml import to_toml
from logitcask.engine.config.training import Eval, Train


@click.command("train")
@job_options(
    TrainConfig,
    {
        "student": ["model", "revision"],
        "store": ["url", "rollouts"],
        "train": list(Train.model_fields),
        "eval": list(Eval.model_fields),
        "run": ["out", "overwrite", "device", "dtype", "batch_tokens", "seed"],
    },
)
@format_option
@dry_run_option
def train_command(form: str, dry_run: bool, **flags: Any) -> None:
    """Train a student from stored scores, without a teacher.

    The store is pinned at its newest record, so what others add meanwhile changes nothing. What
    the cache serves exactly for this objective, and what not, is printed before the first update.
    Rerun the same command to resume from the newest checkpoint.

    Example: logitcask train --model ./student --store ./store --objective overlap --out ./run
    """
    job = job_from_flags(TrainConfig, flags)
    if dry_run:
        click.echo(to_toml(job))
        return
    from logitcask.engine.commands.stages import run_train

    with progress_bar() as progress:
        report = run_train(job, progress=progress, on_event=lambda line: click.echo(line, err=True))
    print_result(report, form)
