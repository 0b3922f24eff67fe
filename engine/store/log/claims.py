"""What workers tell each other in a store: who is at which unit, and what failed how.

  claims/<64 hex>.<fence>   made by whoever takes a unit, renewed by making the next fence
  failed/<64 hex>.<number>  made each time that the work of a unit raises

The hex digits are those of the unit's key. A claim saves work and guards nothing: the first commit
of a unit wins, whoever else was at it. No machine's clock is compared with another's: a claim is
dead for an observer who has seen its newest fence stay the same for a lease by a clock of its own.
Both folders are made when they are needed, and a store reads the same without them.
"""

import json
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import logitcask.engine.store.format.schema as schema
from logitcask.engine.errors import IntegrityError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.storage.base import Storage

CLAIMS, FAILED = "claims", "failed"
FOLDERS = (CLAIMS, FAILED)
MAX_NOTE_BYTES = 1 << 17
_MESSAGE, _TRACEBACK = 1000, 8000
"""Characters of each that a note of a failure keeps; a character is 12 bytes of JSON at most."""
_FILE = re.compile(r"([0-9a-f]{64})\.([0-9]{10})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One time that the work of a unit raised."""

    unit_key: str
    time: str
    """UTC, ISO 8601, by the worker's clock."""
    host: str
    pid: int
    worker: str
    error: str
    """The type of what was raised ..."""
    message: str
    """... and what it said, cut off where it is long."""
    traceback: str
    """Its end, where it is long."""


class Claims:
    """The claims of a store as one worker sees them."""

    def __init__(
        self,
        storage: Storage,
        *,
        worker: str,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self._worker = storage, worker
        self._lease_s, self._clock = lease_s, clock
        self._seen: dict[str, tuple[int, float]] = {}
        """Unit -> its newest fence, and since when that was the newest."""

    def look(self) -> None:
        """Sees which claims are there, and which have moved."""
        now = self._clock()
        newest = {unit: max(fences) for unit, fences in _listed(self._storage, CLAIMS).items()}
        for unit, fence in newest.items():
            if self._seen.get(unit, (-1, 0.0))[0] != fence:
                self._seen[unit] = (fence, now)
        self._seen = {unit: seen for unit, seen in self._seen.items() if unit in newest}

    def take(self, unit_key: str) -> "Claim | None":
        """A claim on a unit that was free, or whose claim was dead, at the last look; None where
        another has it.
        """
        unit = _unit_of(unit_key)
        fence, since = self._seen.get(unit, (-1, 0.0))
        if fence >= 0 and self._clock() - since < self._lease_s:
            return None
        claim = Claim(self._storage, unit, fence, self._worker)
        return claim if claim.renew() else None


class Claim:
    """A claim that a worker has, by the fence that it made last."""

    def __init__(self, storage: Storage, unit: str, fence: int, worker: str) -> None:
        self._storage, self._unit, self._fence, self._worker = storage, unit, fence, worker

    def renew(self) -> bool:
        """Makes the next fence; False where another has made it and has the unit from there on."""
        body = canonical({"worker": self._worker, "beat": self._fence + 1})
        if not self._storage.create(_name(CLAIMS, self._unit, self._fence + 1), body):
            return False
        self._fence += 1
        if self._fence:
            self._storage.remove(_name(CLAIMS, self._unit, self._fence - 1))
        return True

    def release(self) -> None:
        """Removes the claim; what another has made since stays."""
        for fence in _listed(self._storage, CLAIMS).get(self._unit, ()):
            if fence <= self._fence:
                self._storage.remove(_name(CLAIMS, self._unit, fence))


def note_failure(storage: Storage, unit_key: str, error: Exception, worker: str) -> None:
    """Leaves a note of what the work of a unit raised, beside those that are there."""
    unit = _unit_of(unit_key)
    body = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "worker": worker,
        "error": type(error).__name__,
        "message": str(error)[:_MESSAGE],
        "traceback": "".join(traceback.format_exception(error))[-_TRACEBACK:],
    }
    number = max(_listed(storage, FAILED).get(unit, [-1])) + 1
    while not storage.create(_name(FAILED, unit, number), canonical(body)):
        number += 1


def failed_units(storage: Storage) -> dict[str, int]:
    """unit_key -> how often its work raised, of every unit that has a note."""
    return {f"sha256:{u}": len(numbers) for u, numbers in _listed(storage, FAILED).items()}


def failures_of(storage: Storage, unit_key: str) -> list[Failure]:
    """The notes of a unit, oldest first. Raises IntegrityError for one that is none."""
    unit = _unit_of(unit_key)
    found = []
    for number in _listed(storage, FAILED).get(unit, ()):
        name = _name(FAILED, unit, number)
        data = storage.read(name, MAX_NOTE_BYTES)
        if data is None:
            continue  # removed meanwhile
        try:
            note: dict[str, Any] = json.loads(data)
            found.append(Failure(unit_key=unit_key, **note))
        except (ValueError, TypeError, RecursionError) as error:
            raise IntegrityError(
                f"{storage.where(name)}: not a note of a failure",
                hint="remove this file: the unit is then tried again",
            ) from error
    return found


def forget_failures(storage: Storage, unit_key: str) -> None:
    """Removes the notes of a unit, so that it is tried again."""
    unit = _unit_of(unit_key)
    for number in _listed(storage, FAILED).get(unit, ()):
        storage.remove(_name(FAILED, unit, number))


def orphans(storage: Storage, committed: Iterable[str], born_before: float) -> list[str]:
    """Names of claims that nobody has renewed since then (seconds since 1970), and of notes and
    claims of units that are committed.
    """
    done = {_unit_of(key) for key in committed}
    found = []
    for folder in FOLDERS:
        for unit, numbers in _listed(storage, folder).items():
            names = [_name(folder, unit, number) for number in numbers]
            old = folder == CLAIMS
            found += [
                n for n in names if unit in done or (old and storage.touched_s(n) < born_before)
            ]
    return found


def unknown_files(storage: Storage) -> list[str]:
    """What lies in the folders and is neither a claim nor a note."""
    return [
        f"{folder}/{name}"
        for folder in FOLDERS
        for name in storage.names(folder)
        if not _FILE.fullmatch(name)
    ]


def _listed(storage: Storage, folder: str) -> dict[str, list[int]]:
    """Unit -> its numbers in a folder, ascending."""
    found: dict[str, list[int]] = {}
    for name in storage.names(folder):
        if match := _FILE.fullmatch(name):
            found.setdefault(match[1], []).append(int(match[2]))
    return found


def _name(folder: str, unit: str, number: int) -> str:
    return f"{folder}/{unit}.{number:010d}"


def _unit_of(unit_key: str) -> str:
    assert schema.DIGEST.fullmatch(unit_key), unit_key
    return unit_key.removeprefix("sha256:")
