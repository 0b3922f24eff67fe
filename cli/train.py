"""`logitcask train`: train a student from stored scores."""

from typing import Any

import rich_click as click

from logitcask.cli.options import (
    config_from_flags,
    config_options,
    dry_run_option,
    format_option,
)
from logitcask.cli.output import print_event, print_result
from logitcask.cli.progress import progress_bar
from logitcask.engine.config.sections import TrainConfig
from logitcask.engine.config.toml import to_toml
from logitcask.engine.config.training import Eval, Lora, Train


@click.command("train")
@config_options(
    TrainConfig,
    {
        "student": ["model", "revision"],
        "store": ["url", "rollouts"],
        "train": list(Train.model_fields),
        "lora": list(Lora.model_fields),
        "eval": list(Eval.model_fields),
        "run": ["out", "overwrite", "device", "dtype", "batch_tokens", "seed"],
    },
)
@format_option
@dry_run_option
def train_command(form: str, dry_run: bool, **flags: Any) -> None:
    """Train a student from stored scores, without a teacher.

    The run reads one snapshot of the store, so records that are added later change nothing. It
    prints what the store serves exactly for this objective, and what it does not, before the first
    update. Rerun the same command to resume from the newest checkpoint.

    Example: logitcask train --model ./student --store ./store --objective overlap --out ./run
    """
    config = config_from_flags(TrainConfig, flags)
    if dry_run:
        from logitcask.engine.commands.prove import prove

        prove(config, print_event)
        click.echo(to_toml(config))
        return
    from logitcask.engine.commands.train import run_train

    with progress_bar() as progress:
        report = run_train(config, progress=progress, on_event=print_event)
    print_result(report, form)
