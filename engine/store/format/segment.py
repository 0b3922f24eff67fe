"""A segment: a plain Zarr v3 group, immutable, named by its content.

To write, Zarr encodes the group in memory, so that sizes, digests and fsync are of the same bytes.
To read, the files of the record are read whole, compared with their digests, their metadata with
the schema, and only then decoded, each array into memory of its own size.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.format.shards as shards
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.storage.base import Storage
from logitcask.engine.types import Array

RESTORE = (
    "restore it from a copy: `logitcask store merge STORE COPY --repair`; or, without a copy, run "
    "`logitcask store delete STORE --segment ID` and make it again"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """The entry of a segment in the log; the defaults are those of one that is not yet encoded."""

    kind: str
    """'rollout' or 'score'."""
    seg_id: str = ""
    """32 hex digits of the digest over its files' digests."""
    generation: int = 0
    """Number of times that gc had removed this content before."""
    unit_key: str
    name: str
    """Of the rollouts or of the teacher."""
    base: str = ""
    """seg_id of the rollouts that were scored; empty for rollouts."""
    extends: str = ""
    """seg_id of the scores that an extension follows; else empty."""
    unit: Mapping[str, Any]
    counts: Mapping[str, int] = field(default_factory=dict)
    profile: str
    layout: str
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Relative name -> (bytes, sha256)."""
    provenance: Mapping[str, Any]
    tokens_sha256: str = ""
    """sha256 over tokens and seq_off, equal in a score segment and its base."""
    number: int = -1
    """Of the log record that published it."""
    seconds: float | None = None
    """Time of the models for it, by the writer's clock; None = not recorded."""

    def __hash__(self) -> int:
        return hash((self.kind, self.seg_id, self.number))

    @property
    def folder(self) -> str:
        """Return the folder, relative to the store."""
        return folder_of(self.kind, self.seg_id, self.generation)

    @property
    def rows(self) -> int:
        """Return the response positions that it holds, or whose scores it adds."""
        return 0 if self.layout == schema.EXTENSION else self.counts.get("R", self.counts["P"])

    @property
    def is_partial(self) -> bool:
        """Return whether it holds the scores of some positions of its base only."""
        return self.layout.endswith(schema.PARTIAL)

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(size for size, _ in self.files.values())


def folder_of(kind: str, seg_id: str, generation: int) -> str:
    return f"seg/{kind}/{seg_id}" + (f".{generation}" if generation else "")


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def tokens_sha256(tokens: Array, seq_off: Array) -> str:
    """Return the sha256 of the little-endian bytes of tokens (uint32), then seq_off (int64)."""
    return sha256(tokens.astype("<u4").tobytes() + seq_off.astype("<i8").tobytes())


def manifest_of(contents: Mapping[str, bytes]) -> dict[str, tuple[int, str]]:
    """Return relative name -> (bytes, sha256)."""
    return {name: (len(data), sha256(data)) for name, data in contents.items()}


def content_address(manifest: Mapping[str, tuple[int, str]]) -> str:
    """Return the seg_id of these files: the same bytes have the same id."""
    return sha256(canonical({name: digest for name, (_, digest) in manifest.items()}))[7:39]


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


def encode(
    arrays: Mapping[str, Array],
    *,
    layout: str,
    profile: codecs.Profile,
    attributes: Mapping[str, Any],
) -> dict[str, bytes]:
    """Encode arrays as the files of a Zarr v3 group, relative name -> bytes."""
    import zarr
    from zarr.core.buffer import Buffer
    from zarr.storage import MemoryStore

    objects: dict[str, Buffer] = {}
    with codecs.hide_zarr_warning():
        group = zarr.create_group(MemoryStore(objects), zarr_format=3, attributes=dict(attributes))
        for name, spec in schema.specs(layout).items():
            dtype = dtype_of(spec, profile)
            data = arrays[name]
            if data.dtype != np.dtype(dtype) or data.ndim != 1:
                raise TypeError(f"{name}: {data.dtype} {data.shape}, expected {dtype}")
            chunk, shard = schema.chunk_shape(spec, len(data))
            target = group.create_array(
                name,
                shape=data.shape,
                dtype=dtype,
                chunks=(chunk,),
                shards=(shard,),
                fill_value=0,
                # A chunk of zeros that is left out looks like a lost one.
                config={"write_empty_chunks": True},
                **codecs.array_options(dtype, codecs.codec_of(dtype, profile)),
            )
            if len(data):
                target[:] = data
    return {name: buffer.to_bytes() for name, buffer in objects.items()}


