"""How arrays become bytes: stock Zarr codecs only, so any Zarr v3 reader with numcodecs will do.

pcodec comes within 5 % of the order-0 entropy of token ids and finds the structure of descending
float16 rows by itself; it has no 8-bit types, so those go through zstd. crc32c stands behind both
and is not optional: Zarr's other codecs pass flipped bits on silently.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcask.engine.errors import ConfigError
from logitcask.engine.types import Array

PCODEC_LEVEL = 8
ZSTD_LEVEL = 3
LOWEST_HALF = -65000.0
"""Finite log-probs below are stored as this: as float16 they would turn into -inf, 'impossible'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What is given up for size."""

    entry: str
    """dtype of stored entry log-probs."""


PROFILES = {
    "default": Profile(entry="float16"),  # |error| <= 2^-11 |lp|: KL below 1e-6 nats on average
    "raw32": Profile(entry="float32"),  # exact
}


def profile(name: str) -> Profile:
    """The profile of that name; ConfigError lists the known ones."""
    if name not in PROFILES:
        raise ConfigError(
            f"unknown codec profile {name!r}", remedy=f"use one of: {', '.join(PROFILES)}"
        )
    return PROFILES[name]


def to_entry(values: Array, dtype: str) -> Array:
    """float32 log-probs -> the stored dtype. Rounding keeps the order but makes ties."""
    if dtype == "float32":
        return values.astype(np.float32)
    clipped = np.where(np.isneginf(values), values, np.maximum(values, np.float32(LOWEST_HALF)))
    return clipped.astype(np.float16)


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the one warning that Zarr gives about codec names outside its core specification."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")
        yield


def pipeline(dtype: str) -> dict[str, Any]:
    """Arguments of zarr's create_array that choose the codecs for a dtype."""
    # Here and not above: opening a store and asking what it holds does not need Zarr.
    from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
    from zarr.codecs.numcodecs import PCodec

    if dtype == "uint8":
        compressors = [ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()]
        return {"serializer": BytesCodec(), "compressors": compressors, "filters": None}
    return {
        "serializer": PCodec(level=PCODEC_LEVEL),
        "compressors": [Crc32cCodec()],
        "filters": None,
    }


def metadata_fault(raw: bytes, *, dtype: str, length: int, chunk: int, shard: int) -> str:
    """What is wrong with an array's zarr.json, or ''. Looked at before the array is decoded.

    A few bytes of metadata can ask for gigabytes, so the shape must be the one of the record.
    """
    try:
        meta = json.loads(raw)
        grid = meta["chunk_grid"]["configuration"]["chunk_shape"]
        (sharding,) = meta["codecs"]
        inner = sharding["configuration"]
        codecs = [codec["name"] for codec in inner["codecs"]]
        index = [codec["name"] for codec in inner["index_codecs"]]
        found = {
            "zarr_format": meta["zarr_format"],
            "node_type": meta["node_type"],
            "data_type": meta["data_type"],
            "shape": meta["shape"],
            "chunk_grid": [meta["chunk_grid"]["name"], grid],
            "chunk_shape": inner["chunk_shape"],
            "codecs": [sharding["name"], codecs, index],
        }
    except (ValueError, KeyError, TypeError) as error:
        return f"not the metadata of a sharded array ({type(error).__name__}: {error})"
    body = ["bytes", "zstd", "crc32c"] if dtype == "uint8" else ["numcodecs.pcodec", "crc32c"]
    want = {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": dtype,
        "shape": [length],
        "chunk_grid": ["regular", [shard]],
        "chunk_shape": [chunk],
        "codecs": ["sharding_indexed", body, ["bytes", "crc32c"]],
    }
    for key, value in want.items():
        if found[key] != value:
            return f"{key} is {found[key]!r}, expected {value!r}"
    return ""
