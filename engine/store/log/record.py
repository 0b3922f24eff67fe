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
from operator import gt, mul
from typing import Any

import numpy as np

import logitcask.engine.store.format.archive as archive
import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.schema as schema
from logitcask.engine.errors import ConfigError, IntegrityError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.format.entry import (
    Segment,
    SegmentBody,
    content_address,
    new_segment,
    sha256,
)
from logitcask.engine.store.format.segment import decoded_bytes, dtype_of, object_limit
from logitcask.engine.store.log.body import Bodies, RecordBody, checked, encode_body
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
    return [getattr(segment, name) for name in ADD]


ADD = (
    *("kind", "seg_id", "generation", "unit_key", "name", "base", "extends", "tokens_sha256"),
    *("layout", "profile", "counts", "size", "sha256", "version", "first"),
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
    if (quick := _parse_usual(line, number, prev, bodies, name)) is not None:
        return quick
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


_SEG_ID, _NAME, _DIGEST = (
    pattern.fullmatch for pattern in (schema.SEG_ID, schema.NAME, schema.DIGEST)
)


def _segment(add: Sequence[Any], number: int, index: int, source: Any) -> Segment:
    """Check an add of a head. Raises ValueError, KeyError, TypeError or AttributeError."""
    kind, seg_id, generation, unit_key, name, base, extends, tokens, layout, profile = add[:10]
    counts, size, digest, version, first = add[10:]
    require(kind in schema.KINDS, f"kind {kind!r}")
    require(layout in schema.LAYOUTS[kind], f"layout {layout!r} of a {kind} segment")
    require(type(generation) is int and generation >= 0, f"generation {generation!r}")
    if not _SEG_ID(seg_id):
        raise ValueError(f"{seg_id!r} is not allowed")
    if not _NAME(name):
        raise ValueError(f"name {name!r}")
    for key, text in (("unit_key", unit_key), ("tokens_sha256", tokens), ("sha256", digest)):
        if not _DIGEST(text):
            raise ValueError(f"{key} {text!r}")
    follows = layout == schema.EXTENSION or (layout.endswith(schema.PARTIAL) and extends != "")
    if not (_SEG_ID(base) if kind == schema.SCORE else base == ""):
        raise ValueError(f"base {base!r}")
    if not (_SEG_ID(extends) if follows else extends == ""):
        raise ValueError(f"extends {extends!r}")
    limit = _check_counts(counts, layout, profile)
    require(type(size) is int and 0 <= size <= limit, f"{size!r} bytes of an object")
    require(content_address(digest) == seg_id, f"sha256 {digest!r}")
    is_place = is_count(version) and is_count(first)
    require(is_place, f"version {version!r}, first {first!r}")
    require(kind == schema.ROLLOUT or version == first == 0, "scores have no version or first")
    return Segment(
        kind=kind,
        seg_id=seg_id,
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
        number=number,
        index=index,
        source=source,
    )


@cache
def _bounds(layout: str, profile_name: str) -> tuple[dict[str, int], int]:
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
        each, rounding = _bounds(layout, profile_name)
    except ConfigError as error:
        raise ValueError(error.cause) from error
    require(type(counts) is dict and counts.keys() == each.keys(), f"counts {sorted(counts)}")
    decoded = 0
    for key, value in counts.items():
        if type(value) is not int or not 0 <= value <= schema.MAX_COUNT[key]:
            raise ValueError(f"{key} {value!r}")
        decoded += value * each[key]
    rows = counts["P"]
    require(counts.get("R", 0) <= rows, f"R {counts.get('R')} of {rows} rows")
    for key in ("E", "S"):
        if counts.get(key, 0) > rows * schema.MAX_K:
            raise ValueError(f"{key} {counts.get(key)} on {rows} rows")
    if decoded + rounding > schema.MAX_SEGMENT_BYTES:
        # Close to the limit or beyond: count exactly.
        size = decoded_bytes(layout, codecs.profile(profile_name), counts)
        require(size <= schema.MAX_SEGMENT_BYTES, f"{size} bytes decoded")
        return object_limit(layout, size)
    return object_limit(layout, decoded + rounding)


_COUNT = "(0|[1-9][0-9]{0,14})"
_SHA = "(sha256:[0-9a-f]{64})"
_USUAL = re.compile(
    r'\{"adds":\[\["(rollout|score)","([0-9a-f]{32})",' + _COUNT + f',"{_SHA}",'
    rf'"({schema.NAME.pattern})","([0-9a-f]{{32}}|)","([0-9a-f]{{32}}|)","{_SHA}",'
    rf'"([a-z+]+)","([a-z0-9]+)",(\{{[^}}]*\}}),{_COUNT},"(sha256:\2[0-9a-f]{{32}})",'
    rf'{_COUNT},{_COUNT}\]\],"body":\[{_COUNT},"{_SHA}"\],"deletes":\[\],"n":{_COUNT},'
    rf'"prev":"{_SHA}","removes":\[\],"tags":\{{\}},"time":"([0-9T:+-]*)"\}}'
).fullmatch
"""The head of a record of one segment, as `encode_record` writes it."""


def _parse_usual(line: bytes, number: int, prev: str, bodies: Bodies, name: str) -> Record | None:
    """Parse a head of the usual form as `parse_head` does, in a third of the time.

    Return None for any other head, also for one that is invalid.
    """
    found = _USUAL(line.decode("latin-1"))
    if found is None:
        return None
    (
        kind, seg_id, generation, unit_key, segment_name, base, extends, tokens, layout, profile,
        counts_text, size, digest, version, first, length, body_sha, n, before, time,
    ) = found.groups()  # fmt: skip
    form = _forms().get((kind, layout, profile))
    if form is None or int(n) != number or before != prev:
        return None
    names, match, most, each, rounding, spare = form
    numbers = match(counts_text)
    if numbers is None:
        return None
    values = [int(text) for text in numbers.groups()]
    counts = dict(zip(names, values, strict=True))
    rows, is_score = counts["P"], kind == schema.SCORE
    follows = layout == schema.EXTENSION or (extends and layout.endswith(schema.PARTIAL))
    decoded = sum(map(mul, values, each)) + rounding
    if (
        any(map(gt, values, most))
        or decoded > schema.MAX_SEGMENT_BYTES
        or int(size) > min(2 * decoded + spare, archive.MAX_BYTES)
        or int(length) > schema.MAX_RECORD_BYTES
        or counts.get("R", 0) > rows
        or counts.get("E", 0) > rows * schema.MAX_K
        or counts.get("S", 0) > rows * schema.MAX_K
        or is_score != bool(base)
        or bool(follows) != bool(extends)
        or (is_score and (version, first) != ("0", "0"))
    ):
        return None
    name = name or f"log/{file_name(number)}"
    body = RecordBody(bodies, number, name, int(length), body_sha, 1)
    add = new_segment(
        kind, seg_id, int(generation), unit_key, segment_name, base, extends, tokens, layout,
        profile, counts, int(size), digest, int(version), int(first), number, 0, body,
    )  # fmt: skip
    return Record(number, sha256(line), time, (add,), (), (), {}, body)


@cache
def _forms() -> dict[tuple[str, str, str], Any]:
    """Return (kind, layout, profile) -> names, pattern, bounds and bytes of its counts; spare."""
    found = {}
    for kind, layouts in schema.LAYOUTS.items():
        for layout in layouts:
            for profile in codecs.PROFILES:
                each, rounding = _bounds(layout, profile)
                names = sorted(each)
                text = ",".join(f'"{name}":{_COUNT}' for name in names)
                most = [schema.MAX_COUNT[name] for name in names]
                weights = [each[name] for name in names]
                match, spare = re.compile(rf"\{{{text}\}}").fullmatch, object_limit(layout, 0)
                found[kind, layout, profile] = names, match, most, weights, rounding, spare
    return found
