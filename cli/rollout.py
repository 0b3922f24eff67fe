"""`logitcask rollout`: the student samples responses."""

from typing import Any

import rich_click as click

from logitcask.cli.options import (
    MODEL_FLAGS,
    dry_run_option,
    format_option,
    job_from_flags,
    job_options,
)
from logitcask.cli.output import print_report, progress_bar
from logitcask.engine.config import Rollout, RolloutJob
from logitcask.engine.configfile import to_toml


@click.command("rollout")
@job_options(
    RolloutJob,
    {
        "student": ["model", "revision"],
        "prompts": ["file", "chat_template"],
        "store": ["url", "rollouts", "profile"],
        "rollout": list(Rollout.model_fields),
        "run": MODEL_FLAGS,
    },
)
@format_option
@dry_run_option
def rollout_command(form: str, dry_run: bool, **flags: Any) -> None:
    """Sample responses from the student into a store.

    The student's own top-k of every position is stored with them. What is committed is never
    sampled again: the same command goes on where it was stopped.

    Example: logitcask rollout --model ./student --prompts prompts.jsonl --store ./store
    """
    job = job_from_flags(RolloutJob, flags)
    if dry_run:
        click.echo(to_toml(job))
        return
    from logitcask.engine.jobs import run_rollout

    with progress_bar() as progress:
        report = run_rollout(job, progress=progress)
    print_report(report, form)
