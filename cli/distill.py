"""`logitcask distill`: rounds of rollout, score and train from one file."""

from pathlib import Path

import rich_click as click

from logitcask.cli.options import config_file_arguments, dry_run_option, format_option
from logitcask.cli.output import print_event, print_result
from logitcask.cli.progress import progress_bar
from logitcask.engine.config.toml import read_toml, to_toml


@click.command("distill")
@config_file_arguments
@format_option
@dry_run_option
def distill_command(config: Path, overrides: tuple[str, ...], form: str, dry_run: bool) -> None:
    """Run rounds of rollout, score and train from a TOML file.

    In every round the current student samples, the teacher scores, and the student is updated.
    Rerun the same command to resume: after an interruption at any point, the loop ends with the
    same student.

    The file CONFIG takes the keys that are flags of rollout, score and train, and those of [loop]:
    rounds, prompts_per_round, updates_per_round. --dry-run prints all of them with their values.

    Example: logitcask distill distill.toml --set train.lr=1e-5
    """
    resolved = read_toml(config, overrides)
    if dry_run:
        from logitcask.engine.commands.prove import prove

        prove(resolved, print_event)
        click.echo(to_toml(resolved))
        return
    from logitcask.engine.distill.loop import distill

    with progress_bar("prompts") as progress:
        report = distill(resolved, progress=progress, on_event=print_event)
    print_result(report, form)
