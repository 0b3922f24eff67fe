"""`logitcask distill`: rounds of rollout, score and train from one file."""

import os
from pathlib import Path
from typing import Any, cast

import rich_click as click

from logitcask.cli.approve import approve_with, yes_option
from logitcask.cli.completion import complete_recipe
from logitcask.cli.options import (
    config_options,
    dry_run_option,
    format_option,
    set_option,
)
from logitcask.cli.output import print_event, print_result
from logitcask.cli.progress import progress_bar
from logitcask.cli.worker import stop_at_sigterm
from logitcask.engine.config.parse.toml import to_toml
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.recipes.named import load_recipe, read_recipe

NAME_WIDTH = len("rollout-0")


@click.command("distill")
@click.argument("config", type=click.Path(path_type=Path), required=False)
@set_option
@click.option(
    "--recipe",
    metavar="NAME",
    shell_complete=complete_recipe,
    help="Begin with the named settings of a recipe; keys of CONFIG and of --set override them. "
    "`logitcask recipe list` shows all. With --dry-run nothing is downloaded then.",
)
@config_options(RunConfig, {"runner": ["kind"]})
@click.option(
    "--role",
    type=click.Choice(["rollout", "score", "train"]),
    help="Do the work of one role of the loop in this process, until nothing of it is left. Start "
    "rollout and score as often as you like, on any machine that sees the store and run.out.",
)
@click.option(
    "--index",
    type=click.IntRange(min=0),
    help="With --role: number of this process among those of the role, for one process at a time. "
    "It takes over what an earlier one left undone at once, and not after --lease-seconds.",
)
@yes_option
@format_option
@dry_run_option
def distill_command(
    config: Path | None,
    overrides: tuple[str, ...],
    recipe: str | None,
    runner__kind: str | None,
    role: str | None,
    index: int | None,
    yes: bool,
    form: str,
    dry_run: bool,
) -> None:
    """Run rounds of rollout, score and train from a TOML file.

    In every round the current student samples, the teacher scores, and the student is updated.
    Rerun the same command to resume: after an interruption at any point, the loop ends with the
    same student.

    With --runner processes they do so at the same time, in processes that are started again when
    they die; with --runner ray, in actors of a Ray cluster.

    The file CONFIG takes the keys that are flags of rollout, score and train, and those of [loop]
    and [runner]. --dry-run prints all of them with their values. With --recipe it may be left out,
    and needs no key that the recipe sets.

    Example: logitcask distill distill.toml --set train.learning_rate=1e-5
    """
    if runner__kind is not None:
        overrides = (*overrides, f"runner.kind={runner__kind}")
    if config is None and recipe is None:
        raise click.UsageError(
            "give CONFIG, a TOML file, or --recipe NAME", click.get_current_context()
        )
    if dry_run and recipe is not None:
        from logitcask.engine.recipes.dry_run import check_recipe

        tables = load_recipe(recipe).tables
        with progress_bar():
            checked, missing = check_recipe(tables, config, overrides, print_event)
        click.echo(to_toml(checked, missing))
        return
    resolved = read_recipe(recipe, config, overrides)
    if dry_run:
        from logitcask.engine.commands.prove import prove

        with progress_bar():
            prove(resolved, print_event)
        click.echo(to_toml(resolved))
        return
    if role is not None:
        _run_role(resolved, role, index, form)
        return
    from logitcask.engine.estimate.left import loop_left

    approve_with(yes)(loop_left(resolved))
    if resolved.runner.kind == "processes":
        from logitcask.engine.distill.processes import run_processes

        sets = [word for text in overrides for word in ("--set", text)]
        file = [] if config is None else [str(config)]
        words = [*file, *(["--recipe", recipe] if recipe else []), *sets, "--format", form]
        on_line = _print_line if form == "text" else None
        click.echo(run_processes(resolved, words, on_event=print_event, on_line=on_line), nl=False)
        return
    if resolved.runner.kind == "ray":
        from logitcask.engine.distill.on_ray import distill_on_ray

        with stop_at_sigterm() as stop, progress_bar() as progress:
            report = distill_on_ray(resolved, stop=stop, progress=progress, on_event=print_event)
        print_result(report, form)
        return
    from logitcask.engine.distill.loop import distill

    with progress_bar("prompts") as progress:
        report = distill(resolved, progress=progress, on_event=print_event)
    print_result(report, form)


def _print_line(name: str, line: str) -> None:
    print_event(f"{name:<{NAME_WIDTH}}  {line}")


def _run_role(config: RunConfig, role: str, index: int | None, form: str) -> None:
    """Run a role; SIGTERM ends rollout and score after the unit in hand."""
    from logitcask.engine.distill.roles import run_role, train_role
    from logitcask.engine.workers.worker import check_failed

    if role != "train":
        with stop_at_sigterm() as stop, progress_bar() as bar:
            report = run_role(
                config, cast(Any, role), index=index, stop=stop, progress=bar, on_event=print_event
            )
        print_result(report, form)
        check_failed(report.failed, report.first_error, config.store.url)
    elif os.environ.get("RANK", "0") != "0":  # under torchrun one process speaks for all
        train_role(config)
    else:
        with progress_bar() as bar:
            trained = train_role(config, progress=bar, on_event=print_event)
        print_result(trained, form)
