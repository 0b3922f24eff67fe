"""Codec profiles: the rounding and the compression of arrays, with stock codecs of Zarr only.

pcodec comes within 5 % of the order-0 entropy of token ids and finds the structure of descending
float16 rows by itself. It has no 8-bit types and is not in Zarr's core specification; blosc has
them and is. crc32c follows either and is not optional: without it a flipped bit is not noticed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcask.engine.errors import ConfigError
from logitcask.engine.types import Array

PCODEC_LEVEL = 8
BLOSC_LEVEL = 5
LOWEST_HALF = -65000.0
"""Lower finite log-probs are stored as this, for in float16 they would become -inf."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """The precision of entry log-probs and the codec of all arrays."""

    entry: str
    """float16, bfloat16 or float32."""
    codec: str
    """pcodec, or blosc, which every Zarr reader has."""
    rounding: float
    """u: a stored log-prob above LOWEST_HALF is within u |log-prob| + 2^-25 of the true one."""

    @property
    def stored(self) -> str:
        """Return the dtype of the arrays: bfloat16 is stored as its bits, unknown to Zarr."""
        return "uint16" if self.entry == "bfloat16" else self.entry


PROFILES = {
    "default": Profile(entry="float16", codec="pcodec", rounding=2.0**-11),
    "compact": Profile(entry="bfloat16", codec="pcodec", rounding=2.0**-8),
    "interop": Profile(entry="float16", codec="blosc", rounding=2.0**-11),
    "raw32": Profile(entry="float32", codec="pcodec", rounding=0.0),
}


def profile(name: str) -> Profile:
    """Return the profile of a name. Raises ConfigError for an unknown name."""
    if name not in PROFILES:
        raise ConfigError(
            f"unknown codec profile {name!r}", hint=f"use one of: {', '.join(PROFILES)}"
        )
    return PROFILES[name]


def to_entry(values: Array, profile: Profile) -> Array:
    """Round float32 log-probs to the stored dtype, which keeps their order but makes ties."""
    exact = values.astype(np.float32)
    if profile.entry == "float32":
        return exact
    if profile.entry == "bfloat16":
        bits = exact.view(np.uint32)
        # To nearest, ties to even. -inf has no bits to round away.
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    clipped = np.where(np.isneginf(exact), exact, np.maximum(exact, np.float32(LOWEST_HALF)))
    return clipped.astype(np.float16)


def from_entry(stored: Array, profile: Profile) -> Array:
    """Convert stored log-probs to float32."""
    if profile.entry == "bfloat16":
        widened: Array = (stored.astype(np.uint32) << 16).view(np.float32)
        return widened
    return stored.astype(np.float32)


def codec_of(dtype: str, profile: Profile) -> str:
    """Return the codec of an array of this dtype."""
    return "blosc" if dtype == "uint8" else profile.codec


def metadata_of(codec: str, dtype: str) -> list[dict[str, Any]]:
    """Return the codecs of the inner chunks as in an array's metadata."""
    if codec == "pcodec":
        return [{"name": "numcodecs.pcodec", "configuration": {"level": PCODEC_LEVEL}}, _CRC32C]
    size = np.dtype(dtype).itemsize
    blosc = {
        "cname": "zstd",
        "clevel": BLOSC_LEVEL,
        "shuffle": "noshuffle" if size == 1 else "bitshuffle",
        "typesize": size,
        "blocksize": 0,
    }
    bytes_ = {"name": "bytes"} | ({} if size == 1 else {"configuration": {"endian": "little"}})
    return [bytes_, {"name": "blosc", "configuration": blosc}, _CRC32C]


_CRC32C = {"name": "crc32c"}


CODEC_NAMES = {
    "pcodec": ["numcodecs.pcodec", "crc32c"],
    "blosc": ["bytes", "blosc", "crc32c"],
}
"""Codec names of the inner chunks in an array's metadata."""


def compress(codec: str, chunk: Array) -> bytes:
    """Compress one inner chunk."""
    if codec == "pcodec":
        from pcodec import ChunkConfig, standalone

        return bytes(standalone.simple_compress(chunk, ChunkConfig(compression_level=PCODEC_LEVEL)))
    from numcodecs import blosc

    shuffle = blosc.NOSHUFFLE if chunk.itemsize == 1 else blosc.BITSHUFFLE
    # Several threads would write the blocks of a chunk in the order in which they are done.
    before, blosc.use_threads = blosc.use_threads, False
    try:
        return bytes(blosc.compress(chunk, b"zstd", BLOSC_LEVEL, shuffle))
    finally:
        blosc.use_threads = before


def decompress(codec: str, payload: bytes | memoryview, out: Array) -> None:
    """Decompress one inner chunk into `out`, never beyond it. Raises ValueError for other sizes."""
    if codec == "pcodec":
        from pcodec import standalone

        progress = standalone.simple_decompress_into(bytes(payload), out)
        if progress.n_processed != len(out) or not progress.finished:
            raise ValueError(f"a chunk of other than {len(out)} elements")
        return
    from numcodecs import blosc

    # A blosc frame states its decoded and its own bytes: blosc trusts both, and reads beyond the
    # end of a shorter frame.
    if len(payload) < 16 or int.from_bytes(payload[4:8], "little") != out.nbytes:
        raise ValueError(f"a chunk of other than {out.nbytes} bytes")
    if int.from_bytes(payload[12:16], "little") != len(payload):
        raise ValueError(f"a frame of other than its {len(payload)} bytes")
    blosc.decompress(payload, out)
