"""One segment: a plain Zarr v3 group, immutable, named by its content.

Writing: the group is encoded in memory, and its objects are written through files.py, so that
sizes, digests and fsync are of the same bytes. Reading: the files that the record lists are read
whole, compared with their digests, their metadata compared with the schema, and only then decoded.
Left to itself, Zarr reads a missing file as zeros.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import logitcask.engine.store.codecs as codecs
import logitcask.engine.store.files as files
import logitcask.engine.store.schema as schema
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.identity import canonical
from logitcask.engine.types import Array

RESTORE = "restore it from a copy of the store, or make the unit again in a new store"


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """What the log says of one segment."""

    kind: str
    """'rollout' or 'score'."""
    seg_id: str
    """32 hex digits of the digest over its files' digests."""
    unit_key: str
    name: str
    """The rollouts' name, or the teacher's."""
    base: str
    """seg_id of the rollouts that were scored; empty for rollouts."""
    unit: Mapping[str, Any]
    counts: Mapping[str, int]
    profile: str
    layout: str
    files: Mapping[str, tuple[int, str]]
    """Relative name -> (bytes, sha256)."""
    lineage: Mapping[str, Any]
    token_digest: str
    """sha256 over tokens and seq_off: what a score segment shares with its base."""
    number: int
    """Of the log record that published it."""

    def __hash__(self) -> int:
        return hash((self.kind, self.seg_id, self.number))

    @property
    def folder(self) -> str:
        """Relative to the store."""
        return f"seg/{self.kind}/{self.seg_id}"


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def token_digest(tokens: Array, seq_off: Array) -> str:
    """sha256 over the little-endian bytes of tokens (uint32), then of seq_off (int64)."""
    return sha256(tokens.astype("<u4").tobytes() + seq_off.astype("<i8").tobytes())


def content_address(manifest: Mapping[str, tuple[int, str]]) -> str:
    """Same bytes, same name."""
    return sha256(canonical({name: digest for name, (_, digest) in manifest.items()}))[7:39]


def dtype_of(spec: schema.Spec, profile: str) -> str:
    return codecs.profile(profile).entry if spec.dtype == schema.ENTRY else spec.dtype


def encode(
    arrays: Mapping[str, Array], *, layout: str, profile: str, attributes: Mapping[str, Any]
) -> dict[str, bytes]:
    """Arrays -> the files of a Zarr v3 group, relative name -> bytes."""
    import zarr
    from zarr.core.buffer import Buffer
    from zarr.storage import MemoryStore

    objects: dict[str, Buffer] = {}
    with codecs.quiet():
        group = zarr.create_group(MemoryStore(objects), zarr_format=3, attributes=dict(attributes))
        for name, spec in schema.specs(layout).items():
            dtype = dtype_of(spec, profile)
            data = arrays[name]
            if data.dtype != np.dtype(dtype) or data.ndim != 1:
                raise TypeError(
                    f"{name}: {data.dtype} of {data.ndim} dimensions, schema says {dtype}"
                )
            chunk, shard = schema.chunk_shape(spec, len(data))
            target = group.create_array(
                name,
                shape=data.shape,
                dtype=dtype,
                chunks=(chunk,),
                shards=(shard,),
                fill_value=0,
                # An all-zero chunk that is left out cannot be told from one that was lost.
                config={"write_empty_chunks": True},
                **codecs.pipeline(dtype),
            )
            if len(data):
                target[:] = data
    return {name: buffer.to_bytes() for name, buffer in objects.items()}


def stage(folder: Path, contents: Mapping[str, bytes]) -> dict[str, tuple[int, str]]:
    """Writes files into a new folder, all flushed to the disk, and returns their manifest."""
    folders = {""}
    for name in contents:
        parts = name.split("/")[:-1]
        folders |= {"/".join(parts[: i + 1]) for i in range(len(parts))}
    for each in sorted(folders):
        files.make_dir(folder / each)
    for name, data in sorted(contents.items()):
        files.write_new(folder / name, data)
    for each in sorted(folders, reverse=True):
        files.fsync_dir(folder / each)
    return {name: (len(data), sha256(data)) for name, data in contents.items()}


