"""Coordination of workers in a store: claims of units, and notes of failures.

  claims/<2 hex>/<62 hex>.<fence>   made by the worker that takes a unit, renewed by the next fence
  failed/<2 hex>/<62 hex>.<number>  made each time that the work of a unit raises

The hex digits are those of the unit key; the first two are its shard. A worker lists the shard in
which it looks for a unit, and renews and releases by name, so its requests do not grow with the
number of workers. A claim only saves work: the first commit of a unit wins, whichever worker holds
the claim. Clocks of different machines are never compared: a claim is dead for an observer that has
seen the same newest fence for a lease, by its own clock. The folders are created when needed, and
readers ignore them.
"""

import json
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import logitcask.engine.store.format.schema as schema
from logitcask.engine.errors import IntegrityError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.log.format_file import now
from logitcask.engine.store.storage.base import Storage

CLAIMS, FAILED = "claims", "failed"
FOLDERS = (CLAIMS, FAILED)
MAX_NOTE_BYTES = 1 << 17
_MESSAGE, _TRACEBACK = 1000, 8000
"""Characters of each in a note of a failure; a character is 12 bytes of JSON at most."""
_FILE = re.compile(r"([0-9a-f]{2})/([0-9a-f]{62})\.([0-9]{10})")
"""A claim or a note, relative to its folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One failed attempt at a unit."""

    unit_key: str
    time: str
    """UTC, ISO 8601, by the worker's clock."""
    host: str
    pid: int
    worker: str
    error: str
    """Type of the exception."""
    message: str
    """The first _MESSAGE characters of it."""
    traceback: str
    """The last _TRACEBACK characters of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimedUnit:
    """A unit that a worker claims, as a reader sees it."""

    unit_key: str
    worker: str
    """'' where the claim is incomplete."""
    renewals: int
    renewed: float
    """Time of the newest fence, seconds since 1970 by the storage's clock."""


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
        self._seen: dict[str, dict[str, tuple[list[int], float]]] = {}
        """Shard -> unit -> (its fences, when this worker first saw the newest)."""

    def refresh(self, shard: str) -> None:
        """List the claims of a shard, and note which have a new fence."""
        at, before = self._clock(), self._seen.get(shard, {})
        self._seen[shard] = {
            unit: (fences, before[unit][1])
            if unit in before and before[unit][0][-1] == fences[-1]
            else (fences, at)
            for unit, fences in _listed(self._storage, CLAIMS, shard).items()
        }

    def take(self, unit_key: str) -> "Claim | None":
        """Claim a unit that was free, or whose claim was dead, at the last refresh of its shard.

        Return None where another worker has it.
        """
        unit = _unit_of(unit_key)
        fences, since = self._seen.get(shard_of(unit_key), {}).get(unit, ([], 0.0))
        if fences and self._clock() - since < self._lease_s:
            return None
        claim = Claim(self._storage, unit, fences, self._worker)
        return claim if claim.renew() else None


class Claim:
    """A claim that a worker holds, by its newest fence."""

    def __init__(self, storage: Storage, unit: str, fences: list[int], worker: str) -> None:
        """Continue the fences of a dead claim, or begin where there are none."""
        self._storage, self._unit, self._fences, self._worker = storage, unit, fences, worker

    def renew(self) -> bool:
        """Make the next fence; return False where another worker has made it and holds the unit."""
        fence = self._fences[-1] + 1 if self._fences else 0
        body = canonical({"worker": self._worker, "beat": fence})
        if not self._storage.leave(_name(CLAIMS, self._unit, fence), body):
            return False
        # A worker that died in between may have left several.
        self.release()
        self._fences = [fence]
        return True

    def release(self) -> None:
        """Remove the claim, but no newer fence of another worker."""
        for fence in self._fences:
            self._storage.remove(_name(CLAIMS, self._unit, fence))


