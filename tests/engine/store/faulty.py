"""A faulty disk: replaces `os` in storage/local.py, on real files.

It counts every call that can fail. Call number `at` raises an error, or the machine stops there.
The losses of a machine that stops depend on the crash:

  kill   nothing: the process is gone, the system writes its pages
  lost   every name whose directory was not flushed, and every byte that was not
  torn   names stay, but of files that were not flushed half is missing
"""

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALLS = (
    "mkdir",
    "open",
    "write",
    "read",
    "fsync",
    "link",
    "rename",
    "unlink",
    "listdir",
    "lstat",
    "fstat",
)
CRASHES = ("kill", "lost", "torn")


class Crash(BaseException):
    """The machine is gone: nothing catches it, and no clean-up runs after it."""


class FaultyOS:
    """Calls go through until number `at` (from 1; 0 = never), which raises `error` and is not done.

    A Crash stops everything: from then on every call raises it.
    """

    def __init__(self, at: int, error: BaseException, graveyard: Path | None = None) -> None:
        self.at, self.error, self.count, self.dead = at, error, 0, False
        self._graveyard = graveyard
        self._files: dict[int, tuple[Any, Any]] = {}
        """Open file -> (device, inode)."""
        self._dirty: dict[tuple[int, int], int] = {}
        """Inode with unflushed writes -> a handle of our own on it."""
        self._changes: list[Change] = []
        """Changes of names in directories that are not flushed."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            if self.dead:
                raise self.error
            self.count += 1
            if self.count == self.at:
                self.dead = isinstance(self.error, Crash)
                raise self.error
            before = self._before(name, arguments)
            answer = real(*arguments, **options)
            self._after(name, arguments, answer, before)
            return answer

        return call

    def close(self, handle: int) -> None:
        self._files.pop(handle, None)
        os.close(handle)

    # The changes that a crash would undo.

    def _before(self, name: str, arguments: tuple[Any, ...]) -> Path | None:
        if name != "unlink" or self._graveyard is None:
            return None
        kept = self._graveyard / str(self.count)
        os.link(arguments[0], kept)
        return kept

    def _after(self, name: str, arguments: tuple[Any, ...], answer: Any, kept: Any) -> None:
        if name == "open":
            self._files[answer] = inode(answer)
            if arguments[1] & os.O_CREAT:
                self._changes.append(Change("made", Path(arguments[0])))
        elif name == "write":
            self._dirty.setdefault(self._files[arguments[0]], os.dup(arguments[0]))
        elif name == "fsync":
            self._flush(arguments[0])
        elif name == "mkdir":
            self._changes.append(Change("made", Path(arguments[0])))
        elif name == "link":
            self._changes.append(Change("made", Path(arguments[1])))
        elif name == "rename":
            source, target = map(Path, arguments)
            for change in self._changes:
                change.move(source, target)
            self._changes.append(Change("moved", target, source))
        elif name == "unlink" and kept is not None:
            self._changes.append(Change("removed", Path(arguments[0]), kept))

    def _flush(self, handle: int) -> None:
        node = self._files.get(handle)
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            folder = Path(os.readlink(f"/proc/self/fd/{handle}"))
            self._changes = [each for each in self._changes if each.path.parent != folder]
        elif node in self._dirty:
            os.close(self._dirty.pop(node))

    def crash(self, how: str) -> None:
        """Change the disk to its state after a restart of the machine."""
        for handle in self._dirty.values():
            if how != "kill":
                os.ftruncate(handle, os.fstat(handle).st_size // 2 if how == "torn" else 0)
            os.close(handle)
        self._dirty.clear()
        if how == "lost":
            for change in reversed(self._changes):
                change.undo()
        self._changes.clear()


@dataclass
class Change:
    """One change of the names of a directory."""

    kind: str
    """made, moved (here, from `other`) or removed (`other` is a second name of it)."""
    path: Path
    other: Path | None = None

    def move(self, source: Path, target: Path) -> None:
        """Move the path with its folder."""
        if self.path.is_relative_to(source) and self.path != source:
            self.path = target / self.path.relative_to(source)

    def undo(self) -> None:
        if not self.path.parent.is_dir():
            return
        if self.kind == "removed" and self.other is not None:
            os.link(self.other, self.path)
        elif self.kind == "moved" and self.other is not None:
            if self.path.exists():
                self.path.rename(self.other)
        elif self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


def inode(handle: int) -> tuple[int, int]:
    found = os.fstat(handle)
    return found.st_dev, found.st_ino
