"""Verbs of `logitcask store` that change a store or move segments."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from logitcask.cli.options import config_from_flags, config_options, format_option
from logitcask.cli.output import print_result, print_segments, print_table
from logitcask.cli.progress import progress_bar
from logitcask.engine.config.sections import Gc, GcConfig
from logitcask.engine.errors import IncompleteError

if TYPE_CHECKING:
    from logitcask.engine.store.merge import MergeReport


repair_option = click.option(
    "--repair",
    is_flag=True,
    help="Also read what the store holds already, and repair what is damaged there.",
)


@click.command("tag")
@click.argument("url")
@click.argument("name", required=False)
@click.option("--at", type=click.IntRange(min=0), help="Log number; default: the newest.")
@click.option("--remove", is_flag=True, help="Take the tag away.")
@format_option
def tag_command(url: str, name: str | None, at: int | None, remove: bool, form: str) -> None:
    """Give a log number a name that `train --snapshot` takes; what it reaches, gc keeps.

    Without a NAME, the tags that there are.

    Example: logitcask store tag ./store paper-run
    """
    from logitcask.engine.store import open_store
    from logitcask.engine.store.inspect import list_tags
    from logitcask.engine.store.retention import tag, untag

    store = open_store(url)
    if name is None and (remove or at is not None):
        raise click.UsageError("--remove and --at need the NAME of a tag.")
    if name is None:
        print_table(list_tags(store), form)
    elif remove:
        untag(store, name)
        print_result({"removed": name}, form)
    else:
        print_result({"tag": name, "log_number": tag(store, name, at)}, form)


@click.command("delete")
@click.argument("url")
@click.option("--rollouts", help="Delete the rollouts of this name, and all scores of them ...")
@click.option(
    "--before-version",
    type=click.IntRange(min=1),
    help="... only those that students of an older version sampled.",
)
@click.option("--teacher", help="Delete the scores of this name.")
@click.option(
    "--segment",
    help="Delete this segment (its 32 digits: `store ls --format json`), and what rests on it.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be deleted, and delete nothing.")
@format_option
def delete_command(url: str, form: str, **which: Any) -> None:
    """Make rollouts or scores invisible from here on; gc removes them when no snapshot has them.

    What is deleted can be made again by the command that made it. Until gc removes it, snapshots
    and tags from before still read it.

    Example: logitcask store delete ./store --teacher big
    """
    from logitcask.engine.store import open_store
    from logitcask.engine.store.inspect import segment_rows
    from logitcask.engine.store.retention import delete

    deleted = delete(open_store(url), **which)
    print_segments(segment_rows(deleted), form)
    done = "would be deleted" if which["dry_run"] else "deleted"
    click.echo(f"note: {len(deleted)} segments {done}", err=True)


@click.command("gc")
@click.argument("url")
@config_options(GcConfig, {"gc": list(Gc.model_fields)})
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@format_option
def gc_command(url: str, dry_run: bool, form: str, **flags: Any) -> None:
    """Remove what neither the newest state, nor a tag, nor a recent snapshot reaches.

    What `verify` calls orphans and this leaves alone is no orphan of ours: look at it, and remove
    it by hand.

    Example: logitcask store gc ./store --dry-run
    """
    job = config_from_flags(GcConfig, flags)
    from logitcask.engine.store import open_store
    from logitcask.engine.store.retention import gc

    with progress_bar():
        report = gc(
            open_store(url),
            keep_days=job.gc.keep_days,
            lease_hours=job.gc.lease_hours,
            dry_run=dry_run,
        )
    print_result({"dry_run": dry_run, **asdict(report)}, form)
    if report.kept_deleted and job.gc.keep_days:
        click.echo(
            f"note: {report.kept_deleted} deleted segments stay for a tag, or for snapshots of the "
            f"last {job.gc.keep_days:g} days (--keep-days 0: for tags alone)",
            err=True,
        )


@click.command("retry-failed")
@click.argument("url")
@format_option
def retry_failed_command(url: str, form: str) -> None:
    """Let workers try units again that failed too often; prints what each failed with.

    Example: logitcask store retry-failed ./store
    """
    from logitcask.engine.store import open_store
    from logitcask.engine.workers.failures import retry_failed

    print_table(retry_failed(open_store(url)), form)


@click.command("pack")
@click.argument("url")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--at", help="Log number or tag; default: the newest.")
@format_option
def pack_command(url: str, folder: Path, at: str | None, form: str) -> None:
    """Write one file per segment into FOLDER, for transport; `unpack` brings them in elsewhere.

    Example: logitcask store pack ./store ./packed
    """
    from logitcask.engine.commands.resolve import snapshot_of
    from logitcask.engine.store import open_store
    from logitcask.engine.store.merge import pack

    store = open_store(url)
    with progress_bar() as progress:
        files = pack(
            store,
            folder,
            snapshot=None if at is None else snapshot_of(store, at),
            progress=progress,
        )
    size = sum(file.stat().st_size for file in files)
    print_result({"folder": str(folder), "files": len(files), "bytes": size}, form)


@click.command("unpack")
@click.argument("url")
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False)
)
@repair_option
@format_option
def unpack_command(url: str, files: tuple[Path, ...], repair: bool, form: str) -> None:
    """Bring packed segments into a store, which is made if absent; twice does no harm.

    Exit 3 where some were left out: scores need the rollouts that they are of.

    Example: logitcask store unpack ./other packed/*.zip
    """
    from logitcask.engine.store import open_store
    from logitcask.engine.store.merge import unpack

    with progress_bar() as progress:
        report = unpack(open_store(url, create=True), files, repair=repair, progress=progress)
    _print_merged(report, form)


@click.command("merge")
@click.argument("url")
@click.argument("other")
@repair_option
@format_option
def merge_command(url: str, other: str, repair: bool, form: str) -> None:
    """Bring all that store OTHER holds into store URL, which is made if absent.

    Either may be a folder or in an object store; twice does no harm. What was deleted in URL and is
    not in OTHER comes back. Exit 3 where scores were left out.

    Example: logitcask store merge ./store ./from-another-machine
    """
    from logitcask.engine.store import open_store
    from logitcask.engine.store.merge import merge

    source = open_store(other)
    with progress_bar() as progress:
        report = merge(open_store(url, create=True), source, repair=repair, progress=progress)
    _print_merged(report, form)


def _print_merged(report: "MergeReport", form: str) -> None:
    if report.left_out:
        raise IncompleteError(
            f"{report.left_out} segments were left out ({report.added} added, {report.there} "
            "there): scores whose rollouts, or first scores, the store holds with other bytes or "
            "not at all",
            hint="bring these in too; where others stand for the same units, delete those first",
        )
    print_result(report, form)


CHANGE_VERBS = (
    tag_command,
    delete_command,
    gc_command,
    retry_failed_command,
    pack_command,
    unpack_command,
    merge_command,
)
