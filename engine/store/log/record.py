"""One log record: what it must look like, whatever it claims.

A record is two lines: canonical JSON, and the sha256 of that line. Nothing in it is believed before
it is checked: identifiers match their patterns, counts are bounded, and the list of files is
exactly the one that the schema gives, so a record can name no path of its own.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.schema as schema
from logitcask.engine.errors import ConfigError, IntegrityError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.format.segment import (
    Segment,
    content_address,
    decoded_bytes,
    dtype_of,
    sha256,
)

BROKEN = "restore it from a copy of the store; the records after it build on it"

Content = tuple[str, str, int]
"""(kind, seg_id, generation): one folder of a segment."""


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
    """unit_keys that are not visible from here on."""
    removes: tuple[Content, ...]
    """Folders that gc removes after this record."""
    tags: Mapping[str, int | None]
    """Name -> the log number that it marks, None where the mark is taken away."""


def file_name(number: int) -> str:
    return f"{number:010d}.json"


def number_of(name: str) -> int | None:
    """The number that a file name in log/ stands for, None for an orphan."""
    return int(name[:10]) if re.fullmatch(r"[0-9]{10}\.json", name) else None


def encode_record(body: Mapping[str, Any]) -> bytes:
    """A body as one line of canonical JSON, and its digest as another."""
    line = canonical(body)
    return line + b"\n" + canonical({"sha256": sha256(line)}) + b"\n"


def decode_record(data: bytes, where: str) -> tuple[dict[str, Any], str]:
    """Decode a record to (body, its sha256). Raises IntegrityError for any other bytes."""
    line = data.partition(b"\n")[0]
    digest = sha256(line)
    if data[len(line) :] != b"\n" + canonical({"sha256": digest}) + b"\n":
        raise IntegrityError(f"{where}: does not match its own sha256", hint=BROKEN)
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: not JSON ({error})", hint=BROKEN) from error
    if not isinstance(body, dict):
        raise IntegrityError(f"{where}: not a JSON object", hint=BROKEN)
    return body, digest


def encode_segment(segment: Segment) -> dict[str, Any]:
    """What a record says of one segment."""
    # Records of before have no seconds, and readers of before pass over them.
    noted = {} if segment.seconds is None else {"seconds": segment.seconds}
    return {
        "kind": segment.kind,
        "seg_id": segment.seg_id,
        "generation": segment.generation,
        "unit_key": segment.unit_key,
        "name": segment.name,
        "base": segment.base,
        "widens": segment.extends,
        "unit": dict(segment.unit),
        "counts": dict(segment.counts),
        "token_digest": segment.tokens_sha256,
        "profile": segment.profile,
        "layout": segment.layout,
        "files": {name: list(entry) for name, entry in segment.files.items()},
        "lineage": dict(segment.lineage),
        **noted,
    }


def parse(data: bytes, where: str, *, number: int, prev: str) -> Record:
    """A record's bytes -> Record. Raises IntegrityError naming the file."""
    body, digest = decode_record(data, where)
    if body.get("n") != number:
        raise IntegrityError(f"{where}: says that it is number {body.get('n')!r}", hint=BROKEN)
    if body.get("prev") != prev:
        raise IntegrityError(
            f"{where}: follows {body.get('prev')!r}, but the record before it is {prev!r}",
            hint=BROKEN,
        )

    def record() -> Record:
        _need(isinstance(body["commit_id"], str), "commit_id is not text")
        _need(isinstance(body["time"], str), "time is not text")
        return Record(
            number=number,
            sha256=digest,
            time=body["time"],
            adds=tuple(_segment(add, number) for add in body["adds"]),
            deletes=tuple(_matching(schema.DIGEST, key) for key in body["retires"]),
            removes=tuple(_content(*content) for content in body["sweeps"]),
            tags=_tags(body["tags"], number),
        )

    return valid(record, f"{where}: not a valid record")


def decode_segment(add: Any, where: str) -> Segment:
    """A segment as `encode_segment` tells of it. Raises IntegrityError naming the file."""
    return valid(lambda: _segment(add, -1), f"{where}: not a valid segment")


T = TypeVar("T")


def valid(make: Callable[[], T], what: str) -> T:
    """make(), and an IntegrityError where what it reads is not as it must be."""
    try:
        return make()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{what} ({error})", hint=BROKEN) from error


