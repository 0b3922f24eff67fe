"""One array <-> its two files in a Zarr v3 group: metadata, and one shard.

Zarr can read and write these files. They are read and written here for three reasons: no chunk can
decode to more than its size (Zarr allocates any memory that a crafted kilobyte claims), a missing
chunk is an error (Zarr returns zeros), and it is several times faster.

A shard is its inner chunks, in any order, then an index at the end: offset and length of each chunk
as little-endian uint64, then the crc32c of the index. A chunk ends in its own crc32c. The last
chunk is padded to full length.

Source: Zarr v3 specification, codecs/sharding-indexed and codecs/crc32c.
"""

import json

import google_crc32c
import numpy as np

import logitcask.engine.store.format.codecs as codecs
from logitcask.engine.models.identity import canonical
from logitcask.engine.types import Array


def metadata(*, dtype: str, codec: str, length: int, chunk: int, shard: int) -> bytes:
    """Return the zarr.json of an array."""
    inner = {
        "chunk_shape": [chunk],
        "codecs": codecs.metadata_of(codec, dtype),
        "index_codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
        "index_location": "end",
    }
    grid = {"name": "regular", "configuration": {"chunk_shape": [shard]}}
    return canonical(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [length],
            "data_type": dtype,
            "chunk_grid": grid,
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0 if dtype.startswith("float") else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
            "attributes": {},
            "storage_transformers": [],
        }
    )


def encode(values: Array, *, dtype: str, codec: str, length: int, chunk: int, shard: int) -> bytes:
    """Encode an array [length], which is not empty, as a shard."""
    padded = np.zeros(shard, np.dtype(dtype).newbyteorder("<"))
    padded[:length] = values
    parts = [_sealed(codecs.compress(codec, part)) for part in padded.reshape(-1, chunk)]
    sizes = np.asarray([len(part) for part in parts], "<u8")
    index = np.stack([np.cumsum(sizes) - sizes, sizes], 1)
    return b"".join([*parts, _sealed(index.astype("<u8").tobytes())])


def metadata_fault(
    raw: bytes, *, dtype: str, codec: str, length: int, chunk: int, shard: int
) -> str:
    """Describe the difference of an array's zarr.json from the record, '' if there is none."""
    try:
        meta = json.loads(raw)
        grid = meta["chunk_grid"]["configuration"]["chunk_shape"]
        (sharding,) = meta["codecs"]
        inner = sharding["configuration"]
        found = {
            "zarr_format": meta["zarr_format"],
            "node_type": meta["node_type"],
            "data_type": meta["data_type"],
            "shape": meta["shape"],
            "chunk_grid": [meta["chunk_grid"]["name"], grid],
            "chunk_shape": inner["chunk_shape"],
            "codecs": [
                sharding["name"],
                [each["name"] for each in inner["codecs"]],
                [each["name"] for each in inner["index_codecs"]],
            ],
            "index_location": inner.get("index_location", "end"),
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"not the metadata of a sharded array ({type(error).__name__}: {error})"
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": dtype,
        "shape": [length],
        "chunk_grid": ["regular", [shard]],
        "chunk_shape": [chunk],
        "codecs": ["sharding_indexed", codecs.CODEC_NAMES[codec], ["bytes", "crc32c"]],
        "index_location": "end",
    }
    for key, value in expected.items():
        if found[key] != value:
            return f"{key} is {found[key]!r}, expected {value!r}"
    return ""


def decode(
    data: bytes | memoryview, *, dtype: str, codec: str, length: int, chunk: int, shard: int
) -> Array:
    """Decode a shard. Raises ValueError, or any error of a decoder on invalid bytes."""
    if not length:
        return np.zeros(0, dtype)
    view, count = memoryview(data), shard // chunk
    index = _checked(view[max(0, len(view) - 16 * count - 4) :])
    if len(index) != 16 * count:
        raise ValueError("the index is cut off")
    end = len(view) - 16 * count - 4
    out = np.zeros(shard, dtype)
    for i, (offset, size) in enumerate(np.frombuffer(index, "<u8").reshape(count, 2).tolist()):
        if offset + size > end:
            raise ValueError(f"chunk {i} is missing or reaches beyond the shard")
        payload = _checked(view[offset : offset + size])
        codecs.decompress(codec, payload, out[i * chunk : (i + 1) * chunk])
    return out[:length]


def _sealed(part: bytes) -> bytes:
    """Return `part` with its crc32c behind it."""
    crc: int = google_crc32c.value(part)
    return part + crc.to_bytes(4, "little")


def _checked(part: memoryview) -> bytes:
    """Return `part` without the crc32c at its end. Raises ValueError where it does not match."""
    if len(part) < 4:
        raise ValueError("too short for a checksum")
    # Neither the checksum nor the codecs take a view; this is the one copy.
    data = bytes(part[:-4])
    if google_crc32c.value(data) != int.from_bytes(part[-4:], "little"):
        raise ValueError("the checksum does not match")
    return data
