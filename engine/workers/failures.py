"""Units that failed: how often, with which error, and when they are left out."""

from typing import Any

from logitcask.engine.errors import UnitError
from logitcask.engine.store import Store
from logitcask.engine.store.log.claims import (
    failed_units,
    failures_of,
    forget_failures,
    shard_of,
)


class Failures:
    """The notes of failures as of the last look at each shard."""

    def __init__(self, store: Store, attempts: int) -> None:
        self._store, self._attempts = store, attempts
        self._seen: dict[str, dict[str, tuple[int, bool]]] = {}
        """Shard -> unit_key -> (number of notes, True where left out): each note is read once."""
        self.left_out: set[str] = set()
        """Units that failed too often, or once with UnitError."""

    def refresh(self, shard: str = "") -> None:
        """Look at the notes of a shard; empty = at all."""
        before = self._seen.get(shard, {})
        # Drop the entries of removed notes: later notes are counted from 0.
        self._seen[shard] = {
            key: before[key]
            if key in before and before[key][0] == times
            else self._read(key, times)
            for key, times in failed_units(self._store.storage, shard).items()
        }
        self.left_out -= before.keys()
        self.left_out |= {key for key, (_, left) in self._seen[shard].items() if left}

    def forget(self, key: str) -> None:
        """Remove the notes of a unit, if it had any at the last look."""
        if key in self._seen.get(shard_of(key), {}):
            forget_failures(self._store.storage, key)

    def _read(self, key: str, times: int) -> tuple[int, bool]:
        if times >= self._attempts:
            return times, True
        notes = failures_of(self._store.storage, key)
        return times, any(note.error == UnitError.__name__ for note in notes)


def retry_failed(store: Store) -> list[dict[str, Any]]:
    """Remove every failure note, so that workers try these units again.

    Return the last note of each unit, and its number of failures.
    """
    removed: list[dict[str, Any]] = []
    for key, times in failed_units(store.storage).items():
        for note in failures_of(store.storage, key)[-1:]:
            message = first_line(note.message)
            brief = {"error": note.error, "message": message, "worker": note.worker}
            removed.append({"unit": key, "failures": times, **brief})
        forget_failures(store.storage, key)
    return removed


def error_of(store: Store, key: str) -> str:
    """Return the first error of a unit, in one line; empty if it has no note."""
    for note in failures_of(store.storage, key):
        return f"{note.error}: {first_line(note.message)}"
    return ""


def first_line(message: str) -> str:
    return (message.splitlines() or [""])[0]
