"""The log: numbered, hash-chained records, the only source of truth.

At most one writer can create record n. The state of a store is the fold of records 0..n. A refresh
lists one folder and reads only the new records, in bundles where there are many, several at a time.
The heads of all records are read and their chain is verified; a body is read when it is used.
"""

import gc
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.bundles as bundles
import logitcask.engine.store.log.record as record
from logitcask.engine.errors import IntegrityError
from logitcask.engine.store.format.entry import sha256
from logitcask.engine.store.log.body import Bodies
from logitcask.engine.store.log.fold import Fold
from logitcask.engine.store.log.lines import BROKEN
from logitcask.engine.store.log.record import Record
from logitcask.engine.store.log.usual_heads import HeadParser
from logitcask.engine.store.storage.base import Storage, map_concurrently

_MAX_OBJECTS, _MAX_RECORDS = 64, 16384
"""Bundles and records that a refresh reads before it folds them, and records in them."""


class Log(Fold):
    """The records of one store, up to the last refresh."""

    def __init__(self, storage: Storage, genesis: str) -> None:
        super().__init__(storage.url, genesis)
        self._storage = storage
        self._bodies = Bodies(storage, bundles.body_line)
        self._heads = HeadParser(self._bodies)
        self._opened = False
        self.pending: set[str] = set()
        """Pending adds in log/ at the last look."""
        self.unfit: set[str] = set()
        """Those that this process has read and could not publish."""

    def refresh(self) -> None:
        """Read and fold the new records. Raises IntegrityError for a gap or an invalid record."""
        # Bundles may have the first records alone; they are listed once, and not all of log/ is.
        start = len(self) if self._opened else bundles.covered(self._storage)
        # Listed before reading: a record published meanwhile is not mistaken for one beyond a gap.
        second_last = record.file_name(start - 2) if start > 1 else ""
        names = self._storage.names("log", after=second_last)
        numbers = [number for name in names if (number := record.number_of(name)) is not None]
        self.pending = {name for name in names if name.startswith("pending-")}
        self.unfit &= self.pending
        end = max((number + 1 for number in numbers), default=0)
        if end < start:
            # The newest record is in a bundle only, or lost.
            end = max(end, bundles.covered(self._storage) if self._opened else start)
        if end < len(self):
            raise self._missing(max(end, len(self) - 1))
        with _collector_off(end - len(self) > bundles.LEVELS[0]):
            while len(self) < end:
                self._catch_up(end)
        self._opened = True

    def _catch_up(self, end: int) -> None:
        """Read some of the records before `end`, several at a time, and fold them."""
        start = len(self)
        todo = list(islice(bundles.pieces(start, end), _MAX_OBJECTS))
        todo = [each for each in todo if each[1] == start or sum(each) <= start + _MAX_RECORDS]
        names = [f"log/{record.file_name(first)}" for level, first in todo if level == 1]
        single = self._storage.read_all(dict.fromkeys(names, schema.MAX_RECORD_BYTES))
        large = [(self._storage, *piece) for piece in todo if piece[0] > 1]
        heads = iter(map_concurrently(bundles.read_heads, large))
        for level, first in todo:
            if level == 1:
                self._fold_single(first, single[f"log/{record.file_name(first)}"])
            elif not self._fold_heads(next(heads)):
                self._fold_below(level, first)

    def _fold_single(self, number: int, data: bytes | None) -> None:
        where = self.where(number)
        if data is None:
            lines = bundles.read_record(self._storage, number)
            if lines is None:
                raise self._missing(number)
            data = record.join(*lines)
        new = record.parse(data, where, number=number, prev=self.prev(), bodies=self._bodies)
        self.fold(new)

    def _fold_heads(self, found: bundles.Heads | None) -> bool:
        """Fold the records of a bundle; return False where there is no valid one."""
        if found is None:
            return False
        where, prev, start = self._storage.where(found.name), self.prev(), found.start
        records: list[Record] = []
        try:
            for number, line in enumerate(found.lines, found.first):
                if number < len(self):
                    start += json.loads(line)["body"][0] + 1
                    continue
                new = self._heads.parse(line, where, number=number, prev=prev, name=found.name)
                new.body.start = start
                start, prev = start + new.body.size + 1, new.sha256
                records.append(new)
        except (IntegrityError, ValueError, KeyError, TypeError):
            # Other files may have these records; `verify` reports the damage.
            return False
        for each in records:
            self.fold(each)
        return True

    def _fold_below(self, level: int, first: int) -> None:
        """Fold the records of a damaged or absent bundle from those of the level below."""
        for less, number in bundles.below(level, first):
            if number + less <= len(self):
                continue
            if less == 1:
                name = f"log/{record.file_name(number)}"
                self._fold_single(number, self._storage.read(name, schema.MAX_RECORD_BYTES))
            elif not self._fold_heads(bundles.read_heads(self._storage, less, number)):
                self._fold_below(less, number)

    def append(self, data: bytes) -> None:
        """Fold the next record, which this process has created."""
        self._fold_single(len(self), data)

    def parse_next(self, data: bytes) -> Record:
        """Decode and check a whole record that would be the next. Raises IntegrityError."""
        number, bodies = len(self), Bodies(self._storage, bundles.body_line)
        where = self.where(number)
        new = record.parse(data, where, number=number, prev=self.prev(), bodies=bodies)
        for each in new.adds:
            new.body.of(each)
        return new

    def write_bundles(self, number: int) -> None:
        """Write the bundles that end with a record that this process has published."""
        bundles.write(self._storage, number + 1)
        self._remove_bundled(number + 1)

    def _remove_bundled(self, end: int) -> None:
        """Remove the records of the last bundle but one from log/; that bundle must be sound.

        A slow reader finds them in the bundle, and a slow writer that creates one of them again
        sees the bundle (`publish`).
        """
        count = bundles.LEVELS[0]
        first = end - 2 * count
        if end % count or first < 0:
            return
        try:
            data = self._storage.read(bundles.name_of(count, first), schema.MAX_BUNDLE_BYTES)
        except IntegrityError:
            return  # `verify` reports it, and the records stay
        lines = bundles.split(data or b"", count, first)
        if lines is not None and self.has(first, zip(*lines, strict=True)):
            for each in range(first, first + count):
                self._storage.remove(f"log/{record.file_name(each)}")

    def read_record(self, number: int) -> bytes:
        """Return the bytes of a record's file, also where only a bundle has it."""
        for read in (bundles.read_record, bundles.from_bundles):
            lines = read(self._storage, number)
            if lines is not None and sha256(lines[0]) == self.sha256(number):
                return record.join(*lines)
        raise self._missing(number)

    def has(self, first: int, lines: Iterable[tuple[bytes, bytes]]) -> bool:
        """Return whether (head, body) are those of the records from `first` on."""
        for number, (head, body) in enumerate(lines, first):
            if sha256(head) != self.sha256(number):
                return False
            if [len(body), sha256(body)] != json.loads(head)["body"]:
                return False
        return True

    def _missing(self, number: int) -> IntegrityError:
        if bundles.holds(self._storage, number):
            name = bundles.name_of(bundles.LEVELS[0], number - number % bundles.LEVELS[0])
            where = self._storage.where(name)
            return IntegrityError(
                f"{where}: damaged, and no other file has log record {number}", hint=BROKEN
            )
        return IntegrityError(
            f"{self.where(number)}: this published log record is missing", hint=BROKEN
        )


@contextmanager
def _collector_off(off: bool) -> Iterator[None]:
    """Pause the garbage collector, which searches a growing log in vain again and again."""
    off = off and gc.isenabled()
    if off:
        gc.disable()
    try:
        yield
    finally:
        if off:
            gc.enable()
