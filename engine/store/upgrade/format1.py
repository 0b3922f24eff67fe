"""Reading of a store of format 1: its log, and the files of its segments. Nothing is written.

Each record is two lines, canonical JSON and its digest; each segment is a folder of files, whose
sizes and digests are in the record. All of it is checked before use, as in format 2.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.format.segment as segments
from logitcask.engine.config.parse.strict_json import count_values
from logitcask.engine.errors import ConfigError, IntegrityError, StoreError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.format.entry import Segment, SegmentBody, content_address, sha256
from logitcask.engine.store.storage.base import Storage
from logitcask.engine.store.upgrade.names import file_of, layout_of, provenance_of

VERSION = 1
MAX_RECORD_BYTES = 8 << 20
MAX_RECORD_VALUES = 300_000
_FOLDERS = ("log", "seg", "seg/rollout", "seg/score")
HINT = "repair the old store from a copy, with the version of logitcask that made it"
_AT_ONCE = 64
"""Records that are read together."""

Content = tuple[str, str, int]
"""(kind, seg_id, generation): one folder of a segment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Added:
    """A segment of a record."""

    segment: Segment
    """With the names of format 2, but the ids of format 1, and without the object."""
    files: Mapping[str, tuple[int, str]]
    """Data file of format 2 -> (bytes, sha256) of the file of format 1 with its content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A valid record of the log."""

    number: int
    time: str
    kept: Mapping[str, Any]
    """`commit_id` and `writer`."""
    adds: tuple[Added, ...]
    deletes: tuple[str, ...]
    removes: tuple[Content, ...]
    tags: Mapping[str, int | None]


def read_identity(storage: Storage) -> tuple[dict[str, Any], str]:
    """Return (the body of format.json, its sha256).

    Raises StoreError where there is no store of format 1, IntegrityError where it is damaged.
    """
    where = storage.where("format.json")
    data = storage.read("format.json", schema.MAX_FORMAT_BYTES)
    if data is None:
        raise StoreError(f"{storage.url} is not a logitcask store", hint="check the path")
    body, digest = _decoded(data, where)
    if body.get("format") != schema.FORMAT or not isinstance(body.get("store_uuid"), str):
        raise IntegrityError(f"{where}: not the identity of a logitcask store", hint=HINT)
    if body.get("version") != VERSION:
        raise StoreError(
            f"{storage.url} is of format version {body.get('version')!r}, not {VERSION}",
            hint="use it as it is: only stores of older versions are upgraded",
        )
    storage.check(_FOLDERS)
    return body, digest


def last_number(storage: Storage) -> int:
    """Return the number of the newest record, -1 where there is none."""
    names = storage.names("log")
    return max((int(n[:10]) for n in names if re.fullmatch(r"[0-9]{10}\.json", n)), default=-1)


def records(storage: Storage, genesis: str, last: int) -> Iterator[Record]:
    """Read the records up to `last`. Raises IntegrityError naming the file."""
    prev = genesis
    for first in range(0, last + 1, _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, last + 1))
        names = {f"log/{number:010d}.json": number for number in numbers}
        found = storage.read_all(dict.fromkeys(names, MAX_RECORD_BYTES))
        for name, number in names.items():
            where, data = storage.where(name), found[name]
            if data is None:
                raise IntegrityError(f"{where}: this published record is missing", hint=HINT)
            body, digest = _decoded(data, where)
            if (body.get("n"), body.get("prev")) != (number, prev):
                raise IntegrityError(f"{where}: does not follow the record before it", hint=HINT)
            try:
                record = _record(body, number)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                cause = f"{where}: not a valid record ({error})"
                raise IntegrityError(cause, hint=HINT) from error
            yield record
            prev = digest


def read_files(storage: Storage, added: Added, generation: int) -> dict[str, bytes]:
    """Read the data of a segment, file of format 2 -> bytes, and compare sizes and digests.

    Raises IntegrityError naming the file.
    """
    which = added.segment
    folder = f"seg/{which.kind}/{which.seg_id}" + (f".{generation}" if generation else "")
    paths = {name: f"{folder}/{file_of(name)}" for name in sorted(added.files)}
    found = storage.read_all({path: added.files[name][0] for name, path in paths.items()})
    contents = {}
    for name, path in paths.items():
        data, (size, digest) = found[path], added.files[name]
        if data is None or len(data) != size or sha256(data) != digest:
            state = "missing" if data is None else "other bytes than were committed"
            raise IntegrityError(f"{storage.where(path)}: {state}", hint=HINT)
        contents[name] = data
    return contents


