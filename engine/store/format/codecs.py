"""How arrays become bytes: stock Zarr codecs only, so any Zarr v3 reader that has them will do.

pcodec comes within 5 % of the order-0 entropy of token ids and finds the structure of descending
float16 rows by itself. It has no 8-bit types and is not in Zarr's core specification; blosc has and
is. crc32c stands behind either and is not optional: Zarr's other codecs pass flipped bits on
silently.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcask.engine.errors import ConfigError
from logitcask.engine.store.format.schema import MAX_K
from logitcask.engine.types import Array

PCODEC_LEVEL = 8
BLOSC_LEVEL = 5
LOWEST_HALF = -65000.0
"""Finite log-probs below are stored as this: as float16 they would turn into -inf, 'impossible'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What is given up for size, and to whom the files can be read."""

    entry: str
    """Which numbers entry log-probs are rounded to: float16, bfloat16 or float32."""
    packing: str
    """The codec: pcodec, or blosc, which every Zarr reader has."""
    rounding: float
    """u: a stored log-prob above LOWEST_HALF is within u |log-prob| + SUBNORMAL of the true one."""

    @property
    def stored(self) -> str:
        """dtype of the arrays: bfloat16 is stored as its bits, Zarr has no name for it."""
        return "uint16" if self.entry == "bfloat16" else self.entry

    def kl_bound(self, second_moment: float = math.log(MAX_K) ** 2) -> float:
        """Most that the rounding of a row can cost, in nats: KL(true || stored), both renormalised.

        KL = E[d] + log E[exp(-d)] for errors d of the log-probs, at most E[d^2] / 2 x exp(max |d|),
        and E[d^2] <= u^2 E[(log p)^2]. The default is that of MAX_K equally likely ids.
        """
        spread = math.exp(self.rounding * 2 * math.sqrt(second_moment))
        return self.rounding**2 * second_moment / 2 * spread


SUBNORMAL = 2.0**-25
"""Half of float16's smallest number: its error next to a log-prob of 0."""

PROFILES = {
    "default": Profile(entry="float16", packing="pcodec", rounding=2.0**-11),
    "compact": Profile(entry="bfloat16", packing="pcodec", rounding=2.0**-8),
    "interop": Profile(entry="float16", packing="blosc", rounding=2.0**-11),
    "raw32": Profile(entry="float32", packing="pcodec", rounding=0.0),
}


def profile(name: str) -> Profile:
    """The profile of that name; ConfigError lists the known ones."""
    if name not in PROFILES:
        raise ConfigError(
            f"unknown codec profile {name!r}", hint=f"use one of: {', '.join(PROFILES)}"
        )
    return PROFILES[name]


def to_entry(values: Array, profile: Profile) -> Array:
    """float32 log-probs -> what is stored. Rounding keeps the order but makes ties."""
    exact = values.astype(np.float32)
    if profile.entry == "float32":
        return exact
    if profile.entry == "bfloat16":
        bits = exact.view(np.uint32)
        # To nearest, ties to even. -inf has no bits to round away and stays what it is.
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    clipped = np.where(np.isneginf(exact), exact, np.maximum(exact, np.float32(LOWEST_HALF)))
    return clipped.astype(np.float16)


def from_entry(stored: Array, profile: Profile) -> Array:
    """What is stored -> float32."""
    if profile.entry == "bfloat16":
        widened: Array = (stored.astype(np.uint32) << 16).view(np.float32)
        return widened
    return stored.astype(np.float32)


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the one warning that Zarr gives about codec names outside its core specification."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")
        yield


def packing_of(dtype: str, profile: Profile) -> str:
    """Which codec an array of this dtype is written with."""
    return "blosc" if dtype == "uint8" else profile.packing


def pipeline(dtype: str, packing: str) -> dict[str, Any]:
    """Arguments of zarr's create_array that choose the codecs."""
    # Here and not above: reading a store does not need Zarr.
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
    from zarr.codecs.numcodecs import PCodec

    if packing == "pcodec":
        return {
            "serializer": PCodec(level=PCODEC_LEVEL),
            "compressors": [Crc32cCodec()],
            "filters": None,
        }
    blosc = BloscCodec(
        cname="zstd",
        clevel=BLOSC_LEVEL,
        shuffle="noshuffle" if dtype == "uint8" else "bitshuffle",
        typesize=np.dtype(dtype).itemsize,
    )
    return {"serializer": BytesCodec(), "compressors": [blosc, Crc32cCodec()], "filters": None}


CODEC_NAMES = {
    "pcodec": ["numcodecs.pcodec", "crc32c"],
    "blosc": ["bytes", "blosc", "crc32c"],
}
"""What an array's metadata says of its inner chunks."""


def unpack(packing: str, payload: memoryview, out: Array) -> None:
    """One inner chunk into `out`, which bounds what is decoded. ValueError for any other size."""
    if packing == "pcodec":
        from pcodec import standalone

        progress = standalone.simple_decompress_into(bytes(payload), out)
        if progress.n_processed != len(out) or not progress.finished:
            raise ValueError(f"a chunk of other than {len(out)} elements")
        return
    from numcodecs import blosc

    # A blosc frame says how many bytes it holds, and how many it takes: blosc believes both, and
    # reads beyond the end of a shorter one.
    if len(payload) < 16 or int.from_bytes(payload[4:8], "little") != out.nbytes:
        raise ValueError(f"a chunk of other than {out.nbytes} bytes")
    if int.from_bytes(payload[12:16], "little") != len(payload):
        raise ValueError(f"a frame of other than its {len(payload)} bytes")
    blosc.decompress(payload, out)
