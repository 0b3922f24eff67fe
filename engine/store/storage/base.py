"""Where a store's bytes lie: a folder on a disk, or a prefix in an object store.

Everything that the store does to the outside goes through these few calls, so a test can make any
single one fail. Names are relative to the store, parts divided by '/'; they are fixed words,
numbers and content addresses, and are never taken from data. Nothing is ever overwritten: a name is
made once, and its bytes stay. Only a damaged file of a content address is replaced, by what it was.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from logitcask.engine.errors import StoreError

STAGING = "staging"
"""Work in progress on a disk; never read, and free to delete when nobody writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One object below a folder."""

    name: str
    """Relative to the store."""
    size: int
    """Bytes."""


class Storage(Protocol):
    """Every call raises StoreError, with the system's own words, where the system refuses."""

    url: str
    """What opens it again."""

    def where(self, name: str) -> str:
        """The path or URL of a name, for messages."""

    def prepare(self, folders: Iterable[str], file: str) -> None:
        """Makes what a new store needs. StoreError where something else is in the way; `file`,
        which the creator makes afterwards, may be there: another was faster.
        """

    def check(self, folders: Iterable[str]) -> None:
        """IntegrityError where a folder of the store is a file or a link, or has no log."""

    def read(self, name: str, limit: int) -> bytes | None:
        """The bytes of a name, None where nothing is there.

        IntegrityError for what no store writes: a link, no plain file, or more than `limit` bytes,
        which are not read then.
        """

    def read_all(self, limits: Mapping[str, int]) -> dict[str, bytes | None]:
        """`read` of several names, each with its limit."""

    def create(self, name: str, data: bytes) -> bool:
        """Makes a name with all of its bytes at once, durably; False where it is taken.

        Of several who try, one gets True. A lost answer may make that one see False.
        """

    def place(self, folder: str, contents: Mapping[str, bytes]) -> None:
        """Makes a folder of files, durably, and compares what is there with what was meant.

        The folder may be there already, from a race or a crash. A folder is named by its content,
        so what is there and is not `contents` is damage, and is repaired.
        """

    def settle(self, folder: str) -> None:
        """Returns when every name that can be seen in a folder would survive a power cut."""

    def names(self, folder: str, after: str = "") -> list[str]:
        """The names directly in a folder that sort behind `after`, sorted; none if it is absent."""

    def files(self, folder: str) -> list[Found]:
        """Everything below a folder that is not a folder itself, sorted by name."""

    def touched_s(self, name: str) -> float:
        """When a file, or anything of a folder, was last made or changed: seconds since 1970, by
        the clock of whoever keeps the bytes; 0 where nothing is there.
        """

    def remove(self, name: str) -> None:
        """Removes a file, or a folder and all below it; it may be gone already."""


SCHEMES = {
    "file": "logitcask.engine.store.storage.local:LocalStorage",
    "s3": "logitcask.engine.store.storage.object_store:ObjectStorage",
    "gs": "logitcask.engine.store.storage.object_store:ObjectStorage",
    "az": "logitcask.engine.store.storage.object_store:ObjectStorage",
}
"""Scheme of a URL -> module:class; a class takes the URL. A text without a scheme is a path."""


def open_storage(url: str | Path) -> Storage:
    """The medium that a path or URL names. Raises StoreError for a scheme that is not known."""
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
            f"no store is kept by {scheme}://",
            hint=f"give a folder, or a URL that begins with one of: {', '.join(SCHEMES)}",
        )
    module, _, name = SCHEMES[scheme].partition(":")
    kind: Any = getattr(import_module(module), name)
    storage: Storage = kind(f"{scheme}://{behind}" if divider else str(url))
    return storage
