"""The encoding and the validation of a log record.

A record is three lines: its head, its body, and the sha256 of the head. The head has all that the
fold of the log needs, the digest of the record before it, and the size and the sha256 of the body.
Everything in it is checked before use: identifiers match their patterns, counts and sizes are
bounded, and every name follows from them, so a record cannot name other paths. A body is checked
when it is used.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.schema as schema
from logitcask.engine.errors import ConfigError, IntegrityError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.format.entry import (
    Segment,
    SegmentBody,
    content_address,
    sha256,
)
from logitcask.engine.store.format.segment import decoded_bytes, dtype_of, object_limit
from logitcask.engine.store.log.body import (
    Bodies,
    RecordBody,
    checked,
    encode_body,
    provenance_sha256,
)
from logitcask.engine.store.log.lines import (
    BROKEN,
    decode_line,
    is_count,
    matching,
    require,
    trailer,
    validated,
)

Content = tuple[str, str, int]
"""(kind, seg_id, generation): one object of a segment."""


@dataclass(slots=True)
class Record:
    """A record of the log with a valid head."""

    number: int
    sha256: str
    """Of its head; the next record's `prev`."""
    time: str
    """UTC, ISO 8601, by the writer's clock."""
    adds: tuple[Segment, ...]
    deletes: tuple[str, ...]
    """unit_keys that this record makes invisible."""
    removes: tuple[Content, ...]
    """Objects that gc removes after this record."""
    tags: Mapping[str, int | None]
    """Tag -> snapshot id, None where the tag is removed."""
    body: RecordBody


def file_name(number: int) -> str:
    return f"{number:010d}.json"


def number_of(name: str) -> int | None:
    """Return the number of a file name in log/, None for any other name."""
    return int(name[:10]) if re.fullmatch(r"[0-9]{10}\.json", name) else None


def encode_record(head: Mapping[str, Any], body: Mapping[str, Any]) -> bytes:
    """Encode a record; its head gets the size and the sha256 of the body."""
    below = canonical(body)
    line = canonical({**head, "body": [len(below), sha256(below)]})
    return join(line, below)


def join(head: bytes, body: bytes) -> bytes:
    """Return the file of a record with these lines."""
    return head + b"\n" + body + b"\n" + trailer(sha256(head))


def split(data: bytes, where: str) -> tuple[bytes, bytes]:
    """Return the head and the body of a record. Raises IntegrityError for a damaged head."""
    head, _, rest = data.partition(b"\n")
    body, _, end = rest.partition(b"\n")
    if end != trailer(sha256(head)):
        raise IntegrityError(f"{where}: does not match its own sha256", hint=BROKEN)
    return head, body


def encode_segment(segment: Segment) -> dict[str, Any]:
    """Return the whole entry of a segment: the fields of its head as `add`, and its body."""
    return {"add": encode_add(segment), **encode_body(segment)}


def decode_segment(entry: Mapping[str, Any], where: str) -> Segment:
    """Decode and check the whole entry of a segment. Raises IntegrityError naming the file."""

    def segment() -> Segment:
        head = _segment(entry["add"], -1, 0, SegmentBody(unit={}, provenance={}))
        return replace(head, source=checked(entry, head))

    return validated(segment, f"{where}: not a valid segment")


def encode_add(segment: Segment) -> list[Any]:
    """Return the fields of a segment in the head of a record."""
    fields = [getattr(segment, name) for name in ADD[:-1]]
    return [*fields, provenance_sha256(segment.provenance)]


ADD = (
    *("kind", "generation", "unit_key", "name", "base", "extends", "tokens_sha256", "layout"),
    *("profile", "counts", "size", "sha256", "version", "first", "provenance_sha256"),
)
"""Fields of an add, in their order in the head of a record."""


def parse(data: bytes, where: str, *, number: int, prev: str, bodies: Bodies) -> Record:
    """Decode a record and check its head. Raises IntegrityError naming the file."""
    head, body = split(data, where)
    found = parse_head(head, where, number=number, prev=prev, bodies=bodies)
    found.body.line = body
    return found


def parse_head(
    line: bytes, where: str, *, number: int, prev: str, bodies: Bodies, name: str = ""
) -> Record:
    """Decode and check the head of a record. Raises IntegrityError naming the file.

    name: the bundle that has it; else a file of its own.
    """
    head = decode_line(line, where)
    if head.get("n") != number:
        raise IntegrityError(f"{where}: has the number {head.get('n')!r}", hint=BROKEN)
    if head.get("prev") != prev:
        raise IntegrityError(
            f"{where}: follows {head.get('prev')!r}, but the record before it is {prev!r}",
            hint=BROKEN,
        )

    def record() -> Record:
        size, digest = head["body"]
        require(is_count(size) and size <= schema.MAX_RECORD_BYTES, f"a body of {size!r} bytes")
        adds, time = head["adds"], head["time"]
        require(type(time) is str, "time is not text")
        where_read, digest = name or f"log/{file_name(number)}", matching(schema.DIGEST, digest)
        body = RecordBody(bodies, number, where_read, size, digest, len(adds))
        return Record(
            number=number,
            sha256=sha256(line),
            time=time,
            adds=tuple([_segment(add, number, i, body) for i, add in enumerate(adds)]),
            deletes=tuple([matching(schema.DIGEST, key) for key in head["deletes"]]),
            removes=tuple([_content(*content) for content in head["removes"]]),
            tags=_tags(head["tags"], number),
            body=body,
        )

    return validated(record, f"{where}: not a valid record")


