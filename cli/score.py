"""`logitcask score`: a teacher scores stored rollouts."""

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
from logitcask.engine.config.sections import ScoreConfig
from logitcask.engine.config.teacher import Score, Teacher
from logitcask.engine.config.toml import to_toml


@click.command("score")
@job_options(
    ScoreConfig,
    {
        "teacher": list(Teacher.model_fields),
        "store": ["url", "rollouts", "profile"],
        "score": list(Score.model_fields),
        "work": WORK_FLAGS,
        "run": MODEL_FLAGS,
    },
)
@format_option
@dry_run_option
def score_command(form: str, dry_run: bool, **flags: Any) -> None:
    """Let a teacher score stored rollouts.

    The teacher's most likely ids, its log-probs at the student's stored ids, the tail and the
    entropy of every position go into the store. Nothing is scored twice. Rerun the same command to
    resume, and to score rollouts that were added meanwhile. With --watch it stays, as one of any
    number of workers on the store, and waits for rollouts.

    Example: logitcask score --model ./teacher --store ./store --teacher big
    """
    job = job_from_flags(ScoreConfig, flags)
    if dry_run:
        click.echo(to_toml(job))
        return
    if job.work.watch:
        from logitcask.engine.commands.worker import watch_scores

        run_watch(watch_scores, job, form)
        return
    from logitcask.engine.commands.stages import run_score

    with progress_bar() as progress:
        report = run_score(job, progress=progress, on_event=lambda line: click.echo(line, err=True))
    print_report(report, form)
