"""Group commit: writers that meet at the next number leave their adds to one of them.

  log/pending-<64 hex of the unit key>.<8 hex>.json

Two lines like format.json: the whole entry of one segment, whose object is in place, and `after`,
the number of records when its writer began. A writer that loses the race for a number, or sees
others wait, creates such a file and looks again after a moment. The writer whose file sorts first
publishes one record that names its own segment and all others that fit, and the other writers find
themselves committed. A file is not data before a record names its segment: one that is damaged or
no longer fits is left out, and a writer that stopped delays the others once, for PATIENCE_S.
"""

import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.record as record
from logitcask.engine.config.strict_json import count_values
from logitcask.engine.errors import IdentityError, IntegrityError, StoreError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.log.lines import decode_sealed, encode_sealed, is_count
from logitcask.engine.store.log.log import Log
from logitcask.engine.store.log.publish import (
    Attempts,
    build,
    check_base,
    check_name_identity,
)
from logitcask.engine.store.storage.base import Storage, map_concurrently

PATIENCE_S = 2.0
"""Seconds that a writer waits for those before it, at least; at most twice as long."""
_LOOKS, _MIN_WAIT_S, _MAX_WAIT_S = 3.0, 0.02, 1.0
"""A wait between two looks takes as long as some looks, within these bounds."""
_MAX_BYTES, _MAX_ADDS = 1 << 18, 512
"""Larger entries are published by their own writer alone; more entries by later records."""
_NAME = re.compile(r"pending-([0-9a-f]{64})\.[0-9a-f]{8}\.json")

Decide = Callable[[], Segment | None]


def unit_of(name: str) -> str | None:
    """Return the unit key of a pending add by its name in log/, None for any other name."""
    found = _NAME.fullmatch(name)
    return None if found is None else f"sha256:{found[1]}"


def publish_add(storage: Storage, log: Log, unit_key: str, decide: Decide) -> Segment:
    """Publish a segment; return the committed segment of its unit, which may be another writer's.

    decide() puts the object of the segment and returns it, for the newest log, or None where the
    unit is committed. It raises where the segment cannot be committed, and is called again when
    the log has grown.
    """
    writer = _Writer(storage, log, unit_key)
    try:
        while (found := writer.committed()) is None:
            if (ours := build(log, decide)) is not None:
                writer.step(ours)
    finally:
        writer.leave()
    # A record is durable before it is acknowledged, also one of another writer.
    storage.settle("log")
    return found


class _Writer:
    """One writer of a segment, with the pending add that it has left."""

    def __init__(self, storage: Storage, log: Log, unit_key: str) -> None:
        self._storage, self._log, self._unit_key = storage, log, unit_key
        self._attempts, self._start = Attempts(storage, log), len(log)
        self._patience_s = random.uniform(1, 2) * PATIENCE_S
        self._own, self._pended, self._lost, self._look_s = "", "", False, 0.0

    def committed(self) -> Segment | None:
        """Return the segment of the unit, also one that was deleted since the start."""
        found = self._log.winner(self._unit_key)
        if found is None:
            later = self._log.added_since(self._start)
            found = next((each for each in later if each.unit_key == self._unit_key), None)
        return found

    def step(self, ours: Segment) -> None:
        """Publish, or leave a pending add and wait for a moment."""
        if self._own and ours.path != self._pended:
            self.leave()  # gc has removed this content meanwhile: another generation
        before = [name for name in self._live() if not self._own or name < self._own]
        if not before and (self._own or not self._lost):
            if self._publish(ours):
                return
            self._lost = True
            if not self._own:
                return  # decide on the new log before this writer waits
        if not self._own:
            self._pend(ours)
        self._wait()
        self._lost = False

    def leave(self) -> None:
        """Remove the pending add."""
        if self._own:
            # The first error matters to the caller; gc removes a file that stays.
            with suppress(StoreError):
                self._storage.remove(f"log/{self._own}")
        self._own = ""

    def _live(self) -> Iterator[str]:
        """Yield the pending adds of other writers that are not committed and may be at work."""
        now_s = time.monotonic()
        for name, seen_s in self._log.pending.items():
            if name != self._own and self._is_open(name) and now_s - seen_s < self._patience_s:
                yield name

    def _is_open(self, name: str) -> bool:
        unit_key = unit_of(name)
        return unit_key is not None and self._log.winner(unit_key) is None

    def _pend(self, ours: Segment) -> None:
        entry = {"after": self._start, **record.encode_segment(ours)}
        data = encode_sealed(entry)
        if len(data) <= _MAX_BYTES:
            unit = self._unit_key.removeprefix("sha256:")
            self._own, self._pended = f"pending-{unit}.{uuid.uuid4().hex[:8]}.json", ours.path
            self._storage.create(f"log/{self._own}", data)

    def _wait(self) -> None:
        wait_s = min(max(_LOOKS * self._look_s, _MIN_WAIT_S), _MAX_WAIT_S)
        time.sleep(random.uniform(0.5, 1.5) * wait_s)
        start_s = time.monotonic()
        self._log.refresh()
        self._look_s = time.monotonic() - start_s

    def _publish(self, ours: Segment) -> bool:
        """Publish our segment with those of others that fit; return False if others were faster."""
        adds, size, values = [ours], 0, 0
        others = sorted(filter(self._is_open, self._log.pending.keys() - {self._own}))[:_MAX_ADDS]
        read = map_concurrently(self._read, [(name,) for name in others]) if others else []
        for data in read:
            size, values = size + len(data), values + count_values(data)
            if size > schema.MAX_RECORD_BYTES // 2 or values > schema.MAX_RECORD_VALUES // 2:
                break
            if (new := self._fitting(data, adds)) is not None:
                adds.append(new)
        return self._attempts.publish({"adds": adds}) is not None

    def _read(self, name: str) -> bytes:
        try:
            return self._storage.read(f"log/{name}", _MAX_BYTES) or b""
        except IntegrityError:
            # Not what a writer leaves; gc removes it.
            return b""

    def _fitting(self, data: bytes, adds: list[Segment]) -> Segment | None:
        """Return the segment of a pending add; None where it is damaged or does not fit."""
        log = self._log
        try:
            entry, _ = decode_sealed(data, "")
            new, after = record.decode_segment(entry, ""), entry["after"]
            # What does not encode to the same bytes would not in a record either.
            if not is_count(after) or canonical([[[entry]]])[3:-3] != data.partition(b"\n")[0]:
                return None
            check_name_identity(log, new)
            check_base(log, new)
        except (StoreError, IdentityError, KeyError, ValueError, RecursionError):
            # Its writer, if it is at work, decides by itself.
            return None
        if log.winner(new.unit_key) is not None or log.deleted_at(new.unit_key) >= after:
            return None
        if new.generation != log.generation(new.kind, new.seg_id):
            return None
        # Segments that depend on each other follow in the next records.
        known = log.first_of_name(new.kind, new.name) is not None
        for each in adds:
            if each.unit_key == new.unit_key:
                return None
            if (each.kind, each.name) == (new.kind, new.name) and not (
                known and (new.kind == schema.ROLLOUT or each.base != new.base)
            ):
                return None
        return new
