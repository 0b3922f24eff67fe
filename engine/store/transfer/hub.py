"""Push of a store to a dataset repository of the Hugging Face Hub.

Segments are uploaded first, in commits of many, then one commit has the log and the card. So every
commit of the repository is a store, and a push that stopped is continued by the same command:
what the repository has is not sent again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from logitcask.engine.errors import StoreError
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.log.bundles import parts_of
from logitcask.engine.store.log.format_file import NAME, read
from logitcask.engine.store.log.record import number_of
from logitcask.engine.store.log.snapshot import Snapshot
from logitcask.engine.store.storage.base import map_concurrently
from logitcask.engine.store.storage.hub import (
    DATASET,
    HubAddress,
    HubStorage,
    hub_request,
    parse_address,
)
from logitcask.engine.store.store import Store
from logitcask.engine.store.transfer.card import (
    CARD,
    MAX_CARD_BYTES,
    build_card,
    is_ours,
    license_of,
)
from logitcask.engine.store.transfer.copy import (
    CONCURRENT_OBJECTS,
    CopyReport,
    absent_objects,
    last_record,
    log_objects,
    sizes,
)
from logitcask.engine.types import Progress, no_progress

_COMMIT_FILES = 250
"""Segments of one commit; the Hub limits both the files of a commit and the commits of an hour."""
_UPLOAD_BYTES = 256 << 20
"""Segments in memory at a time, in bytes, except a larger one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PushReport(CopyReport):
    """The state of a pushed store, and what was pushed."""

    card: str
    """written, unchanged, or kept: it is not ours, or was edited."""


def push_to_hub(
    store: Store,
    url: str,
    *,
    snapshot: Snapshot,
    private: bool = False,
    license_id: str = "",
    progress: Progress = no_progress,
) -> PushReport:
    """Push a store as of a snapshot to an hf:// URL, or continue such a push.

    private: create the repository as a private one. Raises StoreError where the repository holds
    another store or records of its own, or the Hub refuses; ConfigError for no license identifier.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    address, api = parse_address(url), HfApi()
    # Checked before anything is uploaded.
    build_card(snapshot, address, license_id)
    _open_repo(api, address, private)
    target = HubStorage(url)
    last = last_record(store, target, snapshot.number)
    card, card_state = _card(target, address, snapshot, license_id)
    if last > snapshot.number:
        card_state = "unchanged"  # it describes a newer snapshot
    if card_state == "written":
        _validate(card, address)
    missing, there = absent_objects(store, sizes(target, "seg"), snapshot)
    commit, done = target.commit, 0
    pending: list[Any] = []
    for batch in _batches(missing):
        progress("push", done, len(missing))
        objects = map_concurrently(store.read_object, [(each,) for each in batch])
        files = zip(batch, objects, strict=True)
        added = [CommitOperationAdd(address.file(s.path), data) for s, data in files]
        with hub_request("upload to", address.url()):
            # It frees the bytes.
            api.preupload_lfs_files(
                address.repo, added, repo_type=DATASET, revision=address.revision or None
            )
        pending += added
        done += len(batch)
        if len(pending) >= _COMMIT_FILES or done == len(missing):
            message = f"Add segments {done - len(pending) + 1} to {done} of {len(missing)}"
            commit = _commit(api, address, pending, message, None)
            pending = []
    progress("push", len(missing), len(missing))
    new, old = _log_changes(store, target, last, snapshot.number)
    if card_state == "written":
        new[CARD] = card.encode()
    if new:
        changes: list[Any] = [CommitOperationAdd(address.file(n), data) for n, data in new.items()]
        changes += [CommitOperationDelete(address.file(name)) for name in old]
        commit = _commit(api, address, changes, f"Push snapshot {snapshot.number}", commit)
    pushed = HubStorage(address.url(commit))
    _check_complete(store, pushed, snapshot, new)
    return PushReport(
        store=pushed.url,
        snapshot=snapshot.number,
        sha256=snapshot.sha256,
        newest=max(last, snapshot.number),
        segments=len(missing),
        there=there,
        records=max(0, snapshot.number - last),
        bytes=sum(each.size for each in missing),
        card=card_state,
    )


def _open_repo(api: Any, address: HubAddress, private: bool) -> None:
    """Create the repository and the branch where they are absent."""
    with hub_request("create", address.url()):
        api.create_repo(address.repo, repo_type=DATASET, private=private or None, exist_ok=True)
        if address.revision and not address.revision.startswith("refs/"):
            api.create_branch(
                address.repo, branch=address.revision, repo_type=DATASET, exist_ok=True
            )
        is_private = api.dataset_info(address.repo).private
    if private and is_private is False:
        raise StoreError(
            f"{address.url()} exists and is public, and --private was given",
            hint="make it private in its settings, or push to another name",
        )


def _card(
    target: HubStorage, address: HubAddress, snapshot: Snapshot, license_id: str
) -> tuple[str, str]:
    """Return (the card, whether it is to be written: `written`, `unchanged` or `kept`)."""
    data = target.read(CARD, MAX_CARD_BYTES)
    old = "" if data is None else data.decode(errors="replace")
    if old and not is_ours(old):
        return old, "kept"
    card = build_card(snapshot, address, license_id or license_of(old))
    return card, "unchanged" if card == old else "written"


def _validate(card: str, address: HubAddress) -> None:
    """Raise StoreError where the Hub does not accept the header of the card."""
    from huggingface_hub import DatasetCard

    with hub_request("write the card of", address.url()):
        DatasetCard(card).validate(repo_type=DATASET)


def _log_changes(
    store: Store, target: HubStorage, last: int, number: int
) -> tuple[dict[str, bytes], list[str]]:
    """Return (name -> bytes of what the log needs, names of records that a bundle has now).

    A commit replaces them at once, and a reader keeps its commit.
    """
    if last >= number:
        return {}, []
    there = {f"log/{name}" for name in target.names("log") if number_of(name) is not None}
    there |= {name for name in sizes(target, "bundles") if parts_of(name)}
    needed = dict(log_objects(store, number, {*there, *([NAME] if last >= 0 else [])}))
    new = {name: data for name, data in needed.items() if data is not None}
    return new, sorted(there - needed.keys())


def _batches(segments: list[Segment]) -> Iterator[list[Segment]]:
    """Yield the segments in lists of a few, of limited bytes."""
    batch: list[Segment] = []
    for each in segments:
        full = sum(s.size for s in batch) + each.size > _UPLOAD_BYTES
        if batch and (full or len(batch) >= 8 * CONCURRENT_OBJECTS):
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


def _commit(
    api: Any, address: HubAddress, operations: list[Any], message: str, parent: str | None
) -> str:
    """Commit operations and return the commit; parent: raise where the branch is not at it."""
    with hub_request("commit to", address.url()):
        info = api.create_commit(
            address.repo,
            operations,
            commit_message=message,
            repo_type=DATASET,
            revision=address.revision or None,
            parent_commit=parent,
        )
    return str(info.oid)


def _check_complete(
    store: Store, pushed: HubStorage, snapshot: Snapshot, new: dict[str, bytes]
) -> None:
    """Raise StoreError where the commit lacks a file: a .gitignore there may leave files out."""
    found = sizes(pushed, "")
    absent = [each.path for each in absent_objects(store, found, snapshot)[0]]
    absent += [name for name, data in new.items() if found.get(name) != len(data)]
    if absent or read(pushed) is None:
        raise StoreError(
            f"{pushed.url} lacks {len(absent)} pushed files, such as {absent[:1]}",
            hint="look for a .gitignore there that names them, then push again",
        )
