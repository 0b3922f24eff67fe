"""The encoding and the validation of a log record.

A record is two lines: canonical JSON, and the sha256 of that line. Everything in it is checked
before use: identifiers match their patterns, counts and sizes are bounded, and every name follows
from them, so a record cannot name other paths.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.schema as schema
from logitcask.engine.config.strict_json import count_values
from logitcask.engine.errors import ConfigError, IntegrityError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.format.provenance import provenance_of
from logitcask.engine.store.format.segment import (
    Entry,
    Segment,
    content_address,
    decoded_bytes,
    object_limit,
    sha256,
)

BROKEN = "restore it from a copy of the store; the records after it build on it"

Content = tuple[str, str, int]
"""(kind, seg_id, generation): one object of a segment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A valid record of the log."""

    number: int
    sha256: str
    """Of its first line; the next record's `prev`."""
    time: str
    """UTC, ISO 8601, by the writer's clock."""
    adds: tuple[Segment, ...]
    deletes: tuple[str, ...]
    """unit_keys that this record makes invisible."""
    removes: tuple[Content, ...]
    """Objects that gc removes after this record."""
    tags: Mapping[str, int | None]
    """Tag -> snapshot id, None where the tag is removed."""


def file_name(number: int) -> str:
    return f"{number:010d}.json"


def number_of(name: str) -> int | None:
    """Return the number of a file name in log/, None for any other name."""
    return int(name[:10]) if re.fullmatch(r"[0-9]{10}\.json", name) else None


def encode_record(body: Mapping[str, Any]) -> bytes:
    """Encode a body as one line of canonical JSON, and its digest as another."""
    line = canonical(body)
    return line + b"\n" + canonical({"sha256": sha256(line)}) + b"\n"


def decode_record(data: bytes, where: str) -> tuple[dict[str, Any], str]:
    """Decode a record to (body, its sha256). Raises IntegrityError for any other bytes."""
    line = data.partition(b"\n")[0]
    digest = sha256(line)
    if data[len(line) :] != b"\n" + canonical({"sha256": digest}) + b"\n":
        raise IntegrityError(f"{where}: does not match its own sha256", hint=BROKEN)
    if (values := count_values(line)) > schema.MAX_RECORD_VALUES:
        most = schema.MAX_RECORD_VALUES
        raise IntegrityError(f"{where}: {values} JSON values, at most {most}", hint=BROKEN)
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: not JSON ({error})", hint=BROKEN) from error
    if not isinstance(body, dict):
        raise IntegrityError(f"{where}: not a JSON object", hint=BROKEN)
    return body, digest


def encode_segment(segment: Segment) -> dict[str, Any]:
    """Return the entry of a segment in a record."""
    fields = set(Segment.__dataclass_fields__) - {"number"}
    if segment.seconds is None:
        fields.remove("seconds")
    return {name: getattr(segment, name) for name in fields}


def parse(data: bytes, where: str, *, number: int, prev: str) -> Record:
    """Decode and check a record. Raises IntegrityError naming the file."""
    body, digest = decode_record(data, where)
    if body.get("n") != number:
        raise IntegrityError(f"{where}: has the number {body.get('n')!r}", hint=BROKEN)
    if body.get("prev") != prev:
        raise IntegrityError(
            f"{where}: follows {body.get('prev')!r}, but the record before it is {prev!r}",
            hint=BROKEN,
        )

    def record() -> Record:
        _require(isinstance(body["commit_id"], str), "commit_id is not text")
        _require(isinstance(body["time"], str), "time is not text")
        return Record(
            number=number,
            sha256=digest,
            time=body["time"],
            adds=tuple(_segment(add, number) for add in body["adds"]),
            deletes=tuple(_matching(schema.DIGEST, key) for key in body["retires"]),
            removes=tuple(_content(*content) for content in body["sweeps"]),
            tags=_tags(body["tags"], number),
        )

    return validated(record, f"{where}: not a valid record")


def decode_segment(add: Any, where: str) -> Segment:
    """Decode and check the entry of a segment. Raises IntegrityError naming the file."""
    return validated(lambda: _segment(add, -1), f"{where}: not a valid segment")


T = TypeVar("T")


def validated(make: Callable[[], T], what: str) -> T:
    """Return make(). Raises IntegrityError in place of the errors of invalid data."""
    try:
        return make()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{what} ({error})", hint=BROKEN) from error


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _matching(pattern: re.Pattern[str], text: Any) -> str:
    _require(bool(pattern.fullmatch(text)), f"{text!r} is not allowed")
    return str(text)


