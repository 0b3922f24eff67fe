"""`logitcask rollout`: the student samples responses."""

from typing import Any

import rich_click as click

from logitcask.cli.options import (
    MODEL_FLAGS,
    WORK_FLAGS,
    dry_run_option,
    format_option,
    job_from_flags,
    job_options,
)
from logitcask.cli.output import print_report, progress_bar
from logitcask.cli.watch import run_watch
from logitcask.engine.config.sections import Rollout, RolloutConfig
from logitcask.engine.config.toml import to_toml


@click.command("rollout")
@job_options(
    RolloutConfig,
    {
        "student": ["model", "revision"],
        "prompts": ["file", "chat_template"],
        "store": ["url", "rollouts", "profile"],
        "rollout": list(Rollout.model_fields),
        "work": [*WORK_FLAGS, "max_unscored"],
        "run": MODEL_FLAGS,
    },
)
@format_option
@dry_run_option
def rollout_command(form: str, dry_run: bool, **flags: Any) -> None:
    """Sample responses from the student into a store.

    The student's own top-k of every position is stored with them. What is committed is never
    sampled again. Rerun the same command to resume. With --watch it stays, as one of any number of
    workers on the store, and samples again when the folder holds a later version of the student.

    Example: logitcask rollout --model ./student --prompts prompts.jsonl --store ./store
    """
    job = job_from_flags(RolloutConfig, flags)
    if dry_run:
        click.echo(to_toml(job))
        return
    if job.work.watch:
        from logitcask.engine.commands.worker import watch_rollouts

        run_watch(watch_rollouts, job, form)
        return
    from logitcask.engine.commands.stages import run_rollout

    with progress_bar() as progress:
        report = run_rollout(job, progress=progress)
    print_report(report, form)
