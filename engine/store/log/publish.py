"""Publishing: a record under the next free number, and the identity of names."""

import os
import socket
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.bundles as bundles
import logitcask.engine.store.log.record as record
from logitcask.engine.config.parse.strict_json import count_values
from logitcask.engine.errors import IdentityError, IntegrityError, StoreError
from logitcask.engine.models.fingerprint import compare_records
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.format.provenance import ALIGNMENT
from logitcask.engine.store.log.body import encode_body
from logitcask.engine.store.log.format_file import now
from logitcask.engine.store.log.log import Log
from logitcask.engine.store.storage.base import Storage

NAME_IDENTITY = {
    schema.ROLLOUT: (("set", "digest"), ("student", "base_weights")),
    schema.SCORE: (("teacher", "weights"), ("teacher_kind",), ("context",)),
}
"""Paths into the provenance at which all segments of a name agree."""
T = TypeVar("T")

_MAX_REFUSALS = 50
"""Refusals in a row by a storage that then shows no record."""

BuildRecord = Callable[[], Mapping[str, Any] | None]
"""Returns some of: adds (segments), deletes, removes, tags; None = no record is needed."""


def append(storage: Storage, log: Log, build_record: BuildRecord) -> int | None:
    """Publish the record that `build_record` makes for the newest log; return its number, or None.

    `build_record` is called again when another writer was faster, so every record is decided on the
    state that it follows.
    """
    attempts = Attempts(storage, log)
    log.refresh()
    while (content := build(log, build_record)) is not None:
        if (number := attempts.publish(content)) is not None:
            break
    # Our own record, or the one that made it unnecessary, is durable before it is acknowledged.
    storage.settle("log")
    return None if content is None else number


class Attempts:
    """The attempts of one writer to publish a record."""

    def __init__(self, storage: Storage, log: Log) -> None:
        self._storage, self._log = storage, log
        self._commit_id, self._refused = uuid.uuid4().hex, 0

    def publish(self, content: Mapping[str, Any]) -> int | None:
        """Create the record after the newest one; return its number, None if others were faster.

        A record whose response was lost is recognised by its digest, and is not written twice.
        Raises StoreError for a record that no reader would accept.
        """
        log, number = self._log, len(self._log)
        data = self._encode(content)
        # A record that a reader would refuse is not published.
        ours = log.parse_next(data)
        name = f"log/{record.file_name(number)}"
        created = self._storage.create(name, data)
        # The number is free again where a bundle has its record: then this writer was too slow.
        if created and not bundles.holds(self._storage, number):
            log.append(data)
        else:
            log.refresh()
        # A lost response may have hidden that the record is ours.
        if len(log) > number and log.sha256(number) == ours.sha256:
            try:
                log.write_bundles(number)
            except IntegrityError:
                raise
            except StoreError:
                # The record counts: a bundle saves reads alone. A full disk ends the next commit.
                pass
            return number
        if created:
            self._storage.remove(name)
        self._refused = self._refused + 1 if len(log) == number else 0
        if self._refused > _MAX_REFUSALS:
            raise StoreError(
                f"{log.where(number)} is refused as existing, but does not exist",
                hint="check the file system or the object store, then run the same command again",
            )
        return None

    def _encode(self, content: Mapping[str, Any]) -> bytes:
        adds = content.get("adds", ())
        head = {
            "n": len(self._log),
            "prev": self._log.prev(),
            "time": now(),
            **{"deletes": [], "removes": [], "tags": {}},
            **content,
            "adds": [record.encode_add(each) for each in adds],
        }
        writer = {"host": socket.gethostname(), "pid": os.getpid(), "versions": _versions()}
        body = {"commit_id": self._commit_id, "writer": writer, "adds": [*map(encode_body, adds)]}
        try:
            data = record.encode_record(head, body)
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"a record that is not JSON ({error})",
                hint="use strings, finite numbers, lists and objects in unit and provenance",
            ) from error
        size, values = len(data), count_values(data)
        if size > schema.MAX_RECORD_BYTES or values > schema.MAX_RECORD_VALUES:
            raise StoreError(
                f"a log record of {size} bytes and {values} JSON values, at most "
                f"{schema.MAX_RECORD_BYTES} and {schema.MAX_RECORD_VALUES}",
                hint="put less into one record: a smaller provenance, or several deletions",
            )
        return data