def read_files(
    root: Path, folder: str, manifest: Mapping[str, tuple[int, str]], names: Collection[str]
) -> dict[str, bytes]:
    """The named files of a segment, each of the size and digest that the manifest gives.

    Raises IntegrityError with the file's path.
    """
    contents = {}
    for name in sorted(names):
        length, digest = manifest[name]
        path = root / folder / name
        data = files.read(root, f"{folder}/{name}", length)
        if data is None:
            raise IntegrityError(f"{path}: committed, and missing", remedy=RESTORE)
        if len(data) != length:
            raise IntegrityError(
                f"{path}: {len(data)} bytes where {length} were committed", remedy=RESTORE
            )
        if sha256(data) != digest:
            raise IntegrityError(f"{path}: not the bytes that were committed", remedy=RESTORE)
        contents[name] = data
    return contents


def decode(
    where: Path,
    contents: Mapping[str, bytes],
    *,
    layout: str,
    profile: str,
    counts: Mapping[str, int],
    names: Collection[str],
) -> dict[str, Array]:
    """Arrays of the given names from the files of a group. Raises IntegrityError."""
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    buffer = default_buffer_prototype().buffer
    store = MemoryStore({name: buffer.from_bytes(data) for name, data in contents.items()})
    arrays = {}
    for name in names:
        spec = schema.specs(layout)[name]
        dtype, length = dtype_of(spec, profile), spec.length(counts)
        chunk, shard = schema.chunk_shape(spec, length)
        meta = f"{name}/zarr.json"
        fault = codecs.metadata_fault(
            contents[meta], dtype=dtype, length=length, chunk=chunk, shard=shard
        )
        if fault:
            raise IntegrityError(f"{where / meta}: {fault}", remedy=RESTORE)
        try:
            with codecs.quiet():
                data = np.asarray(zarr.open_array(store, path=name, mode="r")[:])
        except Exception as error:  # A decoder that is given strange bytes may raise anything.
            raise IntegrityError(
                f"{where / name / 'c/0'}: does not decode ({error})", remedy=RESTORE
            ) from error
        if data.shape != (length,) or data.dtype != np.dtype(dtype):
            raise IntegrityError(
                f"{where / name}: decodes to {data.dtype} {data.shape}", remedy=RESTORE
            )
        arrays[name] = data
    return arrays


def read(root: Path, segment: Segment, names: Collection[str] | None = None) -> dict[str, Array]:
    """Arrays of a committed segment, whole; all of them, or those named. Raises IntegrityError."""
    wanted = list(schema.specs(segment.layout)) if names is None else list(names)
    needed = (
        segment.files
        if names is None
        else [file for file in segment.files if file.split("/")[0] in wanted]
    )
    contents = read_files(root, segment.folder, segment.files, needed)
    return decode(
        root / segment.folder,
        contents,
        layout=segment.layout,
        profile=segment.profile,
        counts=segment.counts,
        names=wanted,
    )


def check_decodes(
    root: Path,
    folder: str,
    manifest: Mapping[str, tuple[int, str]],
    arrays: Mapping[str, Array],
    *,
    layout: str,
    profile: str,
    counts: Mapping[str, int],
) -> None:
    """Reads a staged group back and compares every value: no fault of a codec is published.

    Raises StoreError.
    """
    contents = read_files(root, folder, manifest, manifest)
    back = decode(
        root / folder, contents, layout=layout, profile=profile, counts=counts, names=list(arrays)
    )
    for name, data in arrays.items():
        if data.tobytes() != back[name].tobytes():
            raise StoreError(
                f"{root / folder / name}: does not decode to what was encoded",
                remedy="check memory, disk, and the versions of zarr, numcodecs and pcodec",
            )
