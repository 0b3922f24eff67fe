"""The storage protocol: a folder on a disk, or a prefix in an object store.

Every effect of the store goes through these few calls, so a test can make any single one fail.
Names are relative to the store, parts divided by '/'; they are fixed words, numbers and content
addresses, never taken from data. Nothing is overwritten: a name is created once and keeps its
bytes. Only a damaged file of a content address is replaced, by its original bytes.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

from logitcask.engine.errors import IntegrityError, StoreError

T = TypeVar("T")

STAGING = "staging"
"""Work in progress on a disk; never read, and free to delete when no process writes."""
MAX_CONCURRENT = 16
"""Concurrent requests of one call on many objects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One object below a folder."""

    name: str
    """Relative to the store."""
    size: int
    """Bytes."""


class Storage(Protocol):
    """Calls raise StoreError with the system's own message where the system refuses."""

    url: str
    """The path or URL that opens this storage again."""

    def where(self, name: str) -> str:
        """Return the path or URL of a name, for messages."""

    def check_writable(self) -> None:
        """Raise StoreError where the storage can only be read."""

    def prepare(self, folders: Iterable[str], file: str) -> None:
        """Create the folders of a new store. Raises StoreError where other files are in the way.

        `file` may exist already, from a process that creates the same store.
        """

    def check(self, folders: Iterable[str]) -> None:
        """Raise IntegrityError where a folder is a file or a link, or the log is missing."""

    def read(self, name: str, limit: int) -> bytes | None:
        """Return the bytes of a name, None where it does not exist.

        Raises IntegrityError for a link, a special file, or more than `limit` bytes, which are
        then not read.
        """

    def read_part(self, name: str, start: int, size: int) -> bytes | None:
        """Return `size` bytes of a name from `start` on, fewer at its end; None = no such name.

        Raises IntegrityError for a link or a special file.
        """

    def read_all(self, limits: Mapping[str, int]) -> dict[str, bytes | None]:
        """Read several names, each with its limit."""

    def create(self, name: str, data: bytes) -> bool:
        """Create a name with all of its bytes at once, durably; return False if it exists.

        One of several concurrent callers gets True. After a lost response it may get False.
        """

    def leave(self, name: str, data: bytes) -> bool:
        """Create a name as `create` does, for what may be lost or torn by a power cut."""

    def put(self, name: str, data: bytes) -> None:
        """Create a name with all of its bytes at once, durably, and verify them.

        It may exist already, from a race or a crash. The name is a content address, so other bytes
        than `data` are damage, and are replaced at once.
        """

    def settle(self, folder: str) -> None:
        """Wait until every visible name of a folder would survive a power cut."""

    def names(self, folder: str, after: str = "") -> list[str]:
        """List the names directly in a folder that sort after `after`, sorted; [] if absent."""

    def files(self, folder: str) -> list[Found]:
        """List all files below a folder, sorted by name."""

    def touched_s(self, name: str) -> float:
        """Return when a file last changed; 0 where it is absent.

        In seconds since 1970, by the clock of the storage.
        """

    def remove(self, name: str) -> None:
        """Remove a file; it may be absent already."""


def check_empty(storage: Storage, names: Iterable[str]) -> None:
    """Raise StoreError where the place of a new store has other than these or hidden names."""
    others = set(storage.names("")) - set(names)
    if other := next((each for each in sorted(others) if not each.startswith(".")), None):
        raise StoreError(
            f"{storage.url} is not a logitcask store and not empty: it holds {other!r}",
            hint="give a new or an empty folder or prefix",
        )


def map_concurrently(call: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> list[T]:
    """Return [call(*each) ...] in order, with several calls at a time."""
    with ThreadPoolExecutor(MAX_CONCURRENT) as pool:
        return list(pool.map(lambda each: call(*each), arguments))


def holds(storage: Storage, name: str, data: bytes) -> bool:
    """Return whether a name has exactly these bytes."""
    try:
        return storage.read(name, len(data)) == data
    except IntegrityError:
        # A link or a larger file.
        return False


SCHEMES = {
    "file": "logitcask.engine.store.storage.local:LocalStorage",
    "s3": "logitcask.engine.store.storage.object_store:ObjectStorage",
    "gs": "logitcask.engine.store.storage.object_store:ObjectStorage",
    "az": "logitcask.engine.store.storage.object_store:ObjectStorage",
    "hf": "logitcask.engine.store.storage.hub:HubStorage",
}
"""Scheme of a URL -> module:class; the class takes the URL. A text without a scheme is a path."""


def open_storage(url: str | Path) -> Storage:
    """Open the storage of a path or URL. Raises StoreError for an unknown scheme."""
    before, divider, behind = str(url).partition("://")
    scheme = before.lower() if divider else "file"
    if isinstance(url, Path) and url.parts[:1] in [(f"{each}:",) for each in SCHEMES]:
        raise StoreError(
            f"a URL of {url.parts[0]}// as a Path, which keeps one of its slashes",
            hint="give it as text",
        )
    if scheme not in SCHEMES:
        # The rest is not repeated, for it may hold a secret.
        raise StoreError(
            f"unknown scheme {scheme}:// of a store",
            hint=f"give a folder, or a URL that begins with one of: {', '.join(SCHEMES)}",
        )
    module, _, name = SCHEMES[scheme].partition(":")
    kind: Any = getattr(import_module(module), name)
    storage: Storage = kind(f"{scheme}://{behind}" if divider else str(url))
    return storage
