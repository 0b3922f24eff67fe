"""Bundles: the records of 16, 256, 4096 or 65536 numbers in one file, so that a log opens fast.

  bundles/<level>/<first number>.jsonl

The first line has the count of records, the number of the first, the bytes of all heads and the
sha256 of the last head. Then come the heads, then the bodies, a line each. A bundle is checked like
the records, the writer of the last of its records makes it from those of the level below, and a
damaged one is replaced by these when it is read.

The files of records do not stay: once a bundle of the lowest level is written, the records of the
one before it are removed from log/, which so has 31 files at most.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.record as record
from logitcask.engine.errors import IntegrityError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.format.entry import sha256
from logitcask.engine.store.log.lines import BROKEN
from logitcask.engine.store.storage.base import Storage

LEVELS = (16, 256, 4096, 65536)
"""Records of a bundle, ascending; each level divides the next."""
_MAX_FIRST_LINE = 512
_HEAD = 704
"""Bytes of a usual head, to read the heads of a bundle in one request."""
_NAME = re.compile(r"bundles/([1-9][0-9]{1,4})/([0-9]{10})\.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """The heads of a bundle; the digest of the last one matches."""

    name: str
    first: int
    lines: list[bytes]
    start: int
    """Offset of the first body."""


def name_of(level: int, first: int) -> str:
    return f"bundles/{level}/{first:010d}.jsonl"


def parts_of(name: str) -> tuple[int, int] | None:
    """Return (level, first number) of the name of a bundle, None for any other name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    level, first = int(found[1]), int(found[2])
    return (level, first) if level in LEVELS and first % level == 0 else None


def covered(storage: Storage) -> int:
    """Return the number after the last record that a bundle has; 0 without bundles.

    Lists the names after those of the level above only.
    """
    end = 0
    for level in reversed(LEVELS):
        after = f"{end - 1:010d}.jsonl" if end else ""
        for name in storage.names(f"bundles/{level}", after=after):
            if parts_of(f"bundles/{level}/{name}"):
                end = max(end, int(name[:10]) + level)
    return end


def is_old(number: int, end: int) -> bool:
    """Return whether a record of a log of `end` records may be in bundles alone."""
    return number - number % LEVELS[0] + 2 * LEVELS[0] <= end


def pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (level, first) of the largest bundles that hold records start..end-1; level 1 = one.

    The first one may begin before `start`, where its records may be in bundles alone.
    """
    if start < end and is_old(start, end) and start % LEVELS[0]:
        yield LEVELS[0], start - start % LEVELS[0]
        start += LEVELS[0] - start % LEVELS[0]
    while start < end:
        fits = [level for level in LEVELS if start % level == 0 and start + level <= end]
        level = fits[-1] if fits else 1
        yield level, start
        start += level


def below(level: int, first: int) -> list[tuple[int, int]]:
    """Return the pieces of the level below that make a bundle."""
    less = (1, *LEVELS)[LEVELS.index(level)]
    return [(less, number) for number in range(first, first + level, less)]


def read_heads(storage: Storage, level: int, first: int) -> Heads | None:
    """Read the heads of a bundle; return None where there is no valid one."""
    name = name_of(level, first)
    data = storage.read_part(name, 0, _MAX_FIRST_LINE + level * _HEAD) or b""
    line = data[:_MAX_FIRST_LINE].partition(b"\n")[0]
    try:
        found = json.loads(line)
        size, last = found["heads"], found["last"]
        same = canonical({"count": level, "first": first, "heads": size, "last": last}) == line
        if not same or type(size) is not int or not 0 < size <= schema.MAX_HEADS_BYTES:
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        # Only a copy of the records in log/; `verify` reports it.
        return None
    start = len(line) + 1 + size
    if len(data) < start:
        data += storage.read_part(name, len(data), start - len(data)) or b""
    lines = data[len(line) + 1 : start].split(b"\n")
    if len(lines) != level + 1 or lines.pop() or sha256(lines[-1]) != last:
        return None
    return Heads(name=name, first=first, lines=lines, start=start)


def encode(first: int, heads: list[bytes], bodies: list[bytes]) -> bytes:
    """Return the bytes of the bundle of these lines."""
    size = sum(map(len, heads)) + len(heads)
    line = canonical(
        {"count": len(heads), "first": first, "heads": size, "last": sha256(heads[-1])}
    )
    return b"\n".join([line, *heads, *bodies, b""])


def split(data: bytes, level: int, first: int) -> tuple[list[bytes], list[bytes]] | None:
    """Return the heads and the bodies of a whole bundle; None for other bytes than `encode`'s."""
    lines = data.split(b"\n")[1:-1]
    heads, bodies = lines[:level], lines[level:]
    if len(bodies) != level or encode(first, heads, bodies) != data:
        return None
    try:
        named = [json.loads(head)["body"] for head in heads]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (heads, bodies) if named == [[len(b), sha256(b)] for b in bodies] else None