def _content(kind: Any, seg_id: Any, generation: Any) -> Content:
    require(kind in schema.KINDS, f"kind {kind!r}")
    require(is_count(generation), f"generation {generation!r}")
    return kind, matching(schema.SEG_ID, seg_id), generation


def _tags(tags: Mapping[Any, Any], number: int) -> dict[str, int | None]:
    for name, marked in tags.items():
        matching(schema.NAME, name)
        require(marked is None or (is_count(marked) and marked < number), f"tag {name} of {marked}")
    return dict(tags)


_DIGESTS = ("unit_key", "tokens_sha256", "sha256", "provenance_sha256")


def _segment(add: Sequence[Any], number: int, index: int, source: Any) -> Segment:
    """Check an add of a head. Raises ValueError, KeyError, TypeError or AttributeError."""
    kind, generation, unit_key, name, base, extends, tokens, layout, profile = add[:9]
    counts, size, digest, version, first, provenance = add[9:]
    require(kind in schema.KINDS, f"kind {kind!r}")
    require(layout in schema.LAYOUTS[kind], f"layout {layout!r} of a {kind} segment")
    require(type(generation) is int and generation >= 0, f"generation {generation!r}")
    require(bool(schema.NAME.fullmatch(name)), f"name {name!r}")
    for key, text in zip(_DIGESTS, (unit_key, tokens, digest, provenance), strict=True):
        require(bool(schema.DIGEST.fullmatch(text)), f"{key} {text!r}")
    follows = layout == schema.EXTENSION or (layout.endswith(schema.PARTIAL) and extends != "")
    for key, named, text in (("base", kind == schema.SCORE, base), ("extends", follows, extends)):
        require(bool(schema.SEG_ID.fullmatch(text)) if named else text == "", f"{key} {text!r}")
    limit = _check_counts(counts, layout, profile)
    require(type(size) is int and 0 <= size <= limit, f"{size!r} bytes of an object")
    is_place = is_count(version) and is_count(first)
    require(is_place, f"version {version!r}, first {first!r}")
    require(kind == schema.ROLLOUT or version == first == 0, "scores have no version or first")
    return Segment(
        kind=kind,
        seg_id=content_address(digest),
        generation=generation,
        unit_key=unit_key,
        name=name,
        base=base,
        extends=extends,
        tokens_sha256=tokens,
        layout=layout,
        profile=profile,
        counts=counts,
        size=size,
        sha256=digest,
        version=version,
        first=first,
        provenance_sha256=provenance,
        number=number,
        index=index,
        source=source,
    )


@cache
def bounds(layout: str, profile_name: str) -> tuple[dict[str, int], int]:
    """Return (count -> bytes of its arrays for each one, bytes that rounding adds at most)."""
    profile = codecs.profile(profile_name)
    each, rounding = dict.fromkeys(schema.COUNTS[layout], 0), 0
    for spec in schema.specs(layout).values():
        item = np.dtype(dtype_of(spec, profile)).itemsize
        each[spec.count] += item
        rounding += item * (spec.chunk + spec.plus)
    return each, rounding


def _check_counts(counts: Any, layout: str, profile_name: Any) -> int:
    """Check the counts of a segment; return the most bytes that its object may have."""
    try:
        each, rounding = bounds(layout, profile_name)
    except ConfigError as error:
        raise ValueError(error.cause) from error
    require(type(counts) is dict and counts.keys() == each.keys(), f"counts {sorted(counts)}")
    decoded = 0
    for key, value in counts.items():
        require(is_count(value) and value <= schema.MAX_COUNT[key], f"{key} {value!r}")
        decoded += value * each[key]
    for key, others, most in schema.relations(layout):
        limit = most * sum(counts[other] for other in others)
        require(counts[key] <= limit, f"{key} {counts[key]}, at most {limit}")
    if decoded + rounding > schema.MAX_SEGMENT_BYTES:
        # Close to the limit or beyond: count exactly.
        size = decoded_bytes(layout, codecs.profile(profile_name), counts)
        require(size <= schema.MAX_SEGMENT_BYTES, f"{size} bytes decoded")
        return object_limit(layout, size)
    return object_limit(layout, decoded + rounding)
