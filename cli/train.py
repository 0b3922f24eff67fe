"""`logitcask train`: train a student from stored scores."""

import os
from dataclasses import asdict
from typing import Any

import rich_click as click

from logitcask.cli.options import (
    config_from_flags,
    config_options,
    dry_run_option,
    format_option,
)
from logitcask.cli.output import print_event, print_result, print_table
from logitcask.cli.progress import progress_bar
from logitcask.engine.config.parse.toml import to_toml
from logitcask.engine.config.sections import TrainConfig
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
@click.option(
    "--estimate",
    is_flag=True,
    help="Print the memory that a process needs, from config.json and the lengths of the rollouts, "
    "and stop; no weights are read.",
)
@click.option(
    "--world-size",
    type=click.IntRange(min=1),
    envvar="WORLD_SIZE",
    default=1,
    show_default=True,
    help="Processes of a run for --estimate.",
)
@format_option
@dry_run_option
def train_command(form: str, dry_run: bool, estimate: bool, world_size: int, **flags: Any) -> None:
    """Train a student from stored scores, without a teacher.

    The run reads one snapshot of the store, so records that are added later change nothing. It
    prints what the store serves exactly for this objective, and what it does not, before the first
    update. Rerun the same command to resume from the newest checkpoint.

    Example: logitcask train --model ./student --store ./store --objective overlap --out ./run
    """
    config = config_from_flags(TrainConfig, flags)
    if estimate:
        from logitcask.engine.commands.train import estimate_train
        from logitcask.engine.training.memory.estimate import rows_of

        found = estimate_train(config, world_size)
        if form == "json":
            print_result({**asdict(found), "peak": found.peak}, form)
        else:
            print_table(rows_of(found), form)
        return
    if dry_run:
        from logitcask.engine.commands.prove import prove

        with progress_bar():
            prove(config, print_event)
        click.echo(to_toml(config))
        return
    from logitcask.engine.commands.train import run_train

    # Under torchrun one process speaks for all.
    if os.environ.get("RANK", "0") != "0":
        run_train(config)
        return
    with progress_bar() as progress:
        report = run_train(config, progress=progress, on_event=print_event)
    print_result(report, form)