def read_record(storage: Storage, number: int) -> tuple[bytes, bytes] | None:
    """Read the head and the body of a record from log/, or else from a bundle; None = in neither.

    Raises IntegrityError where the record in log/ is damaged.
    """
    name = f"log/{record.file_name(number)}"
    data = storage.read(name, schema.MAX_RECORD_BYTES)
    if data is not None:
        return record.split(data, storage.where(name))
    return from_bundles(storage, number)


def from_bundles(storage: Storage, number: int) -> tuple[bytes, bytes] | None:
    """Read the head and the body of a record from the first bundle that has them undamaged."""
    for level in LEVELS:
        found = read_heads(storage, level, number - number % level)
        if found is None or not _is_chain(found):
            continue
        place = number - found.first
        start, size = list(body_places(found))[place]
        line = storage.read_part(found.name, start, size)
        if line is not None and json.loads(found.lines[place])["body"] == [size, sha256(line)]:
            return found.lines[place], line
    return None


def _is_chain(heads: Heads) -> bool:
    """Return whether each head of a bundle has the sha256 of the one before it."""
    try:
        prevs = [json.loads(line)["prev"] for line in heads.lines[1:]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return prevs == [sha256(line) for line in heads.lines[:-1]]


def holds(storage: Storage, number: int) -> bool:
    """Return whether there is a bundle of the lowest level for a record."""
    first = number - number % LEVELS[0]
    return storage.read_part(name_of(LEVELS[0], first), 0, 1) is not None


def body_places(heads: Heads) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of each body of a bundle, as its heads have them."""
    start = heads.start
    for line in heads.lines:
        size = json.loads(line)["body"][0]
        yield start, size
        start += size + 1


def body_line(storage: Storage, number: int) -> bytes | None:
    """Read the body of a record from log/, or else from a bundle; None = in neither."""
    found = read_record(storage, number)
    return None if found is None else found[1]


def read_lines(storage: Storage, level: int, first: int) -> tuple[list[bytes], list[bytes]]:
    """Read the heads and the bodies of records: from their bundle, or else from those below it.

    Raises IntegrityError where a record is missing or damaged.
    """
    if level > 1:
        try:
            data = storage.read(name_of(level, first), schema.MAX_BUNDLE_BYTES)
        except IntegrityError:
            data = None
        if data is not None and (found := split(data, level, first)) is not None:
            return found
        parts = [read_lines(storage, *piece) for piece in below(level, first)]
        return [line for heads, _ in parts for line in heads], [
            line for _, bodies in parts for line in bodies
        ]
    lines = read_record(storage, first)
    if lines is None:
        where = storage.where(f"log/{record.file_name(first)}")
        raise IntegrityError(f"{where}: this published log record is missing", hint=BROKEN)
    return [lines[0]], [lines[1]]


def build(heads: list[bytes], bodies: list[bytes], first: int) -> bytes | None:
    """Return the bytes of the bundle of these lines; None where it would be too large."""
    if sum(map(len, heads)) + len(heads) > schema.MAX_HEADS_BYTES:
        return None
    data = encode(first, heads, bodies)
    return data if len(data) <= schema.MAX_BUNDLE_BYTES else None


def write(storage: Storage, end: int) -> None:
    """Write the bundles whose last record is the one before `end`, from the smallest on."""
    for level in LEVELS:
        if end % level:
            return
        data = build(*read_lines(storage, level, end - level), end - level)
        if data is None:
            return
        storage.create(name_of(level, end - level), data)
