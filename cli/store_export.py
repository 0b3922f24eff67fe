"""`logitcask store export`: stored scores as a table for other programs."""

from pathlib import Path
from typing import Literal

import rich_click as click

from logitcask.cli.output import print_event, print_result
from logitcask.cli.progress import progress_bar


@click.command("export")
@click.argument("url")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice(["parquet", "axolotl", "distillkit", "trl"]),
    default="parquet",
    show_default=True,
    help="parquet = a row for each position, all values; others = a row for each sequence, with "
    "the teacher's best ids, for that trainer.",
)
@click.option("--rollouts", help="Name of a set of rollouts; may be left out when there is one.")
@click.option("--teacher", help="Whose scores; may be left out when there is one.")
@click.option("--snapshot", help="Log number or tag; default: the newest.")
@click.option(
    "--k",
    type=click.IntRange(min=1),
    help="Best ids of each position, for trainers; default: as many as every position has.",
)
@click.option("--tokenizer", help="Model folder or hub id of the student, for the tokens' texts.")
@click.option("--force", is_flag=True, help="Replace the file OUT.")
def export_command(
    url: str,
    out: Path,
    kind: Literal["parquet", "axolotl", "distillkit", "trl"],
    rollouts: str | None,
    teacher: str | None,
    snapshot: str | None,
    k: int | None,
    tokenizer: str | None,
    force: bool,
) -> None:
    """Write stored scores into OUT: a row per response position, or the data set of a trainer.

    An OUT that ends in .parquet is one file. Any other OUT is a folder with a file per segment: the
    same command resumes there. engine/exchange/README.md explains the columns, and what
    each format cannot hold.

    Example: logitcask store export ./store positions.parquet
    """
    from logitcask.engine.commands.resolve import snapshot_of
    from logitcask.engine.errors import ConfigError
    from logitcask.engine.exchange.parquet import export_parquet
    from logitcask.engine.exchange.scored.trainers import export_trainer
    from logitcask.engine.store import open_store

    if kind == "parquet" and k is not None:
        raise ConfigError(
            "--k with --format parquet, which has all stored ids", hint="leave --k out"
        )
    if kind != "parquet" and tokenizer is not None:
        raise ConfigError(
            f"--tokenizer with --format {kind}, which has ids and no texts",
            hint="leave --tokenizer out",
        )
    store = open_store(url)
    found = None if snapshot is None else snapshot_of(store, snapshot)
    with progress_bar() as progress:
        if kind == "parquet":
            report = export_parquet(
                store,
                out,
                snapshot=found,
                rollouts=rollouts,
                teacher=teacher,
                tokenizer=tokenizer,
                force=force,
                progress=progress,
            )
        else:
            report = export_trainer(
                store,
                out,
                kind,
                k=k,
                snapshot=found,
                rollouts=rollouts,
                teacher=teacher,
                force=force,
                progress=progress,
                on_event=print_event,
            )
    print_result(report, "text")
