"""One log record: what it must look like, whatever it claims.

Canonical JSON with its own sha256. Nothing in it is believed before it is checked: identifiers
match their patterns, counts are bounded, and the list of files is exactly the one that the schema
gives, so a record can name no path of its own.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import logitcask.engine.store.schema as schema
from logitcask.engine.errors import ConfigError, IntegrityError
from logitcask.engine.identity import canonical, digest
from logitcask.engine.store.segment import Segment, content_address, dtype_of

BROKEN = "restore it from a copy of the store; the records after it build on it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A valid record of the log."""

    number: int
    sha256: str
    """Of the record's canonical JSON without this field; the next record's `prev`."""
    commit_id: str
    segments: tuple[Segment, ...]


def file_name(number: int) -> str:
    return f"{number:010d}.json"


def number_of(name: str) -> int | None:
    """The number that a file name in log/ stands for, None for a stray."""
    return int(name[:10]) if re.fullmatch(r"[0-9]{10}\.json", name) else None


def seal(body: Mapping[str, Any]) -> bytes:
    """Canonical JSON of a body with its own digest in it."""
    return canonical({**body, "sha256": digest(dict(body))})


def unseal(data: bytes, path: Path) -> dict[str, Any]:
    """The inverse of `seal`. Raises IntegrityError for any other bytes."""
    try:
        body = json.loads(data)
        claimed = body.pop("sha256")
        valid = isinstance(claimed, str) and seal(body) == data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{path}: not a sealed JSON object ({type(error).__name__})", remedy=BROKEN
        ) from error
    if not valid:
        raise IntegrityError(f"{path}: does not match its own sha256", remedy=BROKEN)
    return {**body, "sha256": claimed}


def describe(segment: Segment) -> dict[str, Any]:
    """What a record says of one segment."""
    return {
        "kind": segment.kind,
        "seg_id": segment.seg_id,
        "unit_key": segment.unit_key,
        "name": segment.name,
        "base": segment.base,
        "unit": dict(segment.unit),
        "counts": dict(segment.counts),
        "token_digest": segment.token_digest,
        "profile": segment.profile,
        "layout": segment.layout,
        "files": {name: list(entry) for name, entry in segment.files.items()},
        "lineage": dict(segment.lineage),
    }


def parse(data: bytes, path: Path, *, number: int, prev: str) -> Record:
    """A record's bytes -> Record. Raises IntegrityError naming the file."""
    body = unseal(data, path)
    if body.get("n") != number:
        raise IntegrityError(f"{path}: says that it is number {body.get('n')!r}", remedy=BROKEN)
    if body.get("prev") != prev:
        raise IntegrityError(
            f"{path}: follows {body.get('prev')!r}, but the record before it is {prev!r}",
            remedy=BROKEN,
        )
    try:
        segments = tuple(_segment(add, number) for add in body["adds"])
        _need(isinstance(body["commit_id"], str), "commit_id is not text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path}: not a valid record ({error})", remedy=BROKEN) from error
    return Record(
        number=number, sha256=body["sha256"], commit_id=body["commit_id"], segments=segments
    )


def _need(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _segment(add: Mapping[str, Any], number: int) -> Segment:
    """Raises ValueError, KeyError, TypeError or AttributeError for what no commit writes."""
    kind, layout, base = add["kind"], add["layout"], add["base"]
    _need(kind in schema.KINDS, f"kind {kind!r}")
    _need(layout in schema.LAYOUTS[kind], f"layout {layout!r} of a {kind} segment")
    for key, pattern in (
        ("seg_id", schema.SEG_ID),
        ("name", schema.NAME),
        ("unit_key", schema.DIGEST),
        ("token_digest", schema.DIGEST),
    ):
        _need(bool(pattern.fullmatch(add[key])), f"{key} {add[key]!r}")
    _need(
        bool(schema.SEG_ID.fullmatch(base)) if kind == schema.SCORE else base == "",
        f"base {base!r}",
    )
    try:
        entry = dtype_of(schema.Spec(schema.ENTRY, "E"), add["profile"])
    except ConfigError as error:
        raise ValueError(error.cause) from error
    unit, lineage = add["unit"], add["lineage"]
    _need(isinstance(unit, dict) and isinstance(lineage, dict), "unit or lineage is not an object")
    if kind == schema.ROLLOUT:
        _need(
            _is_count(unit["version"]) and _is_count(unit["first"]), "unit lacks version or first"
        )
    counts = _counts(add["counts"], layout)
    manifest = _manifest(add["files"], layout, counts, entry)
    _need(content_address(manifest) == add["seg_id"], "seg_id is not the digest of the files")
    return Segment(
        kind=kind,
        seg_id=add["seg_id"],
        unit_key=add["unit_key"],
        name=add["name"],
        base=base,
        unit=unit,
        counts=counts,
        profile=add["profile"],
        layout=layout,
        files=manifest,
        lineage=lineage,
        token_digest=add["token_digest"],
        number=number,
    )


def _counts(counts: Mapping[str, Any], layout: str) -> dict[str, int]:
    _need(counts.keys() == set(schema.COUNTS[layout]), f"counts {sorted(counts)}")
    for key, value in counts.items():
        _need(_is_count(value) and value <= schema.MAX_COUNT[key], f"{key} {value!r}")
    most = counts["P"] * schema.MAX_K
    for key in ("E", "K", "S"):
        _need(counts.get(key, 0) <= most, f"{key} {counts.get(key)} on {counts['P']} rows")
    return dict(counts)


def _manifest(
    listed: Mapping[str, Any], layout: str, counts: Mapping[str, int], entry: str
) -> dict[str, tuple[int, str]]:
    """Relative name -> (bytes, sha256), for exactly the files that the schema asks for."""
    names = schema.file_names(layout, counts)
    _need(listed.keys() == names, f"files {sorted(set(listed) ^ names)[:3]}")
    manifest = {}
    for name, (length, sha) in listed.items():
        limit = schema.MAX_META_BYTES
        if not name.endswith("zarr.json"):
            spec = schema.specs(layout)[name.split("/")[0]]
            dtype = np.dtype(entry if spec.dtype == schema.ENTRY else spec.dtype)
            _, shard = schema.chunk_shape(spec, spec.length(counts))
            # What does not compress grows a little, and a shard carries an index.
            limit += 2 * shard * dtype.itemsize
        _need(_is_count(length) and length <= limit, f"{length!r} bytes of {name}")
        _need(bool(schema.DIGEST.fullmatch(sha)), f"sha256 of {name}")
        manifest[name] = (length, sha)
    return manifest