def _decoded(data: bytes, where: str) -> tuple[dict[str, Any], str]:
    line = data.partition(b"\n")[0]
    digest = sha256(line)
    if data[len(line) :] != b"\n" + canonical({"sha256": digest}) + b"\n":
        raise IntegrityError(f"{where}: does not match its own sha256", hint=HINT)
    if (values := count_values(line)) > MAX_RECORD_VALUES:
        raise IntegrityError(f"{where}: {values} JSON values", hint=HINT)
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: not JSON ({error})", hint=HINT) from error
    if not isinstance(body, dict):
        raise IntegrityError(f"{where}: not a JSON object", hint=HINT)
    return body, digest


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _matching(pattern: re.Pattern[str], text: Any) -> str:
    _require(bool(pattern.fullmatch(text)), f"{text!r} is not allowed")
    return str(text)


def _content(kind: Any, seg_id: Any, generation: Any) -> Content:
    _require(kind in schema.KINDS and _is_count(generation), f"{kind!r} {generation!r}")
    return kind, _matching(schema.SEG_ID, seg_id), generation


def _record(body: Mapping[str, Any], number: int) -> Record:
    kept = {key: body[key] for key in ("commit_id", "writer")}
    _require(isinstance(kept["commit_id"], str), "commit_id is not text")
    _require(isinstance(body["time"], str), "time is not text")
    for name, marked in body["tags"].items():
        _matching(schema.NAME, name)
        is_older = marked is None or (_is_count(marked) and marked < number)
        _require(is_older, f"tag {name} of {marked!r}")
    return Record(
        number=number,
        time=body["time"],
        kept=kept,
        adds=tuple(_added(add) for add in body["adds"]),
        deletes=tuple(_matching(schema.DIGEST, key) for key in body["retires"]),
        removes=tuple(_content(*content) for content in body["sweeps"]),
        tags=dict(body["tags"]),
    )


def _added(add: Mapping[str, Any]) -> Added:
    kind, seg_id, generation = _content(add["kind"], add["seg_id"], add["generation"])
    layout = layout_of(add["layout"])
    _require(layout in schema.LAYOUTS[kind], f"layout {add['layout']!r} of a {kind} segment")
    follows = layout == schema.EXTENSION or (layout.endswith(schema.PARTIAL) and add["widens"])
    for key, has_id in (("base", kind == schema.SCORE), ("widens", follows)):
        is_sound = bool(schema.SEG_ID.fullmatch(add[key])) if has_id else add[key] == ""
        _require(is_sound, f"{key} {add[key]!r}")
    try:
        profile = codecs.profile(add["profile"])
    except ConfigError as error:
        raise ValueError(error.cause) from error
    unit, lineage = add["unit"], add["lineage"]
    _require(isinstance(unit, dict) and isinstance(lineage, dict), "unit or lineage: no object")
    if kind == schema.ROLLOUT:
        _require(_is_count(unit["version"]) and _is_count(unit["first"]), "no version or first")
    seconds = add.get("seconds")
    is_time = seconds is None or (type(seconds) in (int, float) and 0 <= seconds < math.inf)
    _require(is_time, f"seconds {seconds!r}")
    counts = _counts(add["counts"], layout, profile)
    listed, limits = add["files"], segments.file_limits(layout, profile, counts)
    _require(listed.keys() == {file_of(name) for name in limits}, "other files than its layout's")
    files = {}
    for name, limit in limits.items():
        size, digest = listed[file_of(name)]
        _require(_is_count(size) and size <= limit, f"{size!r} bytes of {file_of(name)}")
        _matching(schema.DIGEST, digest)
        if not name.endswith("zarr.json"):
            files[name] = (size, digest)
    address = canonical({name: digest for name, (_, digest) in listed.items()})
    is_address = content_address(sha256(address)) == seg_id
    _require(is_address, "seg_id is not the digest of the files")
    segment = Segment(
        kind=kind,
        seg_id=seg_id,
        generation=generation,
        unit_key=_matching(schema.DIGEST, add["unit_key"]),
        name=_matching(schema.NAME, add["name"]),
        base=add["base"],
        extends=add["widens"],
        counts=counts,
        profile=add["profile"],
        layout=layout,
        tokens_sha256=_matching(schema.DIGEST, add["token_digest"]),
        version=unit["version"] if kind == schema.ROLLOUT else 0,
        first=unit["first"] if kind == schema.ROLLOUT else 0,
        source=SegmentBody(unit=unit, provenance=provenance_of(lineage, seg_id), seconds=seconds),
    )
    return Added(segment=segment, files=files)


def _counts(counts: Mapping[str, Any], layout: str, profile: codecs.Profile) -> dict[str, int]:
    _require(counts.keys() == set(schema.COUNTS[layout]), f"counts {sorted(counts)}")
    for key, value in counts.items():
        _require(_is_count(value) and value <= schema.MAX_COUNT[key], f"{key} {value!r}")
    size = segments.decoded_bytes(layout, profile, counts)
    _require(size <= schema.MAX_SEGMENT_BYTES, f"{size} bytes decoded")
    return dict(counts)
