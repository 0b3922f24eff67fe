"""Verbs of `logitcask store` that copy a whole store to another place, or from one."""

from importlib import import_module

import rich_click as click

from logitcask.cli.options import format_option
from logitcask.cli.output import print_event, print_result
from logitcask.cli.progress import progress_bar

snapshot_option = click.option(
    "--snapshot", "at", help="Log number or tag up to which to copy; default: the newest."
)


@click.command("push")
@click.argument("store")
@click.argument("url")
@snapshot_option
@click.option("--private", is_flag=True, help="On the Hub: create the dataset as a private one.")
@click.option(
    "--license",
    "license_id",
    default="",
    help="On the Hub: license identifier for the dataset card, such as apache-2.0 or cc-by-4.0; "
    "by default that of the card that is there.",
)
@format_option
def push_command(
    store: str, url: str, at: str | None, private: bool, license_id: str, form: str
) -> None:
    """Copy STORE to URL, or copy what is new: snapshot ids and digests stay the same.

    URL is hf://datasets/ORG/NAME[@BRANCH][/PATH], s3://, gs://, az:// or a folder. Only segments
    that the snapshot and tags reach are copied, never claims and failures of workers. The same
    command continues a push that stopped. On the Hub a dataset card (README.md) is written too,
    unless there is another one, or an edited one; HF_TOKEN or `hf auth login` give the token.

    Example: logitcask store push ./store hf://datasets/my-org/my-logits --license cc-by-4.0
    """
    from logitcask.engine.commands.resolve import snapshot_of
    from logitcask.engine.store import open_store
    from logitcask.engine.store.storage.base import open_storage
    from logitcask.engine.store.storage.hub import is_hub
    from logitcask.engine.store.transfer.copy import CopyReport, copy_store
    from logitcask.engine.store.transfer.hub import push_to_hub

    if not is_hub(url) and (private or license_id):
        raise click.UsageError("--private and --license need a URL of hf://.")
    source = open_store(store)
    snapshot = snapshot_of(source, at)
    report: CopyReport
    with progress_bar() as progress:
        if is_hub(url):
            # One progress is enough.
            import_module("huggingface_hub.utils").disable_progress_bars()
            report = push_to_hub(
                source,
                url,
                snapshot=snapshot,
                private=private,
                license_id=license_id,
                progress=progress,
            )
        else:
            report = copy_store(source, open_storage(url), snapshot=snapshot, progress=progress)
    print_result(report, form)


@click.command("pull")
@click.argument("url")
@click.argument("store")
@snapshot_option
@format_option
def pull_command(url: str, store: str, at: str | None, form: str) -> None:
    """Copy the store at URL to STORE, or copy what is new there, and verify the copy.

    URL is hf://datasets/ORG/NAME[@REVISION][/PATH], s3://, gs://, az:// or a folder. STORE is a
    store like any other afterwards. The same command continues a pull that stopped. Exit 4 and the
    names where the copy is damaged.

    Example: logitcask store pull hf://datasets/my-org/my-logits ./store
    """
    from logitcask.engine.commands.resolve import snapshot_of
    from logitcask.engine.store import open_store
    from logitcask.engine.store.storage.base import open_storage
    from logitcask.engine.store.storage.hub import is_hub
    from logitcask.engine.store.transfer.copy import copy_store
    from logitcask.engine.store.verify import verify

    if is_hub(store):
        raise click.UsageError("STORE is on the Hub: use `store push`.")
    source = open_store(url)
    snapshot = snapshot_of(source, at)
    with progress_bar() as progress:
        report = copy_store(source, open_storage(store), snapshot=snapshot, progress=progress)
        verify(
            open_store(store),
            on_damage=lambda error: print_event(f"damaged: {error.cause}"),
            progress=progress,
        )
    print_result(report, form)


@click.command("upgrade")
@click.argument("old")
@click.argument("new")
@format_option
def upgrade_command(old: str, new: str, form: str) -> None:
    """Make the store NEW of today's format from the store OLD of format 1, and verify it.

    OLD stays as it is. Rows, snapshot ids, tags and unit keys are the same, so the commands that
    made OLD go on with NEW. The same command continues an upgrade that stopped.

    Example: logitcask store upgrade ./store ./store-2
    """
    from logitcask.engine.store.upgrade.upgrade import upgrade

    with progress_bar() as progress:
        report = upgrade(old, new, progress=progress)
    print_result(report, form)


TRANSFER_VERBS = (push_command, pull_command, upgrade_command)
