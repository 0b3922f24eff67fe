"""The log: numbered, hash-chained records, the only source of truth, and their fold.

Record n is published by link() to its number, which at most one writer can win. A store's state is
the fold of records 0..n; the first commit of a unit_key wins. What was read once is kept, so a
refresh reads the records that are new and lists one directory.
"""

from dataclasses import dataclass
from pathlib import Path

import logitcask.engine.store.files as files
import logitcask.engine.store.record as record
import logitcask.engine.store.schema as schema
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.segment import Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """A store as of one log record: it reads the same whatever is added later."""

    number: int
    """-1 = before the first record."""
    sha256: str
    """Of that record."""
    segments: tuple[Segment, ...]
    """In log order."""

    def rollouts(self, name: str) -> tuple[Segment, ...]:
        """The rollout segments of a name, by student version, then by first prompt."""
        found = [s for s in self.segments if s.kind == schema.ROLLOUT and s.name == name]
        return tuple(sorted(found, key=lambda s: (s.unit["version"], s.unit["first"])))

    def names(self, kind: str) -> list[str]:
        """The names in use: of rollouts ('rollout') or of teachers ('score')."""
        return sorted({s.name for s in self.segments if s.kind == kind})

    def scores(self, teacher: str) -> dict[str, Segment]:
        """seg_id of the rollouts -> the teacher's score segment."""
        found: dict[str, Segment] = {}
        for segment in self.segments:
            if segment.kind == schema.SCORE and segment.name == teacher:
                found.setdefault(segment.base, segment)
        return found

    def unit_keys(self) -> set[str]:
        return {s.unit_key for s in self.segments}


class Log:
    """The records of one store, read as far as they have been asked for."""

    def __init__(self, root: Path, genesis: str) -> None:
        self._root = root
        self._sums = [genesis]
        """sha256 of format.json, then of each record: entry n is the `prev` of record n."""
        self._segments: list[Segment] = []
        self._ends = [0]
        """Entry n: how many segments records 0..n-1 hold."""
        self._by_key: dict[str, Segment] = {}
        self._bases: dict[str, Segment] = {}
        self._names: dict[tuple[str, str], Segment] = {}

    def __len__(self) -> int:
        return len(self._sums) - 1

    def _path(self, number: int) -> Path:
        return self._root / "log" / record.file_name(number)

    def refresh(self) -> None:
        """Folds the records published since. Raises IntegrityError: a gap, a bad record."""
        # Listed before reading: a record published meanwhile is not mistaken for one beyond a gap.
        names = files.list_dir(self._root / "log")
        numbers = [number for name in names if (number := record.number_of(name)) is not None]
        last = max(numbers, default=-1)
        if last + 1 < len(self):
            raise self._gone(last + 1)
        while True:
            number = len(self)
            data = files.read(
                self._root, f"log/{record.file_name(number)}", schema.MAX_RECORD_BYTES
            )
            if data is None:
                # A listing may miss a name that is being added, but opening it cannot.
                if number <= last:
                    raise self._gone(number)
                return
            self._fold(record.parse(data, self._path(number), number=number, prev=self._sums[-1]))

    def _gone(self, number: int) -> IntegrityError:
        return IntegrityError(
            f"{self._path(number)}: this log record was published, and is missing",
            remedy=record.BROKEN,
        )

    def _fold(self, new: record.Record) -> None:
        keys: dict[str, Segment] = {}
        bases: dict[str, Segment] = {}
        for segment in new.segments:
            if segment.kind == schema.SCORE:
                base = self._bases.get(segment.base) or bases.get(segment.base)
                if base is None or base.token_digest != segment.token_digest:
                    raise IntegrityError(
                        f"{self._path(new.number)}: scores of rollouts {segment.base}, which the "
                        "log does not hold with these tokens",
                        remedy=record.BROKEN,
                    )
            if segment.unit_key not in self._by_key:
                keys.setdefault(segment.unit_key, segment)
                if segment.kind == schema.ROLLOUT:
                    bases.setdefault(segment.seg_id, segment)
        self._by_key |= keys
        for seg_id, segment in bases.items():
            self._bases.setdefault(seg_id, segment)
        for segment in keys.values():
            self._names.setdefault((segment.kind, segment.name), segment)
        self._segments += keys.values()
        self._sums.append(new.sha256)
        self._ends.append(len(self._segments))

    def winner(self, unit_key: str) -> Segment | None:
        """The segment that holds a unit, as far as the log has been read."""
        return self._by_key.get(unit_key)

    def base(self, seg_id: str) -> Segment | None:
        """A rollout segment by its id, as far as the log has been read."""
        return self._bases.get(seg_id)

    def first(self, kind: str, name: str) -> Segment | None:
        """The segment that bound a name, as far as the log has been read."""
        return self._names.get((kind, name))

    def prev(self) -> str:
        """sha256 that the next record has to follow."""
        return self._sums[-1]

    def pin(self, number: int) -> Pin:
        """The fold of records 0..number. Raises StoreError where there are fewer."""
        if not -1 <= number < len(self):
            raise StoreError(
                f"{self._root} has no log record {number}: its last is {len(self) - 1}",
                remedy="open the store that the pin was taken from, or pin a number that exists",
            )
        segments = tuple(self._segments[: self._ends[number + 1]])
        return Pin(number=number, sha256=self._sums[number + 1], segments=segments)
