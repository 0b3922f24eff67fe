"""Storage in a folder on a disk.

Three rules hold everywhere: nothing is overwritten (`O_EXCL`, `link`) but damage of a content
address, nothing gets its name before it is on the disk (`fsync` of files and of directories), and
reading below the store's root never follows a symbolic link. The root itself is the caller's choice
and may be one.

Operating system errors become StoreError with the system's own message; the conditions that a
caller distinguishes (absent, taken) are return values.
"""

import errno
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.storage.base import STAGING, Found, check_empty, holds

_SAFE = "then run the same command again; committed data is safe"
DISK_HINTS = {
    errno.ENOSPC: f"make room on that disk, {_SAFE}",
    errno.EDQUOT: f"raise the disk quota, {_SAFE}",
    errno.EFBIG: f"raise the limit of file sizes (ulimit -f), {_SAFE}",
    errno.EMFILE: f"allow more open files (ulimit -n), {_SAFE}",
    errno.ENFILE: f"close programs that hold many files open, {_SAFE}",
    errno.EACCES: "give this user the right to read and write there",
    errno.EPERM: "give this user the right to read and write there",
    errno.EROFS: "that file system is read-only; use a store elsewhere",
    errno.EOPNOTSUPP: "that file system has no hard links, which commits need; use another disk",
}
_RESTORE = "restore it from a copy of the store"


@contextmanager
def _disk(action: str, path: Path) -> Iterator[None]:
    """Raise a StoreError that names the action and the file in place of an OSError."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else str(error)
        raise StoreError(
            f"cannot {action} {path}: {cause}",
            hint=DISK_HINTS.get(error.errno or 0, f"check the disk, {_SAFE}"),
        ) from error


class LocalStorage:
    """The storage of a path or of a file:// URL."""

    def __init__(self, url: str) -> None:
        self.url = os.path.abspath(_path_of(url))
        self._root = Path(self.url)

    def where(self, name: str) -> str:
        return str(self._root / name)

    def check_writable(self) -> None:
        """Do nothing: a disk may be written to."""

    def prepare(self, folders: Iterable[str], file: str) -> None:
        if _kind(self._root) == "file":
            raise StoreError(
                f"{self.url} is a file, not a store's folder", hint="give a new folder"
            )
        folders = list(folders)
        check_empty(self, [*folders, file])
        absent = [p for p in (self._root, *self._root.parents) if _kind(p) == "absent"]
        for each in reversed(absent):
            _make_dir(each)
            _fsync_dir(each.parent)
        if not absent:
            # The process that created the root may have stopped before this.
            _fsync_dir(self._root.parent)
        self._make(*folders)

    def check(self, folders: Iterable[str]) -> None:
        for folder in folders:
            found = _kind(self._root / folder)
            # Copies lose empty folders, which are created when needed. A log is never empty.
            if found != "dir" and (found != "absent" or folder == "log"):
                raise IntegrityError(
                    f"{self._root / folder}: {found}, expected a directory",
                    hint=_RESTORE,
                )

    def read(self, name: str, limit: int) -> bytes | None:
        with self._opened(name) as found:
            if found is None:
                return None
            handle, size = found
            if size > limit:
                raise IntegrityError(
                    f"{self._root / name}: {size} bytes where at most {limit} are allowed",
                    hint=_RESTORE,
                )
            return _read_from(handle, size + 1)

    def read_part(self, name: str, start: int, size: int) -> bytes | None:
        with self._opened(name) as found:
            if found is None:
                return None
            handle, end = found
            os.lseek(handle, start, os.SEEK_SET)
            return _read_from(handle, min(size, max(end - start, 0)))

    def read_all(self, limits: Mapping[str, int]) -> dict[str, bytes | None]:
        return {name: self.read(name, limit) for name, limit in limits.items()}

    def leave(self, name: str, data: bytes) -> bool:
        with self._staged(name, data, flush=False) as temporary:
            return self._link(temporary, name)

    def create(self, name: str, data: bytes) -> bool:
        with self._staged(name, data) as temporary:
            created = self._link(temporary, name)
            if created:
                _fsync_dir((self._root / name).parent)
            return created

    def put(self, name: str, data: bytes) -> None:
        with self._staged(name, data) as temporary:
            if not holds(self, f"{STAGING}/{temporary.name}", data):
                raise IntegrityError(
                    f"{temporary}: reads other bytes than were written",
                    hint=f"check the disk, {_SAFE}",
                )
            if not self._link(temporary, name) and not holds(self, name, data):
                with _disk("repair", self._root / name):
                    os.rename(temporary, self._root / name)
            # A name that another process has created may not be on the disk yet.
            _fsync_dir((self._root / name).parent)

    def settle(self, folder: str) -> None:
        _fsync_dir(self._root / folder)

    def names(self, folder: str, after: str = "") -> list[str]:
        with _disk("list", self._root / folder):
            try:
                return sorted(n for n in os.listdir(self._root / folder) if n > after)
            except FileNotFoundError:
                return []

    def files(self, folder: str) -> list[Found]:
        found = []
        for name in self.names(folder):
            below = f"{folder}/{name}" if folder else name
            with _disk("inspect", self._root / below):
                try:
                    status = os.lstat(self._root / below)
                except FileNotFoundError:
                    continue  # removed meanwhile
            if stat.S_ISDIR(status.st_mode):
                found += self.files(below)
            else:
                found.append(Found(name=below, size=status.st_size))
        return found

    def touched_s(self, name: str) -> float:
        with _disk("inspect", self._root / name):
            try:
                status = os.lstat(self._root / name)
            except FileNotFoundError:
                return 0.0
        return status.st_mtime

    def remove(self, name: str) -> None:
        with _disk("remove", self._root / name), suppress(FileNotFoundError):
            os.unlink(self._root / name)

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[int, int] | None]:
        """Open a plain file for reading; yield (handle, bytes), or None where it is absent."""
        path = self._root / name
        with _disk("read", path):
            try:
                handle = self._open_below(name)
            except FileNotFoundError:
                yield None
                return
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                raise IntegrityError(
                    f"{path}: a symbolic link or a file in place of a file or folder of the store",
                    hint="restore that path from a copy of the store; a store has no links",
                ) from error
            try:
                status = os.fstat(handle)
                if not stat.S_ISREG(status.st_mode):
                    raise IntegrityError(f"{path}: not a plain file", hint=_RESTORE)
                yield handle, status.st_size
            finally:
                os.close(handle)

    def _make(self, *folders: str) -> None:
        """Create absent folders and their parents, durably."""
        for folder in folders:
            here = self._root
            for part in Path(folder).parts:
                if _make_dir(here / part):
                    _fsync_dir(here)
                here /= part

    @contextmanager
    def _staged(self, name: str, data: bytes, *, flush: bool = True) -> Iterator[Path]:
        """Write data to a temporary file on the disk that has, or is going to have, a name."""
        temporary = self._root / STAGING / uuid.uuid4().hex
        self._make(STAGING, str(Path(name).parent))
        try:
            _write_new(temporary, data, flush=flush)
            yield temporary
        finally:
            # The first error matters to the caller; a file may stay in staging.
            with suppress(OSError):
                os.unlink(temporary)

    def _link(self, temporary: Path, name: str) -> bool:
        """Give a temporary file a name; return False if the name exists."""
        target = self._root / name
        with _disk("publish", target):
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except PermissionError as error:
                if error.errno != errno.EPERM:
                    raise
                # Linux reports this where a file system has no hard links.
                raise OSError(errno.EOPNOTSUPP, "no hard links") from error
        return True

    def _open_below(self, name: str) -> int:
        """Open a name one part at a time, so that no part of it can be a symbolic link."""
        *folders, last = name.split("/")
        try:
            here = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        except NotADirectoryError as error:
            raise FileNotFoundError(errno.ENOENT, "the root is no directory") from error
        try:
            for folder in folders:
                below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
                os.close(here)
                here = below
            # O_NONBLOCK: a named pipe put in a file's place must not hang the reader.
            return os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here)
        finally:
            os.close(here)


