"""A segment: one object, a Zarr v3 group in an uncompressed zip, immutable, named by its content.

The group is encoded in memory, so that sizes, digests and fsync are of the same bytes. To read, the
object is read whole and compared with its digest, its entries with the names and sizes
of the schema, their metadata with the schema, and only then they are decoded, each array into
memory of its own size. Some arrays are also read alone, by the offsets and digests in the record.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

import logitcask.engine.store.format.archive as archive
import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.format.shards as shards
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.format.entry import Entry, Segment, content_address, sha256
from logitcask.engine.store.storage.base import Storage
from logitcask.engine.types import Array

RESTORE = (
    "restore it from a copy: `logitcask store merge STORE COPY --repair`; or, without a copy, run "
    "`logitcask store delete STORE --segment ID` and make it again"
)


_GAP = 65536
"""Bytes between two parts that are read with them rather than by another call."""


def dtype_of(spec: schema.Spec, profile: codecs.Profile) -> str:
    return profile.stored if spec.dtype == schema.ENTRY else spec.dtype


def counts_of(layout: str, arrays: Mapping[str, Array]) -> dict[str, int]:
    """Return the counts that follow from the lengths of the arrays."""
    specs = schema.specs(layout)
    return {spec.count: len(arrays[name]) - spec.plus for name, spec in specs.items()}


def decoded_bytes(layout: str, profile: codecs.Profile, counts: Mapping[str, int]) -> int:
    """Return the bytes of all arrays of a segment in memory."""
    total = 0
    for spec in schema.specs(layout).values():
        _, shard = schema.chunk_shape(spec, spec.length(counts))
        total += shard * np.dtype(dtype_of(spec, profile)).itemsize
    return total


def file_limits(layout: str, profile: codecs.Profile, counts: Mapping[str, int]) -> dict[str, int]:
    """Return the files of a segment, name -> most bytes."""
    limits = dict.fromkeys(schema.file_names(layout, counts), schema.MAX_META_BYTES)
    for name, spec in schema.specs(layout).items():
        if f"{name}/c/0" in limits:
            _, shard = schema.chunk_shape(spec, spec.length(counts))
            # Incompressible data grows a little, and a shard has an index.
            limits[f"{name}/c/0"] += 2 * shard * np.dtype(dtype_of(spec, profile)).itemsize
    return limits


def object_limit(layout: str, decoded: int) -> int:
    """Return the most bytes of an object whose arrays have `decoded` bytes: more than its files."""
    files = 2 * len(schema.specs(layout)) + 2
    return min(2 * decoded + files * schema.MAX_META_BYTES, archive.MAX_BYTES)


def entries_of(layout: str, contents: Mapping[str, bytes | memoryview]) -> dict[str, Entry]:
    """Return the entries of the arrays that are read alone, of the files of a segment."""
    starts = archive.offsets({name: len(data) for name, data in contents.items()})
    found = {}
    for array in schema.read_alone(layout):
        if (data := contents.get(f"{array}/c/0")) is not None:
            found[array] = (starts[f"{array}/c/0"], len(data), sha256(data))
    return found


def attributes_of(segment: Segment) -> dict[str, Any]:
    """Return the attributes of the group of a segment."""
    return {
        "format": schema.FORMAT,
        "version": schema.FORMAT_VERSION,
        "kind": segment.kind,
        "layout": segment.layout,
        "profile": segment.profile,
        "counts": dict(segment.counts),
        "base": segment.base,
        "extends": segment.extends,
        "tokens_sha256": segment.tokens_sha256,
    }


def with_object(
    segment: Segment, data: bytes, contents: Mapping[str, bytes | memoryview]
) -> Segment:
    """Return the segment whose object is `data`, the archive of these files."""
    digest = sha256(data)
    return replace(
        segment,
        seg_id=content_address(digest),
        size=len(data),
        sha256=digest,
        source=replace(segment.body, entries=entries_of(segment.layout, contents)),
    )


def encode(
    arrays: Mapping[str, Array],
    *,
    layout: str,
    profile: codecs.Profile,
    attributes: Mapping[str, Any],
) -> dict[str, bytes]:
    """Encode arrays as the files of a Zarr v3 group, relative name -> bytes."""
    files = metadata_files(layout, profile, counts_of(layout, arrays), attributes)
    for name, spec in schema.specs(layout).items():
        dtype, values = dtype_of(spec, profile), arrays[name]
        if values.dtype != np.dtype(dtype) or values.ndim != 1:
            raise TypeError(f"{name}: {values.dtype} {values.shape}, expected {dtype}")
        if len(values):
            files[f"{name}/c/0"] = shards.encode(values, **_shape(spec, profile, len(values)))
    return files


def metadata_files(
    layout: str,
    profile: codecs.Profile,
    counts: Mapping[str, int],
    attributes: Mapping[str, Any],
) -> dict[str, bytes]:
    """Return the zarr.json of the group and of each array, relative name -> bytes."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    files = {"zarr.json": canonical(group)}
    for name, spec in schema.specs(layout).items():
        shape = _shape(spec, profile, spec.length(counts))
        files[f"{name}/zarr.json"] = shards.metadata(**shape)
    return files


def check_decodes(
    data: bytes,
    arrays: Mapping[str, Array],
    *,
    layout: str,
    profile: codecs.Profile,
    counts: Mapping[str, int],
) -> None:
    """Decode an object again and compare every value, so that no codec error is published.

    Raises StoreError.
    """
    back = decode("", data, layout=layout, profile=profile, counts=counts, names=list(arrays))
    for name, array in arrays.items():
        if array.tobytes() != back[name].tobytes():
            raise StoreError(
                f"{name}: does not decode to what was encoded",
                hint="check memory, and the versions of numcodecs and pcodec",
            )