def claimed_units(storage: Storage) -> list[ClaimedUnit]:
    """Return the claims of all workers, the newest first; those of dead workers too."""
    found = []
    for unit, fences in _listed(storage, CLAIMS).items():
        name = _name(CLAIMS, unit, fences[-1])
        body, renewed = storage.read(name, MAX_NOTE_BYTES), storage.touched_s(name)
        if body is None or not renewed:
            continue  # released meanwhile
        try:
            worker = json.loads(body)["worker"]
        except (ValueError, KeyError, TypeError, RecursionError):
            worker = ""  # a power cut may have torn it
        found.append(
            ClaimedUnit(
                unit_key=f"sha256:{unit}",
                worker=worker if isinstance(worker, str) else "",
                renewals=fences[-1],
                renewed=renewed,
            )
        )
    return sorted(found, key=lambda each: -each.renewed)


def forget_claims(storage: Storage, worker: str) -> None:
    """Remove the claims of a worker that is dead, so that others need not wait for a lease."""
    for unit, fences in _listed(storage, CLAIMS).items():
        # An incomplete claim names no worker, and dies as any other does.
        body = storage.read(_name(CLAIMS, unit, fences[-1]), MAX_NOTE_BYTES)
        if body == canonical({"worker": worker, "beat": fences[-1]}):
            for fence in fences:
                storage.remove(_name(CLAIMS, unit, fence))


def shard_of(unit_key: str) -> str:
    """Return the shard of a unit: the folder of its claims and of its notes."""
    return _unit_of(unit_key)[:2]


def note_failure(storage: Storage, unit_key: str, error: Exception, worker: str) -> None:
    """Add a note of the exception that the work of a unit raised."""
    unit = _unit_of(unit_key)
    body = {
        "time": now(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "worker": worker,
        "error": type(error).__name__,
        "message": str(error)[:_MESSAGE],
        "traceback": "".join(traceback.format_exception(error))[-_TRACEBACK:],
    }
    number = max(_listed(storage, FAILED, unit[:2]).get(unit, [-1])) + 1
    while not storage.create(_name(FAILED, unit, number), canonical(body)):
        number += 1


def failed_units(storage: Storage, shard: str = "") -> dict[str, int]:
    """Return unit_key -> number of failures, of every unit with a note; shard: only of this one."""
    return {f"sha256:{u}": len(numbers) for u, numbers in _listed(storage, FAILED, shard).items()}


def failures_of(storage: Storage, unit_key: str) -> list[Failure]:
    """Return the failures of a unit, oldest first. Raises IntegrityError for an invalid note."""
    unit = _unit_of(unit_key)
    found = []
    for number in _listed(storage, FAILED, unit[:2]).get(unit, ()):
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
    """Remove the notes of a unit, so that workers try it again."""
    unit = _unit_of(unit_key)
    for number in _listed(storage, FAILED, unit[:2]).get(unit, ()):
        storage.remove(_name(FAILED, unit, number))


def orphans(storage: Storage, committed: Iterable[str], born_before: float) -> list[str]:
    """Return names of claims and notes of committed units, and of claims not renewed since.

    born_before: in seconds since 1970.
    """
    done = {_unit_of(key) for key in committed}
    return [
        name
        for folder in FOLDERS
        for unit, numbers in _listed(storage, folder).items()
        for name in (_name(folder, unit, number) for number in numbers)
        if unit in done or (folder == CLAIMS and storage.touched_s(name) < born_before)
    ]


def unknown_files(storage: Storage) -> list[str]:
    """Return names in the folders of neither a claim nor a note."""
    return [
        each.name
        for folder in FOLDERS
        for each in storage.files(folder)
        if not _FILE.fullmatch(each.name[len(folder) + 1 :])
    ]


def _listed(storage: Storage, folder: str, shard: str = "") -> dict[str, list[int]]:
    """Return unit -> its numbers in a folder, ascending; of one shard, or of all."""
    if shard:
        names = [f"{shard}/{name}" for name in storage.names(f"{folder}/{shard}")]
    else:
        names = [each.name[len(folder) + 1 :] for each in storage.files(folder)]
    found: dict[str, list[int]] = {}
    for name in names:
        if match := _FILE.fullmatch(name):
            found.setdefault(match[1] + match[2], []).append(int(match[3]))
    return found


def _name(folder: str, unit: str, number: int) -> str:
    return f"{folder}/{unit[:2]}/{unit[2:]}.{number:010d}"


def _unit_of(unit_key: str) -> str:
    assert schema.DIGEST.fullmatch(unit_key), unit_key
    return unit_key.removeprefix("sha256:")
