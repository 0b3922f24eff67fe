"""Every file effect of the store, and nothing else.

One small module, so that a test can make any single call fail and so that three rules hold
everywhere: nothing is overwritten (`O_EXCL`, `link`, `rename` to a free name), nothing is published
before it is on the disk (`fsync` of files and of directories), and reading below the store's root
never follows a symbolic link. The root itself is the caller's choice and may be one.

Operating system errors come out as StoreError with the system's own words; what a caller has to
tell apart (absent, taken) is a return value.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from logitcask.engine.errors import IntegrityError, StoreError

_REMEDIES = {
    errno.ENOSPC: "make room on that disk, then run the same command again; commits are safe",
    errno.EDQUOT: "raise the disk quota, then run the same command again; commits are safe",
    errno.EACCES: "give this user the right to read and write there",
    errno.EPERM: "give this user the right to read and write there",
    errno.EROFS: "that file system is read-only; use a store elsewhere",
}


@contextmanager
def _disk(action: str, path: Path) -> Iterator[None]:
    """Turns an OSError into a StoreError that says what was being done to which file."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        words = os.strerror(error.errno) if error.errno else str(error)
        raise StoreError(
            f"cannot {action} {path}: {words}",
            remedy=_REMEDIES.get(
                error.errno or 0, "check the disk, then run the same command again"
            ),
        ) from error


def make_dir(path: Path) -> None:
    """Makes one directory; it may be there already, its parent must be."""
    with _disk("make directory", path):
        try:
            os.mkdir(path, 0o777)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory") from None


def make_root(path: Path) -> None:
    """Makes the store's own directory with the parents that it lacks."""
    with _disk("make directory", path):
        os.makedirs(path, exist_ok=True)


def kind(path: Path) -> str:
    """'dir', 'file', 'link', 'other' or 'absent': of the name itself, not of a link's target."""
    with _disk("look at", path):
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return "absent"
    for name, test in (("dir", stat.S_ISDIR), ("file", stat.S_ISREG), ("link", stat.S_ISLNK)):
        if test(mode):
            return name
    return "other"


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that must not exist yet; it is on the disk when this returns."""
    with _disk("write", path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
            os.fsync(handle)
        finally:
            os.close(handle)


def _open_below(root: Path, relative: str) -> int:
    """Opens root/relative one name at a time, so that no part of it can be a symbolic link."""
    *folders, name = relative.split("/")
    try:
        here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, "the root is no directory") from error
    try:
        for folder in folders:
            below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = below
        # O_NONBLOCK: a named pipe put in a file's place must not hang the reader.
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here)
    finally:
        os.close(here)


def read(root: Path, relative: str, limit: int) -> bytes | None:
    """The bytes of root/relative, or None where nothing is there.

    Raises IntegrityError for what no store writes: a link, something that is not a plain file, or a
    file of more than `limit` bytes (it is not read then).
    """
    path = root / relative
    with _disk("read", path):
        try:
            handle = _open_below(root, relative)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise IntegrityError(
                f"{path}: a symbolic link or a file stands where the store keeps its own files",
                remedy="restore that path from a copy of the store; a store never contains links",
            ) from error
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise IntegrityError(
                    f"{path}: not a plain file", remedy="restore it from a copy of the store"
                )
            if status.st_size > limit:
                raise IntegrityError(
                    f"{path}: {status.st_size} bytes where at most {limit} are allowed",
                    remedy="restore it from a copy of the store",
                )
            parts: list[bytes] = []
            left = limit + 1
            while left and (part := os.read(handle, min(left, 1 << 24))):
                parts.append(part)
                left -= len(part)
        finally:
            os.close(handle)
    return b"".join(parts)


def size(path: Path) -> int | None:
    """Bytes of a file, None where nothing is there."""
    with _disk("look at", path):
        try:
            return os.lstat(path).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None


def rename(source: Path, target: Path) -> bool:
    """Moves a directory to a free name; False where the name is taken (nothing is changed then)."""
    with _disk("rename to", target):
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                return False
            raise
    return True


def link(source: Path, target: Path) -> bool:
    """Publishes a finished file under a second name; False where that name is taken."""
    with _disk("publish", target):
        try:
            os.link(source, target)
        except FileExistsError:
            return False
    return True


def fsync_dir(path: Path) -> None:
    """Makes the names in a directory durable."""
    with _disk("flush directory", path):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def list_dir(path: Path) -> list[str]:
    """The names in a directory, sorted; none where it is absent."""
    with _disk("list", path):
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []


def walk(path: Path) -> list[str]:
    """Everything below a directory that is not a directory itself, relative and sorted."""
    found = []
    for name in list_dir(path):
        if kind(path / name) == "dir":
            found += [f"{name}/{below}" for below in walk(path / name)]
        else:
            found.append(name)
    return found


def remove_tree(path: Path) -> None:
    """Removes a staging directory and all below it."""
    with _disk("remove", path):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            return
