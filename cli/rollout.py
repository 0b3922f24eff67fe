"""`logitcask rollout`: sample responses from the student."""

from typing import Any

import rich_click as click

from logitcask.cli.approve import approve_with, yes_option
from logitcask.cli.options import (
    MODEL_KEYS,
    RAY_KEYS,
    WORKER_KEYS,
    config_from_flags,
    config_options,
    dry_run_option,
    format_option,
)
from logitcask.cli.output import print_event, print_report
from logitcask.cli.progress import progress_bar
from logitcask.cli.worker import run_until_stopped, stop_at_sigterm
from logitcask.engine.config.parse.toml import to_toml
from logitcask.engine.config.prompts import Prompts
from logitcask.engine.config.sections import Rollout, RolloutConfig


@click.command("rollout")
@config_options(
    RolloutConfig,
    {
        "student": ["model", "revision"],
        "prompts": sorted(Prompts.model_fields, key="file".__ne__),  # the file first
        "store": ["url", "rollouts", "profile"],
        "rollout": list(Rollout.model_fields),
        "work": [*WORKER_KEYS, "prompts_per_version", "max_unscored"],
        "runner": ["kind", "rollout", "rollout_resources", *RAY_KEYS],
        "run": MODEL_KEYS,
    },
)
@yes_option
@format_option
@dry_run_option
def rollout_command(yes: bool, form: str, dry_run: bool, **flags: Any) -> None:
    """Sample responses from the student into a store.

    The student's own top-k of every position is stored with them. Committed units are never sampled
    again: rerun the same command to resume. With --worker it stays, as one of any number of workers
    on the store, and samples again when the folder holds a later version of the student.
    With --runner ray the units are done by actors of a Ray cluster.

    Example: logitcask rollout --model ./student --prompts prompts.jsonl --store ./store
    """
    config = config_from_flags(RolloutConfig, flags)
    if dry_run:
        from logitcask.engine.commands.prove import prove

        with progress_bar():
            prove(config, print_event)
        click.echo(to_toml(config))
        return
    if config.work.worker:
        from logitcask.engine.commands.worker import watch_rollouts

        run_until_stopped(watch_rollouts, config, form)
        return
    if config.runner.kind == "ray":
        from logitcask.engine.commands.on_ray import rollout_on_ray

        with stop_at_sigterm() as stop, progress_bar() as progress:
            report = rollout_on_ray(config, stop=stop, progress=progress, on_event=print_event)
        print_report(report, form)
        return
    from logitcask.engine.commands.rollout import run_rollout

    with progress_bar() as progress:
        report = run_rollout(
            config, progress=progress, on_event=print_event, approve=approve_with(yes)
        )
    print_report(report, form)
