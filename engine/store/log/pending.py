"""Group commit: writers that meet at the next number leave their adds to one of them.

  log/pending-<10 digits: base>-<64 hex of the unit key>.json

Two lines like format.json: the whole entry of one segment, whose object is in place. `base` is the
number of records when its writer began; the unit was not visible then, so such a file is done as
soon as a record from `base` on has added the unit, and need not be read or removed before.

A writer that loses the race for a number, or sees others wait, creates such a file and looks again
after a moment. The oldest publishes one record that names its own segment and all others that fit,
and the other writers find themselves committed. A file is not data before a record names its
segment: one that is damaged or does not fit is left out. If the oldest has stopped, the next one
publishes after PATIENCE_S without a new record.
"""

import random
import re
import time
from collections.abc import Callable
from contextlib import suppress

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.record as record
from logitcask.engine.config.parse.strict_json import count_values
from logitcask.engine.errors import IdentityError, IntegrityError, StoreError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.log.lines import decode_sealed, encode_sealed
from logitcask.engine.store.log.log import Log
from logitcask.engine.store.log.publish import (
    Attempts,
    build,
    check_base,
    check_name_identity,
)
from logitcask.engine.store.storage.base import Storage, map_concurrently

PATIENCE_S, _RANK_S = 5.0, 1.0
"""Seconds without a new record after which the second of the waiting publishes, and for each one
between it and a later one: not all of them at once."""
_POLL_S = 0.1
"""Seconds between two looks of the first ones, on average; up to five times as many further back.
By simulation of 1,000 to 10,000 writers (bench/bench_scale.py)."""
_MAX_BYTES, _MAX_ADDS = 1 << 18, 512
"""Larger entries are published by their own writer alone; more entries by later records."""
_NAME = re.compile(r"pending-([0-9]{10})-([0-9a-f]{64})\.json")

Decide = Callable[[], Segment | None]


def is_done(log: Log, name: str) -> bool:
    """Return whether a pending add is committed, or no name of one."""
    found = _NAME.fullmatch(name)
    if found is None:
        return True
    unit_key = f"sha256:{found[2]}"
    return log.winner(unit_key) is not None or log.deleted_at(unit_key) >= int(found[1])


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
        self._attempts, self._base = Attempts(storage, log), len(log)
        self._own, self._pended, self._lost = "", "", False
        self._grown_s = time.monotonic()
        """When the log had grown, as far as this writer has seen."""
        self._found: dict[str, bytes] = {}
        """Pending adds that this writer has read."""

    def committed(self) -> Segment | None:
        """Return the segment of the unit, also one that was deleted since the start."""
        found = self._log.winner(self._unit_key)
        if found is None:
            later = self._log.added_since(self._base)
            found = next((each for each in later if each.unit_key == self._unit_key), None)
        return found

    def step(self, ours: Segment) -> None:
        """Publish, or leave a pending add and wait for a moment."""
        if self._own and ours.path != self._pended:
            self.leave()  # gc has removed this content meanwhile: another generation
        others = self._others()
        rank = sum(name < self._own for name in others) if self._own else len(others)
        waited_s = time.monotonic() - self._grown_s
        first = not rank or waited_s >= PATIENCE_S + _RANK_S * (rank - 1)
        if first and (self._own or not self._lost):
            if self._publish(ours, others):
                return
            self._lost = True
            if not self._own:
                return  # decide on the new log before this writer waits
        wait_s = _POLL_S * random.uniform(0.5, 1.5) * (1 + min(rank, 64) / 16)
        if not self._own:
            self._pend(ours)
            wait_s = random.uniform(0, _POLL_S)
        self._wait(wait_s)

    def _wait(self, wait_s: float) -> None:
        time.sleep(wait_s)
        before, self._lost = len(self._log), False
        self._log.refresh()
        if len(self._log) > before:
            self._grown_s = time.monotonic()

    def leave(self) -> None:
        """Remove the pending add."""
        if self._own:
            # The first error matters to the caller; gc removes a file that stays.
            with suppress(StoreError):
                self._storage.remove(f"log/{self._own}")
        self._own = ""

    def _others(self) -> list[str]:
        """Return the pending adds of other writers that may be committed, the oldest first."""
        log = self._log
        left = sorted(log.pending - log.unfit - {self._own})
        return [name for name in left if not is_done(log, name)]

    def _pend(self, ours: Segment) -> None:
        data = encode_sealed(record.encode_segment(ours))
        if len(data) <= _MAX_BYTES:
            unit = self._unit_key.removeprefix("sha256:")
            self._own, self._pended = f"pending-{self._base:010d}-{unit}.json", ours.path
            # Where it exists, another writer waits with the same unit: the first commit wins.
            self._storage.leave(f"log/{self._own}", data)

    def _publish(self, ours: Segment, others: list[str]) -> bool:
        """Publish our segment with those of others that fit; return False if others were faster."""
        adds, unfit, size, values = [ours], set(), 0, 0
        new = [name for name in others[:_MAX_ADDS] if name not in self._found]
        if new:
            read = map_concurrently(self._read, [(name,) for name in new])
            self._found |= zip(new, read, strict=True)
        for name in others[:_MAX_ADDS]:
            data = self._found[name]
            size, values = size + len(data), values + count_values(data)
            if size > schema.MAX_RECORD_BYTES // 2 or values > schema.MAX_RECORD_VALUES // 2:
                break
            segment = self._fitting(data, name)
            if segment is None:
                unfit.add(name)
            elif self._is_independent(segment, adds):
                adds.append(segment)
        if self._attempts.publish({"adds": adds}) is None:
            return False
        # Decided on the newest log. Their writers, if they are at work, decide by themselves.
        self._log.unfit |= unfit
        return True

    def _read(self, name: str) -> bytes:
        try:
            return self._storage.read(f"log/{name}", _MAX_BYTES) or b""
        except IntegrityError:
            # Not what a writer leaves; gc removes it.
            return b""

    def _fitting(self, data: bytes, name: str) -> Segment | None:
        """Return the segment of a pending add; None where it is damaged or does not fit."""
        log = self._log
        try:
            entry, _ = decode_sealed(data, "")
            new = record.decode_segment(entry, "")
            # What does not encode to the same bytes would not in a record either.
            if canonical([[[entry]]])[3:-3] != data.partition(b"\n")[0]:
                return None
            check_name_identity(log, new)
            check_base(log, new)
        except (StoreError, IdentityError, ValueError, RecursionError):
            return None
        same = name.endswith(f"-{new.unit_key.removeprefix('sha256:')}.json")
        fits = same and new.generation == log.generation(new.kind, new.seg_id)
        return new if fits else None

    def _is_independent(self, new: Segment, adds: list[Segment]) -> bool:
        """Return whether these adds do not decide about the new one: else a later record has it."""
        known = self._log.first_of_name(new.kind, new.name) is not None
        for each in adds:
            if each.unit_key == new.unit_key:
                return False
            if (each.kind, each.name) == (new.kind, new.name) and not (
                known and (new.kind == schema.ROLLOUT or each.base != new.base)
            ):
                return False
        return True