def build(log: Log, build_record: Callable[[], T]) -> T:
    """Call `build_record`, a second time where gc has removed the data that it read."""
    number = len(log)
    try:
        return build_record()
    except IntegrityError:
        log.refresh()
        if len(log) == number:
            raise
        return build_record()


def check_name_identity(log: Log, new: Segment) -> None:
    """Raise IdentityError where the segments of the name have another identity than `new`."""
    first = log.first_of_name(new.kind, new.name)
    what = "rollouts" if new.kind == schema.ROLLOUT else "teacher"
    for path in NAME_IDENTITY[new.kind]:
        ours = _provenance_value(new.provenance, path)
        if first is not None and (theirs := _provenance_value(first.provenance, path)) != ours:
            raise IdentityError(
                f"{what} name {new.name!r} stands for {'.'.join(path)} = {theirs}, not {ours}",
                hint="use another name for this one, or a new store",
            )
    if first is None:
        return
    _check_fingerprint(first, new)
    if (theirs := _entry_kind(first.layout)) != (ours := _entry_kind(new.layout)):
        raise IdentityError(
            f"{what} name {new.name!r} stands for {theirs}, not {ours}",
            hint="use another name for this one",
        )
    if new.layout in schema.SPAN_LAYOUTS:
        theirs, ours = (_provenance_value(each.provenance, (ALIGNMENT,)) for each in (first, new))
        if theirs != ours:
            raise IdentityError(
                f"{what} name {new.name!r} stands for spans of alignment {theirs}, not {ours}",
                hint="use another name for other tokenizers or other rows",
            )


def _entry_kind(layout: str) -> str:
    """Describe what the scores of a layout hold; all of a name hold the same."""
    if layout in schema.SPAN_LAYOUTS:
        return f"scores in layout {layout!r}, of a teacher with another tokenizer"
    return "drawn ids" if layout.startswith(schema.SAMPLED) else "a teacher's best ids"


def check_base(log: Log, new: Segment) -> None:
    """Raise StoreError where scores have no base, or do not follow the newest of their teacher."""
    if new.kind == schema.ROLLOUT:
        return
    base, before = log.base(new.base), log.score_segments(new.name, new.base)
    if base is None or base.tokens_sha256 != new.tokens_sha256:
        raise StoreError(
            f"no rollout segment {new.base} with these tokens",
            hint="score the rollouts of this store; they may have been deleted meanwhile",
        )
    if new.extends != (before[-1].seg_id if before else ""):
        raise StoreError(
            f"teacher {new.name!r} has {len(before)} segments on rollouts {new.base}, and these "
            f"scores extend {new.extends or 'none'}",
            hint="another writer was faster; run the same command again to resume",
        )


def _check_fingerprint(first: Segment, new: Segment) -> None:
    """Raise IdentityError where a served teacher, whose weights have no digest, answers otherwise.

    Compares the log-probs of a fixed probe, recorded when the name was first used and now.
    """
    theirs, ours = (each.provenance.get("fingerprint") for each in (first, new))
    if not isinstance(theirs, Mapping) or not isinstance(ours, Mapping):
        return
    found, allowed = compare_records(theirs, ours)
    if found > allowed:
        raise IdentityError(
            f"the teacher is not the one of the first scores named {new.name!r}: log-probs of a "
            f"fixed probe differ by {found:.3g} nats, and {allowed:.3g} is allowed for one model",
            hint="other weights, another revision, an adapter, quantisation or a temperature may "
            "be served: serve the first model, or score this one under another --teacher name "
            "and --revision",
        )


def _provenance_value(provenance: Mapping[str, Any], path: tuple[str, ...]) -> str:
    found: Any = provenance
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            raise StoreError(
                f"provenance lacks {'.'.join(path)}", hint="record the provenance of the segment"
            )
        found = found[key]
    # Compared as JSON: a tuple and the list that it becomes in the log are one value.
    return canonical(found).decode()


@cache
def _versions() -> dict[str, str]:
    """Return the versions of the packages that decide the bytes."""
    found = {}
    for name in ("logitcask", "numcodecs", "pcodec", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # A source checkout on PYTHONPATH has no metadata of its own.
            found[name] = "unknown"
    return found