def read_object(storage: Storage, segment: Segment) -> bytes:
    """Read the object of a segment and check its size and its digest. Raises IntegrityError."""
    data = storage.read(segment.path, segment.size)
    return _checked(storage.where(segment.path), data, segment.size, segment.sha256)


def _checked(where: str, data: bytes | None, size: int, digest: str) -> bytes:
    if data is None:
        raise IntegrityError(f"{where}: a committed file is missing", hint=RESTORE)
    if len(data) != size:
        raise IntegrityError(
            f"{where}: {len(data)} bytes where {size} were committed", hint=RESTORE
        )
    if sha256(data) != digest:
        raise IntegrityError(f"{where}: other bytes than were committed", hint=RESTORE)
    return data


def decode(
    where: str,
    data: bytes,
    *,
    layout: str,
    profile: codecs.Profile,
    counts: Mapping[str, int],
    names: Collection[str],
) -> dict[str, Array]:
    """Decode the arrays `names` from an object. Raises IntegrityError.

    where: its path or URL, for messages.
    """
    files = _files(where, data, layout, profile, counts)
    arrays = {}
    for name in names:
        spec = schema.specs(layout)[name]
        shape = _shape(spec, profile, spec.length(counts))
        fault = shards.metadata_fault(bytes(files[f"{name}/zarr.json"]), **shape)
        if fault:
            raise IntegrityError(f"{where}: {name}/zarr.json: {fault}", hint=RESTORE)
        arrays[name] = _decoded(where, name, files.get(f"{name}/c/0", memoryview(b"")), shape)
    return arrays


def _files(
    where: str, data: bytes, layout: str, profile: codecs.Profile, counts: Mapping[str, int]
) -> dict[str, memoryview]:
    try:
        return archive.split(data, file_limits(layout, profile, counts))
    except ValueError as error:
        raise IntegrityError(
            f"{where}: not the zip of a segment ({error})", hint=RESTORE
        ) from error


def _shape(spec: schema.Spec, profile: codecs.Profile, length: int) -> dict[str, Any]:
    """Return the arguments of functions of `shards` for an array."""
    dtype, (chunk, shard) = dtype_of(spec, profile), schema.chunk_shape(spec, length)
    codec = codecs.codec_of(dtype, profile)
    return {"dtype": dtype, "codec": codec, "length": length, "chunk": chunk, "shard": shard}


def _decoded(where: str, name: str, data: bytes | memoryview, shape: dict[str, Any]) -> Array:
    try:
        return shards.decode(data, **shape)
    except Exception as error:  # A decoder may raise anything on invalid bytes.
        raise IntegrityError(f"{where}: {name} does not decode ({error})", hint=RESTORE) from error


def decode_object(
    where: str, data: bytes, segment: Segment, names: Collection[str] | None = None
) -> dict[str, Array]:
    """Decode all arrays of a segment from its object, or those of `names`; as `decode`."""
    return decode(
        where,
        data,
        layout=segment.layout,
        profile=codecs.profile(segment.profile),
        counts=segment.counts,
        names=list(schema.specs(segment.layout) if names is None else names),
    )


def split(where: str, data: bytes, segment: Segment) -> dict[str, memoryview]:
    """Return the files of a segment's object, name -> bytes. Raises IntegrityError."""
    return _files(where, data, segment.layout, codecs.profile(segment.profile), segment.counts)


def check_entries(where: str, data: bytes, segment: Segment) -> None:
    """Raise IntegrityError where a record has other entries than the object of its segment."""
    files = split(where, data, segment)
    if entries_of(segment.layout, files) != dict(segment.entries):
        raise IntegrityError(
            f"{where}: its record has other entries than it",
            hint="run `logitcask store delete STORE --segment ID` and make it again",
        )


def read(
    storage: Storage, segment: Segment, names: Collection[str] | None = None
) -> dict[str, Array]:
    """Read all arrays of a committed segment, or those of `names`. Raises IntegrityError.

    Where all of `names` can be read alone, nothing else is read.
    """
    where, profile = storage.where(segment.path), codecs.profile(segment.profile)
    if names is None or not schema.READ_ALONE.issuperset(names):
        return decode_object(where, read_object(storage, segment), segment, names)
    parts = _read_parts(storage, segment, [name for name in names if name in segment.entries])
    arrays = {}
    for name in names:
        spec = schema.specs(segment.layout)[name]
        shape = _shape(spec, profile, spec.length(segment.counts))
        arrays[name] = _decoded(where, name, parts.get(name, b""), shape)
    return arrays


def _read_parts(storage: Storage, segment: Segment, names: Collection[str]) -> dict[str, bytes]:
    """Read and check the data of some arrays that can be read alone; neighbours in one call."""
    runs: list[list[str]] = []
    end = 0
    for name in sorted(names, key=lambda name: segment.entries[name]):
        start, size, _ = segment.entries[name]
        if not runs or start > end + _GAP:
            runs.append([])
        runs[-1].append(name)
        end = start + size
    found = {}
    for run in runs:
        first, last = segment.entries[run[0]][0], sum(segment.entries[run[-1]][:2])
        data = storage.read_part(segment.path, first, last - first)
        for name in run:
            start, size, digest = segment.entries[name]
            part = None if data is None else data[start - first :][:size]
            found[name] = _checked(storage.where(segment.path), part, size, digest)
    return found
