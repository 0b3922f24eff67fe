"""What a store keeps: tags, deleted units, and the removal of what nobody can reach any more.

Nothing is deleted in place. A unit is deleted by a record, and from there on not visible; snapshots
taken before still read it. gc then removes a segment when neither the newest state, nor a tag, nor
any state of the last `keep_days` holds it, and what no record ever named when it is older than
`lease_hours`. Claims of units go at that age too, and what workers left of units that are there.

gc first publishes which folders it is going to remove, as a record like any other. So it decides on
a log that nobody has moved meanwhile, a writer who is about to name such a folder learns of it and
puts its files under another generation, and a reader of an old snapshot is told what happened. A
crash in between leaves folders that the next gc removes.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.claims as claims
from logitcask.engine.errors import ConfigError, StoreError
from logitcask.engine.store.format.segment import Segment, folder_of
from logitcask.engine.store.log.publish import append
from logitcask.engine.store.log.record import Content
from logitcask.engine.store.storage.base import STAGING
from logitcask.engine.store.store import Store

_AT_ONCE = 50_000
"""Folders that one record sweeps."""
_FOR_EVER_DAYS = 36500.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GCReport:
    """What gc removed, or would remove."""

    segments: int
    bytes: int
    orphans: int
    """Of writers that died, in staging, and of workers: claims, and failures that were overcome."""
    kept: int
    """Folders of segments that stay ..."""
    kept_deleted: int
    """... of which so many are deleted, and stay for a tag or for snapshots of the last days."""


def tag(store: Store, name: str, number: int | None = None) -> int:
    """Marks a log number, the newest if none is given, and returns it. What it reaches, gc keeps.

    Raises StoreError where the name is taken or gc has removed what it would reach.
    """
    if not schema.NAME.fullmatch(name) or name.isdecimal():
        raise ConfigError(
            f"tag {name!r} is not allowed",
            hint="use 1 to 128 of a-z 0-9 . _ -, beginning with a letter or digit, not digits "
            "alone",
        )
    snapshot = store.head() if number is None else store.snapshot(number)
    if snapshot.number < 0:
        raise StoreError(f"{store.url} has no log record yet", hint="tag a store with data")

    def build_record() -> dict[str, Any] | None:
        marked = store.log.tags().get(name)
        if marked == snapshot.number:
            return None
        if marked is not None:
            raise StoreError(
                f"tag {name!r} marks log number {marked} already",
                hint="use another name, or remove that tag first",
            )
        standing = {each.folder for each in store.log.standing()}
        gone = [each for each in snapshot.segments if each.folder not in standing]
        if gone:
            raise StoreError(
                f"log number {snapshot.number} reaches {len(gone)} segments that gc has removed",
                hint="tag a newer number",
            )
        return {"tags": {name: snapshot.number}}

    append(store.storage, store.log, build_record)
    return snapshot.number


def untag(store: Store, name: str) -> None:
    """Takes a tag away. Raises StoreError where there is none."""
    store.snapshot(name)
    append(
        store.storage,
        store.log,
        lambda: {"tags": {name: None}} if name in store.log.tags() else None,
    )


def delete(
    store: Store,
    *,
    rollouts: str | None = None,
    before_version: int | None = None,
    teacher: str | None = None,
    segment: str | None = None,
    dry_run: bool = False,
) -> list[Segment]:
    """Makes units invisible from here on; their keys are free to be made again.

    rollouts: the units of this name, and every score of them; before_version: only those of older
    students. teacher: the scores of this name. segment: the one with this seg_id, and what rests on
    it. dry_run: only says which. Raises ConfigError where there are none.
    """
    given = [each for each in (rollouts, teacher, segment) if each is not None]
    if len(given) != 1 or (before_version is not None and rollouts is None):
        raise ConfigError(
            "delete takes one of rollouts, teacher and segment",
            hint="give --rollouts, --teacher or --segment; --before-version goes with --rollouts",
        )

    def wanted() -> list[Segment]:
        visible = store.head().segments
        if teacher is not None:
            return [s for s in visible if s.kind == schema.SCORE and s.name == teacher]
        if segment is not None:
            return _resting_on(segment, visible)
        old = [
            s
            for s in visible
            if s.kind == schema.ROLLOUT
            and s.name == rollouts
            and (before_version is None or s.unit["version"] < before_version)
        ]
        ids = {s.seg_id for s in old}
        others = {s.seg_id for s in visible if s.kind == schema.ROLLOUT and s not in old}
        return old + [s for s in visible if s.base in ids - others]

    deleted: list[Segment] = []

    def build_record() -> dict[str, Any] | None:
        deleted[:] = wanted()
        return {"retires": [each.unit_key for each in deleted]} if deleted else None

    if dry_run:
        deleted = wanted()
    else:
        append(store.storage, store.log, build_record)
    if not deleted:
        snapshot = store.head()
        names = [", ".join(snapshot.names(kind)) or "none" for kind in schema.KINDS]
        raise ConfigError(
            f"the store holds nothing of {given[0]!r} to delete",
            hint=f"it has rollouts: {names[0]}; scores: {names[1]}; `logitcask store ls` shows "
            "segments",
        )
    return deleted


def _resting_on(seg_id: str, visible: Sequence[Segment]) -> list[Segment]:
    """The segment, its scores if it is rollouts, and what widens any of these."""
    found: list[Segment] = []
    for each in visible:
        under = [s.seg_id for s in found if s.kind == schema.ROLLOUT or s.name == each.name]
        if each.seg_id == seg_id or each.base in under or each.extends in under:
            found.append(each)
    return found


def gc(store: Store, *, keep_days: float, lease_hours: float, dry_run: bool = False) -> GCReport:
    """Removes what nobody can reach, and what writers that died have left.

    keep_days: every state that was the newest within them stays readable. lease_hours: what no
    record names is left to its writer so long. dry_run: only counts.
    """
    now = time.time()
    born_before = now - lease_hours * 3600
    since = datetime.fromtimestamp(now, UTC) - timedelta(days=min(keep_days, _FOR_EVER_DAYS))

    def unreached() -> list[Content]:
        """On the log as it is: folders there that no state which is kept holds."""
        log = store.log
        kept = _reached(store, since.isoformat(timespec="seconds"))
        named = {each.folder for each in log.standing()}
        return [
            content
            for content in _folders(store)
            if folder_of(*content) not in kept
            and content[2] <= log.generation(*content[:2])
            and (
                folder_of(*content) in named
                or content[2] < log.generation(*content[:2])
                or store.storage.touched_s(folder_of(*content)) < born_before
            )
        ]

    def is_removed(content: Content) -> bool:
        return content[2] < store.log.generation(*content[:2])

    def build_record() -> dict[str, Any] | None:
        fresh = [each for each in unreached() if not is_removed(each)][:_AT_ONCE]
        return {"sweeps": [list(each) for each in fresh]} if fresh else None

    store.head()
    if not dry_run:
        while append(store.storage, store.log, build_record) is not None:
            pass
    # A folder that was put there since is not in a record: its writer may be about to name it.
    going = [each for each in unreached() if dry_run or is_removed(each)]
    staged = [f"{STAGING}/{name}" for name in store.storage.names(STAGING)]
    left = [name for name in staged if store.storage.touched_s(name) < born_before]
    left += claims.orphans(store.storage, store.head().unit_keys(), born_before)
    size = sum(each.size for content in going for each in store.storage.files(folder_of(*content)))
    if not dry_run:
        for name in [*(folder_of(*content) for content in going), *left]:
            store.storage.remove(name)
    kept = _reached(store, since.isoformat(timespec="seconds"))
    return GCReport(
        segments=len(going),
        bytes=size,
        orphans=len(left),
        kept=len(kept),
        kept_deleted=len(kept - {each.folder for each in store.head().segments}),
    )


def _reached(store: Store, since: str) -> set[str]:
    """Folders that the newest state, a tag, or a state that was the newest since then holds."""
    log = store.log
    held = [*log.snapshot(len(log) - 1).segments, *log.deleted_after(log.at_time(since))]
    for number in log.tags().values():
        held += log.snapshot(number).segments
    return {each.folder for each in held}


def _folders(store: Store) -> list[Content]:
    """Every folder of a segment that is there; others are strange, and left alone."""
    found = []
    for kind in schema.KINDS:
        for name in store.storage.names(f"seg/{kind}"):
            if match := re.fullmatch(r"([0-9a-f]{32})(?:\.([1-9][0-9]*))?", name):
                found.append((kind, match[1], int(match[2] or 0)))
    return found
