"""The files of one teacher's recorded answers: a write-ahead log that is also the answer cache.

    FOLDER/0000000003.wal       frames (record.py), appended; not in the store yet
    FOLDER/0000000002.sealed    the same, and its verified records are in the store

Nothing is flushed to the disk record by record: a power loss costs a question to the teacher, and a
killed process nothing. A frame that is cut off ends its file; a damaged one is not served.
"""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from logitcask.engine.errors import StoreError
from logitcask.engine.tap.record import (
    HEAD_BYTES,
    Head,
    Record,
    decode,
    decode_head,
    encode,
    encode_verified,
    key_of,
)
from logitcask.engine.types import Array

_AT = 40
"""Bits of an offset in a place of the index; the bits above are the number of the file."""


@dataclass
class _File:
    path: Path
    size: int = 0
    """Bytes of complete frames."""
    verified: int = 0
    """Bytes at its beginning that were written by the teacher of this folder for certain."""
    rows: int = 0
    """Positions of its records."""

    @property
    def is_sealed(self) -> bool:
        return self.path.suffix == ".sealed"


class Journal:
    """The records of one teacher, by their ids. Every method may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        """Read the heads of all frames, and cut torn ends off."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._index: dict[bytes, int] = {}
        self._files: dict[int, _File] = {}
        self.damaged = 0
        """Records that were not served because their bytes have changed."""
        self._read_all()
        self._current: int | None = None
        """Number of the file in work; a restart begins another."""

    def __len__(self) -> int:
        return len(self._index)

    @property
    def unsealed_rows(self) -> int:
        """Return the positions that no store holds yet."""
        return sum(file.rows for file in self._files.values() if not file.is_sealed)

    @property
    def is_verified(self) -> bool:
        """Return True if no record came after the last check of the teacher."""
        return all(f.verified == f.size for f in self._files.values() if not f.is_sealed)

    def get(self, ids: Array, k: int) -> Record | None:
        """Return the record of these ids with at least k log-probs a position, None without one."""
        key = key_of(ids)
        with self._lock:
            place = self._index.get(key)
            if place is None:
                return None
            number, at = place >> _AT, place & (1 << _AT) - 1
            descriptor = os.open(self._files[number].path, os.O_RDONLY)
        try:
            head = decode_head(os.pread(descriptor, HEAD_BYTES, at))
            record = None
            if head is not None and head.key == key:
                if head.k < k:
                    return None
                record = decode(head, os.pread(descriptor, head.size - HEAD_BYTES, at + HEAD_BYTES))
        finally:
            os.close(descriptor)
        if record is None:
            with self._lock:
                self.damaged += 1
                if self._index.get(key) == place:
                    del self._index[key]
            return None
        same = len(record.ids) == len(ids) and bool((record.ids == ids).all())
        return record if same else None

    def put(self, record: Record) -> None:
        """Append a record; it replaces one of the same ids. Raises OSError, and keeps nothing."""
        key = key_of(record.ids)
        with self._lock:
            before = self._index.get(key)
            repeated = before is not None and self._files[before >> _AT].is_sealed
            number, file = self._open()
            frame = encode(record, repeated=repeated)
            _append(file, frame)
            self._index[key] = number << _AT | file.size
            file.size += len(frame)
            file.rows += len(record.lp)

    def mark_verified(self) -> None:
        """Mark all records so far as answers of this folder's teacher."""
        with self._lock:
            for file in self._files.values():
                if not file.is_sealed and file.verified < file.size:
                    _append(file, encode_verified())
                    file.size += HEAD_BYTES
                    file.verified = file.size

    def drop_unverified(self) -> int:
        """Remove the records that came after the last check of the teacher; return how many
        sequences have no record now.
        """
        with self._lock:
            before = len(self._index)
            for file in self._files.values():
                if not file.is_sealed and file.verified < file.size:
                    os.truncate(file.path, file.verified)
            # A dropped record may have replaced one that is still there.
            self._read_all()
            return before - len(self._index)

    def close_files(self) -> list[Path]:
        """End the file in work, and return the complete files that no store holds, verified ones
        only.
        """
        with self._lock:
            self._current = None
            return [
                file.path
                for file in self._files.values()
                if not file.is_sealed and file.rows and file.verified == file.size
            ]

    def mark_sealed(self, path: Path) -> None:
        """Rename a file whose records a store holds."""
        with self._lock:
            file = next(each for each in self._files.values() if each.path == path)
            os.replace(path, path.with_suffix(".sealed"))
            file.path = path.with_suffix(".sealed")

    # With the lock held.

    def _open(self) -> tuple[int, _File]:
        if self._current is None:
            number = max(self._files, default=0) + 1
            file = _File(self.folder / f"{number:010}.wal")
            file.path.touch(exist_ok=False)
            self._files[number], self._current = file, number
        return self._current, self._files[self._current]

    def _read_all(self) -> None:
        self._index.clear()
        self._files.clear()
        for path in sorted(p for p in self.folder.iterdir() if p.suffix in (".wal", ".sealed")):
            self._read(path)

    def _read(self, path: Path) -> None:
        if not path.stem.isdigit():
            raise StoreError(f"{path}: no file of a tap", hint="give an --answers folder of a tap")
        number, file = int(path.stem), _File(path)
        for at, head in _heads(path, path.stat().st_size):
            file.size = at + head.size
            if head.kind == "verified":
                file.verified = file.size
            else:
                file.rows += head.tokens - 1
                self._index[head.key] = number << _AT | at
        if not file.is_sealed and path.stat().st_size > file.size:
            os.truncate(path, file.size)
        self._files[number] = file


def _append(file: _File, frame: bytes) -> None:
    """Append a frame completely or not at all."""
    with file.path.open("ab", buffering=0) as out:
        try:
            written = 0
            while written < len(frame):
                written += out.write(frame[written:])
        except OSError:
            os.truncate(file.path, file.size)
            raise


def records(path: Path) -> Iterator[tuple[Head, Record | None]]:
    """Yield the records of a file with their heads; None for a damaged one."""
    with path.open("rb") as file:
        for at, head in _heads(path, path.stat().st_size):
            if head.kind == "record":
                file.seek(at + HEAD_BYTES)
                yield head, decode(head, file.read(head.size - HEAD_BYTES))


def _heads(path: Path, size: int) -> Iterator[tuple[int, Head]]:
    """Yield (offset, head) of each complete frame within the first `size` bytes."""
    at = 0
    with path.open("rb") as file:
        while at < size:
            file.seek(at)
            head = decode_head(file.read(HEAD_BYTES))
            if head is None or at + head.size > size:
                return
            yield at, head
            at += head.size