def _path_of(url: str) -> str:
    """Return the path of a file:// URL; any other text is a path already."""
    rest = url.removeprefix("file://")
    if rest == url:
        return url
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise StoreError(
            f"{url}: a path on the host {host!r}", hint="give a path, or file:///ABSOLUTE/PATH"
        )
    return unquote(f"/{path}")


def _kind(path: Path) -> str:
    """Return 'dir', 'file', 'link', 'other' or 'absent', of a link and not of its target."""
    with _disk("inspect", path):
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return "absent"
    for name, test in (("dir", stat.S_ISDIR), ("file", stat.S_ISREG), ("link", stat.S_ISLNK)):
        if test(mode):
            return name
    return "other"


def _make_dir(path: Path) -> bool:
    """Create one directory, whose parent must exist; return False if it exists already."""
    with _disk("make directory", path):
        try:
            os.mkdir(path, 0o777)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory") from None
            return False
    return True


def _read_from(handle: int, most: int) -> bytes:
    """Read up to `most` bytes, to the end of the file, with one call where the system allows."""
    parts: list[bytes] = []
    while most and (part := os.read(handle, min(most, 1 << 30))):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


def _write_new(path: Path, data: bytes, *, flush: bool) -> None:
    """Write, and flush, a file that must not exist yet."""
    with _disk("write", path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
            if flush:
                os.fsync(handle)
        finally:
            os.close(handle)


def _fsync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    with _disk("flush directory", path):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
