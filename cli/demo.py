"""`logitcask demo`: every stage on a built-in task, from scratch."""

import json
from pathlib import Path

import rich_click as click

from logitcask.cli.options import format_option
from logitcask.cli.progress import progress_bar


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    help="Folder of the models, the store and the runs; a second run reuses it.",
)
@click.option(
    "--objective",
    default="overlap",
    show_default=True,
    help="Named objective of the loss. Another one trains from the same store: nothing is sampled "
    "or scored again.",
)
@click.option("--fast", is_flag=True, help="Smaller task and models: under two minutes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of every random draw.")
@format_option
def demo_command(out: Path, objective: str, fast: bool, seed: int, form: str) -> None:
    """Run every stage on a toy task on this machine, in minutes.

    Creates sums of integers, trains a tiny teacher and a weaker student on them, samples from the
    student, scores the samples once with the teacher, and trains the student from the store.

    Example: logitcask demo --out demo-out
    """
    from logitcask.engine.demo import run_demo

    with progress_bar() as progress:
        result = run_demo(out, objective=objective, fast=fast, seed=seed, progress=progress)
    click.echo(json.dumps(result.as_json()) if form == "json" else result.as_text())