def _need(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_duration(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _matching(pattern: re.Pattern[str], text: Any) -> str:
    _need(bool(pattern.fullmatch(text)), f"{text!r} is not allowed")
    return str(text)


def _content(kind: Any, seg_id: Any, generation: Any) -> Content:
    _need(kind in schema.KINDS, f"kind {kind!r}")
    _need(_is_count(generation), f"generation {generation!r}")
    return kind, _matching(schema.SEG_ID, seg_id), generation


def _tags(tags: Mapping[Any, Any], number: int) -> dict[str, int | None]:
    for name, marked in tags.items():
        _matching(schema.NAME, name)
        _need(marked is None or (_is_count(marked) and marked < number), f"tag {name} of {marked}")
    return dict(tags)


def _segment(add: Mapping[str, Any], number: int) -> Segment:
    """Raises ValueError, KeyError, TypeError or AttributeError for what no commit writes."""
    layout, base, extends = add["layout"], add["base"], add["widens"]
    kind, seg_id, generation = _content(add["kind"], add["seg_id"], add["generation"])
    _need(layout in schema.LAYOUTS[kind], f"layout {layout!r} of a {kind} segment")
    for key, pattern in (
        ("name", schema.NAME),
        ("unit_key", schema.DIGEST),
        ("token_digest", schema.DIGEST),
    ):
        _need(bool(pattern.fullmatch(add[key])), f"{key} {add[key]!r}")
    of_base = bool(schema.SEG_ID.fullmatch(base)) if kind == schema.SCORE else base == ""
    _need(of_base, f"base {base!r}")
    of_first = (
        bool(schema.SEG_ID.fullmatch(extends)) if layout == schema.EXTENSION else extends == ""
    )
    _need(of_first, f"widens {extends!r}")
    try:
        profile = codecs.profile(add["profile"])
    except ConfigError as error:
        raise ValueError(error.cause) from error
    unit, lineage, seconds = add["unit"], add["lineage"], add.get("seconds")
    _need(seconds is None or _is_duration(seconds), f"seconds {seconds!r}")
    _need(isinstance(unit, dict) and isinstance(lineage, dict), "unit or lineage is not an object")
    if kind == schema.ROLLOUT:
        _need(
            _is_count(unit["version"]) and _is_count(unit["first"]), "unit lacks version or first"
        )
    counts = _counts(add["counts"], layout, profile)
    manifest = _manifest(add["files"], layout, counts, profile)
    _need(content_address(manifest) == seg_id, "seg_id is not the digest of the files")
    return Segment(
        kind=kind,
        seg_id=seg_id,
        generation=generation,
        unit_key=add["unit_key"],
        name=add["name"],
        base=base,
        extends=extends,
        unit=unit,
        counts=counts,
        profile=add["profile"],
        layout=layout,
        files=manifest,
        lineage=lineage,
        tokens_sha256=add["token_digest"],
        number=number,
        seconds=seconds,
    )


def _counts(counts: Mapping[str, Any], layout: str, profile: codecs.Profile) -> dict[str, int]:
    _need(counts.keys() == set(schema.COUNTS[layout]), f"counts {sorted(counts)}")
    for key, value in counts.items():
        _need(_is_count(value) and value <= schema.MAX_COUNT[key], f"{key} {value!r}")
    most = counts["P"] * schema.MAX_K
    for key in ("E", "S"):
        _need(counts.get(key, 0) <= most, f"{key} {counts.get(key)} on {counts['P']} rows")
    size = decoded_bytes(layout, profile, counts)
    _need(size <= schema.MAX_SEGMENT_BYTES, f"{size} bytes decoded")
    return dict(counts)


def _manifest(
    listed: Mapping[str, Any], layout: str, counts: Mapping[str, int], profile: codecs.Profile
) -> dict[str, tuple[int, str]]:
    """Relative name -> (bytes, sha256), for exactly the files that the schema asks for."""
    names = schema.file_names(layout, counts)
    _need(listed.keys() == names, f"files {sorted(set(listed) ^ names)[:3]}")
    manifest = {}
    for name, (length, sha) in listed.items():
        limit = schema.MAX_META_BYTES
        if not name.endswith("zarr.json"):
            spec = schema.specs(layout)[name.split("/")[0]]
            _, shard = schema.chunk_shape(spec, spec.length(counts))
            # What does not compress grows a little, and a shard carries an index.
            limit += 2 * shard * np.dtype(dtype_of(spec, profile)).itemsize
        _need(_is_count(length) and length <= limit, f"{length!r} bytes of {name}")
        _need(bool(schema.DIGEST.fullmatch(sha)), f"sha256 of {name}")
        manifest[name] = (length, sha)
    return manifest
