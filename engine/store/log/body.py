"""The body of a log record: the work unit, the provenance and the entries of each added segment.

It is one line of canonical JSON, whose size and sha256 are in the record's head. A log of tens of
thousands of records opens without its bodies: each is read, and checked, when it is first used.
Bodies lie one after the other in a bundle, so a part of a bundle is read at once.
"""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

import logitcask.engine.store.format.schema as schema
from logitcask.engine.errors import IntegrityError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.format.entry import Entry, Segment, SegmentBody, sha256
from logitcask.engine.store.format.provenance import provenance_of
from logitcask.engine.store.log.lines import (
    BROKEN,
    decode_line,
    is_count,
    matching,
    require,
    validated,
)
from logitcask.engine.store.storage.base import Storage, open_storage

K = TypeVar("K")
T = TypeVar("T")

AHEAD = 1 << 20
"""Bytes of a bundle that are read at once."""
_MAX_PARTS, _MAX_BODIES, _MAX_TEXTS, _MAX_PROVENANCE = 8, 4096, 16, 1024
"""Parts of bundles, checked bodies, and different provenance (as text, and decoded) in memory."""
_PROVENANCE = b',"provenance":'
NONE_KNOWN: Mapping[str, Any] = {}


class Bodies:
    """The bodies of a log, as far as they were used lately. Pickling it keeps its URL only."""

    def __init__(self, storage: Storage, read_line: Callable[[Storage, int], bytes | None]) -> None:
        """read_line(storage, number) returns the body of a record from a file of its own."""
        self._storage, self._read_line = storage, read_line
        self._parts: dict[tuple[str, int], bytes] = {}
        """(bundle, offset) -> the bytes from there on."""
        self._texts: dict[bytes, Any] = {}
        """JSON text of provenance -> its value, of the last ones."""
        self._provenance: dict[str, Mapping[str, Any]] = {}
        """Its digest -> provenance that a head and a body agree on."""
        self._checked: dict[tuple[int, int], SegmentBody] = {}
        """(record, place among its adds) -> the body of the segment."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _bodies_at, (self._storage.url, self._read_line)

    def of(self, segment: Segment, record: "RecordBody") -> SegmentBody:
        """Return the body of a segment. Raises IntegrityError."""
        key = (record.number, segment.index)
        found = self._checked.get(key)
        if found is None:
            add = self._adds(record)[segment.index]
            found = _check_body(add, segment, self._provenance)
            _keep(self._checked, key, found, _MAX_BODIES)
            _keep(self._provenance, segment.provenance_sha256, add["provenance"], _MAX_PROVENANCE)
        return found

    def provenance(self, segment: Segment, record: "RecordBody") -> Mapping[str, Any]:
        """Return the provenance of a segment; reads a body for each different one only."""
        found = self._provenance.get(segment.provenance_sha256)
        if found is None:
            return self.of(segment, record).provenance
        return provenance_of(found, f"{segment.what}: provenance")

    def line(self, record: "RecordBody") -> bytes:
        """Return the body line of a record, compared with its sha256. Raises IntegrityError."""
        found = record.line or self._from_bundle(record)
        if found is None or sha256(found) != record.sha256:
            # A bundle is a copy; the record itself may be sound.
            found = self._read_line(self._storage, record.number)
        if found is None or sha256(found) != record.sha256:
            where = self._storage.where(record.name)
            raise IntegrityError(
                f"{where}: the body of record {record.number} is missing, or not the one of its "
                "head",
                hint=BROKEN,
            )
        return found

    def _adds(self, record: "RecordBody") -> list[Any]:
        where = f"{self._storage.url}/{record.name}: the body of record {record.number}"
        content = self._decode(self.line(record), where)

        def adds() -> list[Any]:
            found = content["adds"]
            require(isinstance(content["commit_id"], str), "commit_id is not text")
            require(isinstance(found, list) and len(found) == record.count, "another count of adds")
            return list(found)

        return validated(adds, where)

    def _decode(self, line: bytes, where: str) -> dict[str, Any]:
        """Decode a body line; each provenance, equal in most records, is decoded once."""
        before, *behind = line.split(_PROVENANCE)
        texts = [next(filter(part.startswith, self._texts), b"") for part in behind]
        if texts and all(texts):
            # A whole value behind the key is the value of the key, if the key is that of an add.
            short = [b"null" + part[len(text) :] for part, text in zip(behind, texts, strict=True)]
            content = decode_line(_PROVENANCE.join([before, *short]), where)
            adds: Any = content.get("adds")
            is_list = type(adds) is list and len(adds) == len(texts)
            if is_list and all(map(_lacks_provenance, adds)):
                for each, text in zip(adds, texts, strict=True):
                    each["provenance"] = self._texts[text]
                return content
        elif len(behind) == 1:
            with suppress(ValueError, RecursionError):
                found, end = json.JSONDecoder().raw_decode(behind[0].decode("ascii"))
                _keep(self._texts, behind[0][:end], found, _MAX_TEXTS)
        return decode_line(line, where)

    def _from_bundle(self, record: "RecordBody") -> bytes | None:
        """Return the bytes at the place of a body; fewer, or None, where the bundle is damaged."""
        if not record.start:
            return None
        end = record.start + record.size
        for (name, start), data in self._parts.items():
            if name == record.name and start <= record.start and end <= start + len(data):
                return data[record.start - start : end - start]
        part = self._storage.read_part(record.name, record.start, max(record.size, AHEAD))
        if part is None:
            return None
        _keep(self._parts, (record.name, record.start), part, _MAX_PARTS)
        return part[: record.size]


def _bodies_at(url: str, read_line: Callable[[Storage, int], bytes | None]) -> Bodies:
    return Bodies(open_storage(url), read_line)


class RecordBody:
    """The place of the body of one record."""

    __slots__ = ("bodies", "count", "line", "name", "number", "sha256", "size", "start")

    def __init__(
        self, bodies: Bodies, number: int, name: str, size: int, digest: str, count: int
    ) -> None:
        """Place the body of a record with `count` adds; name: the file that has it.

        start: its offset in a bundle, 0 in a file of its own. line: its bytes, if they are read.
        """
        self.bodies, self.number, self.name, self.size = bodies, number, name, size
        self.sha256, self.count, self.start, self.line = digest, count, 0, b""

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.bodies, self.number, self.name, self.size, self.sha256, self.count)
        return RecordBody, fields, (None, {"start": self.start})

    def of(self, segment: Segment) -> SegmentBody:
        """Return the body of a segment of this record. Raises IntegrityError."""
        return self.bodies.of(segment, self)

    def provenance(self, segment: Segment) -> Mapping[str, Any]:
        """Return the provenance of a segment of this record. Raises IntegrityError."""
        return self.bodies.provenance(segment, self)


def _keep(cache: dict[K, T], key: K, value: T, most: int) -> None:
    """Put a value into a cache; the oldest one leaves it where there are more than `most`."""
    cache[key] = value
    if len(cache) > most:
        del cache[next(iter(cache))]


def _lacks_provenance(add: Any) -> bool:
    return type(add) is dict and add.get("provenance", 0) is None


def encode_body(segment: Segment) -> dict[str, Any]:
    """Return the body of a segment in the body of a record."""
    body = segment.body
    fields = {"unit": body.unit, "provenance": body.provenance, "entries": body.entries}
    return fields | ({} if body.seconds is None else {"seconds": body.seconds})


def _check_body(add: Any, segment: Segment, known: Mapping[str, Any]) -> SegmentBody:
    """Check the body of a segment against its head. Raises IntegrityError."""
    return validated(lambda: checked(add, segment, known), f"{segment.what}: not a valid body")


def provenance_sha256(provenance: Mapping[str, Any]) -> str:
    """Return the digest of a provenance that heads have."""
    return sha256(canonical(provenance))


def checked(
    add: Mapping[str, Any], segment: Segment, known: Mapping[str, Any] = NONE_KNOWN
) -> SegmentBody:
    """Check the body of a segment; known: digest -> provenance that needs no check.

    Raises ValueError, KeyError, TypeError or AttributeError.
    """
    unit, provenance, seconds = add["unit"], add["provenance"], add.get("seconds")
    if seconds is not None:
        is_number = type(seconds) in (int, float) and 0 <= seconds < math.inf
        require(is_number, f"seconds {seconds!r}")
    require(
        isinstance(unit, dict) and isinstance(provenance, dict),
        "unit or provenance is not an object",
    )
    if known.get(segment.provenance_sha256) is not provenance:
        same = provenance_sha256(provenance) == segment.provenance_sha256
        require(same, "another provenance than that of the head")
    if segment.kind == schema.ROLLOUT:
        is_unit = is_count(unit["version"]) and is_count(unit["first"])
        require(is_unit, "unit lacks version or first")
        same = (unit["version"], unit["first"]) == (segment.version, segment.first)
        require(same, "another version or first than in the head")
    return SegmentBody(
        unit=unit,
        provenance=provenance_of(provenance, f"{segment.what}: provenance"),
        entries=_entries(add["entries"], segment),
        seconds=seconds,
    )


def _entries(listed: Mapping[str, Any], segment: Segment) -> dict[str, Entry]:
    """Check that the entries are those of the schema and lie in the object."""
    counts, size = segment.counts, segment.size
    names = [name for name, count, plus in _alone(segment.layout) if counts[count] + plus]
    require(len(listed) == len(names), f"entries {sorted(set(listed) ^ set(names))[:3]}")
    entries = {}
    for name in names:
        start, length, digest = listed[name]
        if not (type(start) is type(length) is int and start >= 0 and 0 <= length <= size - start):
            raise ValueError(f"bytes {start!r} and {length!r} more of {name}")
        entries[name] = (start, length, matching(schema.DIGEST, digest))
    return entries


@cache
def _alone(layout: str) -> list[tuple[str, str, int]]:
    """Return (array, count, plus) of the arrays that are read alone."""
    specs = schema.specs(layout)
    return [(name, specs[name].count, specs[name].plus) for name in schema.read_alone(layout)]
