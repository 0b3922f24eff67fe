"""`logitcask demo`: the whole way on a task of our own, from scratch."""

import json
from pathlib import Path

import rich_click as click

from logitcask.cli.options import format_option
from logitcask.cli.output import progress_bar


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    help="Folder of the models, the store and the runs; kept, so that a second run reuses them.",
)
@click.option(
    "--objective",
    default="overlap",
    show_default=True,
    help="Preset of the loss. Another one retrains from the same store: nothing is sampled or "
    "scored again.",
)
@click.option("--fast", is_flag=True, help="Smaller task and models: under two minutes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seeds everything.")
@format_option
def demo_command(out: Path, objective: str, fast: bool, seed: int, form: str) -> None:
    """From nothing to a better student on this machine, in minutes.

    Makes sums of integers, trains a tiny teacher and a weaker student on them, samples from the
    student, lets the teacher score that once, and trains the student from the store.

    Example: logitcask demo --out demo-out
    """
    from logitcask.engine.demo import run_demo

    with progress_bar() as progress:
        result = run_demo(out, objective=objective, fast=fast, seed=seed, progress=progress)
    if form == "json":
        click.echo(json.dumps(result.as_json()))
        return
    click.echo(result.as_text())