def _content(kind: Any, seg_id: Any, generation: Any) -> Content:
    _require(kind in schema.KINDS, f"kind {kind!r}")
    _require(_is_count(generation), f"generation {generation!r}")
    return kind, _matching(schema.SEG_ID, seg_id), generation


def _tags(tags: Mapping[Any, Any], number: int) -> dict[str, int | None]:
    for name, marked in tags.items():
        _matching(schema.NAME, name)
        _require(
            marked is None or (_is_count(marked) and marked < number), f"tag {name} of {marked}"
        )
    return dict(tags)


def _segment(add: Mapping[str, Any], number: int) -> Segment:
    """Check the entry of a segment. Raises ValueError, KeyError, TypeError or AttributeError."""
    layout = add["layout"]
    kind, seg_id, _ = _content(add["kind"], add["seg_id"], add["generation"])
    _require(layout in schema.LAYOUTS[kind], f"layout {layout!r} of a {kind} segment")
    for key, pattern in (
        ("name", schema.NAME),
        ("unit_key", schema.DIGEST),
        ("tokens_sha256", schema.DIGEST),
    ):
        _require(bool(pattern.fullmatch(add[key])), f"{key} {add[key]!r}")
    follows = layout == schema.EXTENSION or (layout.endswith(schema.PARTIAL) and add["extends"])
    for key, has_id in (("base", kind == schema.SCORE), ("extends", follows)):
        _require(
            bool(schema.SEG_ID.fullmatch(add[key])) if has_id else add[key] == "",
            f"{key} {add[key]!r}",
        )
    try:
        profile = codecs.profile(add["profile"])
    except ConfigError as error:
        raise ValueError(error.cause) from error
    unit, provenance, seconds = add["unit"], add["provenance"], add.get("seconds")
    if seconds is not None:
        is_number = type(seconds) in (int, float) and 0 <= seconds < math.inf
        _require(is_number, f"seconds {seconds!r}")
    _require(
        isinstance(unit, dict) and isinstance(provenance, dict),
        "unit or provenance is not an object",
    )
    if kind == schema.ROLLOUT:
        is_unit = _is_count(unit["version"]) and _is_count(unit["first"])
        _require(is_unit, "unit lacks version or first")
    counts, decoded = _counts(add["counts"], layout, profile)
    size, digest = add["size"], add["sha256"]
    is_size = _is_count(size) and size <= object_limit(layout, decoded)
    _require(is_size, f"{size!r} bytes of an object")
    _require(content_address(_matching(schema.DIGEST, digest)) == seg_id, f"sha256 {digest!r}")
    entries = _entries(add["entries"], layout, counts, size)
    fields: dict[str, Any] = {"counts": counts, "entries": entries, "number": number}
    for name in set(Segment.__dataclass_fields__) - {*fields, "seconds"}:
        fields[name] = add[name]
    where = f"segment {seg_id} of {kind} {add['name']!r}"
    fields["provenance"] = provenance_of(provenance, f"{where}: provenance")
    return Segment(**fields, seconds=seconds)


def _counts(
    counts: Mapping[str, Any], layout: str, profile: codecs.Profile
) -> tuple[dict[str, int], int]:
    """Check the counts of a segment; return them, and the bytes of its arrays."""
    _require(counts.keys() == set(schema.COUNTS[layout]), f"counts {sorted(counts)}")
    for key, value in counts.items():
        _require(_is_count(value) and value <= schema.MAX_COUNT[key], f"{key} {value!r}")
    most = counts["P"] * schema.MAX_K
    _require(counts.get("R", 0) <= counts["P"], f"R {counts.get('R')} of {counts['P']} rows")
    for key in ("E", "S"):
        _require(counts.get(key, 0) <= most, f"{key} {counts.get(key)} on {counts['P']} rows")
    size = decoded_bytes(layout, profile, counts)
    _require(size <= schema.MAX_SEGMENT_BYTES, f"{size} bytes decoded")
    return dict(counts), size


def _entries(
    listed: Mapping[str, Any], layout: str, counts: Mapping[str, int], size: int
) -> dict[str, Entry]:
    """Check that the entries are those of the schema and lie in an object of `size` bytes."""
    specs = schema.specs(layout)
    names = {name for name in schema.read_alone(layout) if specs[name].length(counts)}
    _require(listed.keys() == names, f"entries {sorted(set(listed) ^ names)[:3]}")
    entries = {}
    for name, (start, length, digest) in listed.items():
        inside = _is_count(start) and _is_count(length) and start + length <= size
        _require(inside, f"bytes {start!r} and {length!r} more of {name}")
        entries[name] = (start, length, _matching(schema.DIGEST, digest))
    return entries
