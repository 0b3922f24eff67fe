"""Retention: tags, the deletion of units, and the removal of unreachable segments (gc).

Nothing is deleted in place. A unit is deleted by a record and is invisible from there on; earlier
snapshots still read it. gc then removes a segment when neither the newest snapshot, nor a tag, nor
any snapshot of the last `keep_days` has it, and objects that no record ever named when they are
older than `lease_hours`. It also removes claims and pending adds of that age, and those and notes
of committed units.

gc first publishes the objects that it is going to remove, as a record like any other. So it decides
on the newest log, a writer that is about to name such an object uses another generation instead,
and a reader of an old snapshot gets an error with the cause. A crash in between leaves objects that
the next gc removes.
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
from logitcask.engine.events import counted
from logitcask.engine.store.format.entry import Segment, path_of
from logitcask.engine.store.log.log import Log
from logitcask.engine.store.log.pending import is_done
from logitcask.engine.store.log.publish import append
from logitcask.engine.store.log.record import Content
from logitcask.engine.store.storage.base import STAGING
from logitcask.engine.store.store import Store

_MAX_REMOVALS = 50_000
"""Objects of one record."""
_FOR_EVER_DAYS = 36500.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GCReport:
    """The counts of gc: removed, or with dry_run to be removed."""

    segments: int
    bytes: int
    orphans: int
    """Staged files and pending adds of killed writers, dead claims, notes of committed units."""
    kept: int
    """Objects of segments that stay."""
    kept_deleted: int
    """Those of deleted segments, which a tag or a snapshot of the last days reaches."""


def tag(store: Store, name: str, number: int | None = None) -> int:
    """Tag a snapshot, by default the newest, so that gc keeps its segments; return its id.

    Raises StoreError where the tag exists or gc has removed segments of the snapshot.
    """
    if not schema.NAME.fullmatch(name) or name.isdecimal():
        raise ConfigError(
            f"tag {name!r} is not allowed",
            hint="use 1 to 128 of a-z 0-9 . _ -, beginning with a letter or digit, not only digits",
        )
    snapshot = store.head() if number is None else store.snapshot(number)
    if snapshot.number < 0:
        raise StoreError(f"{store.url} has no log record yet", hint="tag a store with data")

    def build_record() -> dict[str, Any] | None:
        tagged = store.log.tags().get(name)
        if tagged == snapshot.number:
            return None
        if tagged is not None:
            raise StoreError(
                f"tag {name!r} names log number {tagged} already",
                hint="use another name, or remove that tag first",
            )
        removed = sum(store.is_removed(each) for each in snapshot.segments)
        if removed:
            raise StoreError(
                f"log number {snapshot.number} has {removed} segments that gc has removed",
                hint="tag a newer number",
            )
        return {"tags": {name: snapshot.number}}

    append(store.storage, store.log, build_record)
    return snapshot.number


def untag(store: Store, name: str) -> None:
    """Remove a tag. Raises StoreError where there is none."""
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
    """Make units invisible from now on, so that they can be made again; return their segments.

    rollouts: the units of this name, and all scores of them; before_version: only those of older
    students. teacher: the scores of this name. segment: the one with this seg_id, its scores and
    its extensions. dry_run: only return them. Raises ConfigError where there are none.
    """
    selectors = [each for each in (rollouts, teacher, segment) if each is not None]
    if len(selectors) != 1 or (before_version is not None and rollouts is None):
        raise ConfigError(
            "delete takes one of rollouts, teacher and segment",
            hint="give --rollouts, --teacher or --segment; --before-version goes with --rollouts",
        )

    def select() -> list[Segment]:
        visible = store.head().segments
        if teacher is not None:
            return [s for s in visible if s.kind == schema.SCORE and s.name == teacher]
        if segment is not None:
            return _with_dependents(segment, visible)
        return _with_scores(
            [
                s
                for s in visible
                if s.kind == schema.ROLLOUT
                and s.name == rollouts
                and (before_version is None or s.version < before_version)
            ],
            visible,
        )

    deleted: list[Segment] = []

    def build_record() -> dict[str, Any] | None:
        deleted[:] = select()
        return {"deletes": [each.unit_key for each in deleted]} if deleted else None

    if dry_run:
        deleted = select()
    else:
        append(store.storage, store.log, build_record)
    if not deleted:
        snapshot = store.head()
        names = [", ".join(snapshot.names(kind)) or "none" for kind in schema.KINDS]
        raise ConfigError(
            f"the store has no {selectors[0]!r} to delete",
            hint=f"it has rollouts: {names[0]}; scores: {names[1]}; `logitcask store ls` shows "
            "segments",
        )
    return deleted


def delete_rollouts(store: Store, rollouts: Sequence[Segment]) -> None:
    """Make these rollout segments and all scores of them invisible, by one record.

    Those that are not visible any more are left out.
    """
    ours = {(s.unit_key, s.seg_id) for s in rollouts}

    def build_record() -> dict[str, Any] | None:
        visible = store.head().segments
        old = [s for s in visible if (s.unit_key, s.seg_id) in ours]
        deleted = _with_scores(old, visible)
        return {"deletes": [each.unit_key for each in deleted]} if deleted else None

    append(store.storage, store.log, build_record)


def _with_scores(rollouts: Sequence[Segment], visible: Sequence[Segment]) -> list[Segment]:
    """Return rollouts with their scores, which rollouts of the same content elsewhere keep."""
    keys = {s.unit_key for s in rollouts}
    kept = {s.seg_id for s in visible if s.kind == schema.ROLLOUT and s.unit_key not in keys}
    gone = {s.seg_id for s in rollouts} - kept
    return [*rollouts, *(s for s in visible if s.base in gone)]


def _with_dependents(seg_id: str, visible: Sequence[Segment]) -> list[Segment]:
    """Return the segment, the scores of rollouts, and the extensions of any of these."""
    found: list[Segment] = []
    for each in visible:
        under = [s.seg_id for s in found if s.kind == schema.ROLLOUT or s.name == each.name]
        if each.seg_id == seg_id or each.base in under or each.extends in under:
            found.append(each)
    return found


def gc(store: Store, *, keep_days: float, lease_hours: float, dry_run: bool = False) -> GCReport:
    """Remove unreachable segments and orphans; return the counts.

    keep_days: snapshots that were the newest within them stay readable. lease_hours: younger
    orphans are left to their writers. dry_run: only count.
    """
    now = time.time()
    born_before = now - lease_hours * 3600
    days = timedelta(days=min(keep_days, _FOR_EVER_DAYS))
    since = (datetime.fromtimestamp(now, UTC) - days).isoformat(timespec="seconds")

    def is_removed(content: Content) -> bool:
        return content[2] < store.log.generation(*content[:2])

    def unreached() -> dict[Content, int]:
        """Return the objects that no kept snapshot of the newest log has -> their bytes."""
        kept = _reached(store, since)
        named = {each.path for each in store.log.present()}
        objects = _objects(store)
        return {
            content: size
            for content, size in counted("read ages", objects.items(), len(objects), "objects")
            if path_of(*content) not in kept
            and content[2] <= store.log.generation(*content[:2])
            and (
                path_of(*content) in named
                or is_removed(content)
                or store.storage.touched_s(path_of(*content)) < born_before
            )
        }

    def build_record() -> dict[str, Any] | None:
        fresh = [each for each in unreached() if not is_removed(each)][:_MAX_REMOVALS]
        return {"removes": [list(each) for each in fresh]} if fresh else None

    store.head()
    if not dry_run:
        while append(store.storage, store.log, build_record) is not None:
            pass
    # An object put meanwhile is in no record: its writer may be about to name it.
    going = {each: size for each, size in unreached().items() if dry_run or is_removed(each)}
    staged = [each.name for each in store.storage.files(STAGING)]
    left = [name for name in staged if store.storage.touched_s(name) < born_before]
    left += claims.orphans(store.storage, store.head().unit_keys(), born_before)
    # A writer whose pending add is gone leaves another, or finds itself committed.
    left += [
        f"log/{name}"
        for name in store.log.pending
        if is_done(store.log, name) or store.storage.touched_s(f"log/{name}") < born_before
    ]
    if not dry_run:
        names = [*(path_of(*content) for content in going), *left]
        for name in counted("remove", names, len(names), "objects"):
            store.storage.remove(name)
    kept = _reached(store, since)
    return GCReport(
        segments=len(going),
        bytes=sum(going.values()),
        orphans=len(left),
        kept=len(kept),
        kept_deleted=len(kept - {each.path for each in store.head().segments}),
    )


def reached(log: Log, number: int) -> dict[str, Segment]:
    """Return path -> segment of what the snapshot `number` and the tags up to it reach."""
    numbers = {number, *(each for each in log.tags().values() if each <= number)}
    return {s.path: s for each in sorted(numbers) for s in log.snapshot(each).segments}


def _reached(store: Store, since: str) -> set[str]:
    """Return the objects of the newest snapshot, of tags, and of snapshots newest since then."""
    log = store.log
    recent = log.deleted_after(log.at_time(since))
    return {*reached(log, len(log) - 1), *(each.path for each in recent)}


def _objects(store: Store) -> dict[Content, int]:
    """Return the objects of segments -> their bytes; objects of other names are ignored."""
    found = {}
    for each in store.storage.files("seg"):
        match = re.fullmatch(r"seg/(\w+)/../([0-9a-f]{32})(?:\.([1-9][0-9]{0,8}))?\.zip", each.name)
        if match and match[1] in schema.KINDS:
            content = (match[1], match[2], int(match[3] or 0))
            if path_of(*content) == each.name:
                found[content] = each.size
    return found
