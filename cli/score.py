"""`logitcask score`: score stored rollouts with a teacher."""

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
from logitcask.engine.config.sections import ScoreConfig
from logitcask.engine.config.teacher import Score, Teacher


@click.command("score")
@config_options(
    ScoreConfig,
    {
        "teacher": list(Teacher.model_fields),
        "store": ["url", "rollouts", "profile"],
        "score": list(Score.model_fields),
        "work": WORKER_KEYS,
        "runner": ["kind", "score", "score_resources", *RAY_KEYS],
        "run": MODEL_KEYS,
    },
)
@yes_option
@format_option
@dry_run_option
def score_command(yes: bool, form: str, dry_run: bool, **flags: Any) -> None:
    """Score stored rollouts with a teacher.

    For every position the teacher's most likely ids, its log-probs at the student's stored ids, the
    tail and the entropy go into the store. Nothing is scored twice: rerun the same command to
    resume, and to score rollouts that were added since. With --worker it stays, as one of any
    number of workers on the store, and waits for rollouts. With --runner ray the
    units are done by actors of a Ray cluster.

    Example: logitcask score --model ./teacher --store ./store --teacher big
    """
    config = config_from_flags(ScoreConfig, flags)
    if dry_run:
        from logitcask.engine.commands.prove import prove

        with progress_bar():
            prove(config, print_event)
        click.echo(to_toml(config))
        return
    if config.work.worker:
        from logitcask.engine.commands.worker import watch_scores

        run_until_stopped(watch_scores, config, form)
        return
    if config.runner.kind == "ray":
        from logitcask.engine.commands.on_ray import score_on_ray

        with stop_at_sigterm() as stop, progress_bar() as progress:
            report = score_on_ray(config, stop=stop, progress=progress, on_event=print_event)
        print_report(report, form)
        return
    from logitcask.engine.commands.score import run_score

    with progress_bar() as progress:
        report = run_score(
            config, progress=progress, on_event=print_event, approve=approve_with(yes)
        )
    print_report(report, form)