def check_decodes(
    contents: Mapping[str, bytes],
    arrays: Mapping[str, Array],
    *,
    layout: str,
    profile: codecs.Profile,
    counts: Mapping[str, int],
) -> None:
    """Decode again and compare every value, so that no codec error is published.

    Raises StoreError.
    """
    back = decode("", contents, layout=layout, profile=profile, counts=counts, names=list(arrays))
    for name, data in arrays.items():
        if data.tobytes() != back[name].tobytes():
            raise StoreError(
                f"{name}: does not decode to what was encoded",
                hint="check memory, and the versions of zarr, numcodecs and pcodec",
            )


def read_files(
    storage: Storage, folder: str, manifest: Mapping[str, tuple[int, str]], names: Collection[str]
) -> dict[str, bytes]:
    """Read files of a segment and check their sizes and digests.

    Raises IntegrityError with the file's path.
    """
    found = storage.read_all({f"{folder}/{name}": manifest[name][0] for name in sorted(names)})
    contents = {}
    for path, data in found.items():
        name = path[len(folder) + 1 :]
        length, digest = manifest[name]
        where = storage.where(path)
        if data is None:
            raise IntegrityError(f"{where}: a committed file is missing", hint=RESTORE)
        if len(data) != length:
            raise IntegrityError(
                f"{where}: {len(data)} bytes where {length} were committed", hint=RESTORE
            )
        if sha256(data) != digest:
            raise IntegrityError(f"{where}: other bytes than were committed", hint=RESTORE)
        contents[name] = data
    return contents


def decode(
    where: str,
    contents: Mapping[str, bytes],
    *,
    layout: str,
    profile: codecs.Profile,
    counts: Mapping[str, int],
    names: Collection[str],
) -> dict[str, Array]:
    """Decode the arrays `names` from the files of a group. Raises IntegrityError.

    where: path or URL of the group, for messages.
    """
    arrays = {}
    for name in names:
        spec = schema.specs(layout)[name]
        dtype, length = dtype_of(spec, profile), spec.length(counts)
        chunk, shard = schema.chunk_shape(spec, length)
        shape: Any = {
            "dtype": dtype,
            "codec": codecs.codec_of(dtype, profile),
            "length": length,
            "chunk": chunk,
            "shard": shard,
        }
        fault = shards.metadata_fault(contents[f"{name}/zarr.json"], **shape)
        if fault:
            raise IntegrityError(f"{where}/{name}/zarr.json: {fault}", hint=RESTORE)
        try:
            arrays[name] = shards.decode(contents.get(f"{name}/c/0", b""), **shape)
        except Exception as error:  # A decoder may raise anything on invalid bytes.
            raise IntegrityError(
                f"{where}/{name}/c/0: does not decode ({error})", hint=RESTORE
            ) from error
    return arrays


def read(
    storage: Storage, segment: Segment, names: Collection[str] | None = None
) -> dict[str, Array]:
    """Read all arrays of a committed segment, or those of `names`. Raises IntegrityError."""
    files: Collection[str] = segment.files
    if names is not None:
        files = [file for file in files if file.split("/")[0] in names]
    return decode(
        storage.where(segment.folder),
        read_files(storage, segment.folder, segment.files, files),
        layout=segment.layout,
        profile=codecs.profile(segment.profile),
        counts=segment.counts,
        names=list(schema.specs(segment.layout) if names is None else names),
    )
