"""`logitcask store export`: stored scores as a table for other programs."""

from pathlib import Path

import rich_click as click

from logitcask.cli.output import print_result
from logitcask.cli.progress import progress_bar


@click.command("export")
@click.argument("url")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice(["parquet"]),
    default="parquet",
    show_default=True,
    help="Format of the files.",
)
@click.option("--rollouts", help="Name of a set of rollouts; may be left out when there is one.")
@click.option("--teacher", help="Whose scores; may be left out when there is one.")
@click.option("--snapshot", help="Log number or tag; default: the newest.")
@click.option("--tokenizer", help="Model folder or hub id of the student, for the tokens' texts.")
@click.option("--force", is_flag=True, help="Replace the file OUT.")
def export_command(
    url: str,
    out: Path,
    kind: str,
    rollouts: str | None,
    teacher: str | None,
    snapshot: str | None,
    tokenizer: str | None,
    force: bool,
) -> None:
    """Write one row per response position into OUT, for DuckDB, pandas and other readers.

    An OUT that ends in .parquet is one file. Any other OUT is a folder with a file per segment: the
    same command resumes there. engine/exchange/README.md explains the columns.

    Example: logitcask store export ./store positions.parquet
    """
    from logitcask.engine.commands.resolve import snapshot_of
    from logitcask.engine.exchange.parquet import export_parquet
    from logitcask.engine.store import open_store

    store = open_store(url)
    with progress_bar() as progress:
        report = export_parquet(
            store,
            out,
            snapshot=None if snapshot is None else snapshot_of(store, snapshot),
            rollouts=rollouts,
            teacher=teacher,
            tokenizer=tokenizer,
            force=force,
            progress=progress,
        )
    print_result(report, "text")
