"""Formats of other projects on the same rows: parquet, raw arrays, DistillKit's writer.

DistillKit's own compressor is measured if it can be imported (it is not on the package index: clone
github.com/arcee-ai/DistillKit and put the clone on PYTHONPATH); its bytes follow from its formulas.
Megatron-LM and MaxText are computed from their formats: fp16 log-probs with 17-bit ids in 5 bytes
an entry, and a float32 with a varint id in about 7.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from score_rows import V

from logitcask.engine.types import Array, Rollouts, Scores

PARQUET_ROWS = 16
"""Sequences of a row group, which is decoded as a whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A file format of the entries, the scalars and the tokens of a unit."""

    name: str
    write: Callable[[Path, Rollouts, Scores], None]
    """Writes to a new folder, flushed to the disk."""
    read: Callable[[Path], dict[str, Array]]
    """Returns all arrays, flat."""
    sequence: Callable[[Path], Callable[[int], dict[str, Array]]]
    """Opens the folder; returns a reader of single sequences."""


def _flat(rollouts: Rollouts, scores: Scores) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """Return arrays of positions, arrays of entries, and the entry offset of each sequence."""
    of_rows = {
        "tokens": rollouts.tokens,
        "b_lp": rollouts.b_lp,
        "t_lp": scores.lp,
        "ent": scores.entropy,
        "log_tail": scores.log_tail,
        "cnt": scores.cnt,
    }
    of_entries = {"ids": scores.ids, "lp": scores.entry_lp.astype(np.float16)}
    ends = np.concatenate([[0], np.cumsum(scores.cnt, dtype=np.int64)])
    return of_rows, of_entries, ends[rollouts.seq_off]


def _write_parquet(folder: Path, rollouts: Rollouts, scores: Scores) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    of_rows, of_entries, entry_off = _flat(rollouts, scores)
    columns = {
        name: pa.LargeListArray.from_arrays(pa.array(off), pa.array(array))
        for arrays, off in ((of_rows, rollouts.seq_off), (of_entries, entry_off))
        for name, array in arrays.items()
    }
    file = folder / "unit.parquet"
    pq.write_table(
        pa.table(columns),
        file,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        row_group_size=PARQUET_ROWS,
        write_page_checksum=True,
    )
    _flush(file)


def _parquet(folder: Path) -> Any:
    import pyarrow.parquet as pq

    # Ours compares checksums, too.
    return pq.ParquetFile(folder / "unit.parquet", page_checksum_verification=True)


def _read_parquet(folder: Path) -> dict[str, Array]:
    table = _parquet(folder).read(use_threads=False)
    return {name: table[name].combine_chunks().values.to_numpy() for name in table.column_names}


def _parquet_sequences(folder: Path) -> Callable[[int], dict[str, Array]]:
    file = _parquet(folder)

    def sequence(index: int) -> dict[str, Array]:
        group = file.read_row_group(index // PARQUET_ROWS, use_threads=False)
        at = index % PARQUET_ROWS
        return {name: group[name][at].values.to_numpy() for name in group.column_names}

    return sequence


def _write_npy(folder: Path, rollouts: Rollouts, scores: Scores) -> None:
    of_rows, of_entries, entry_off = _flat(rollouts, scores)
    offsets = {"seq_off": rollouts.seq_off, "entry_off": entry_off}
    for name, array in {**of_rows, **of_entries, **offsets}.items():
        np.save(folder / f"{name}.npy", array)
        _flush(folder / f"{name}.npy")


def _read_npy(folder: Path) -> dict[str, Array]:
    return {file.stem: np.load(file) for file in folder.glob("*.npy")}


def _npy_sequences(folder: Path) -> Callable[[int], dict[str, Array]]:
    arrays = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
    offsets = {
        name: arrays["entry_off" if name in ("ids", "lp") else "seq_off"]
        for name in arrays
        if not name.endswith("_off")
    }

    def sequence(index: int) -> dict[str, Array]:
        return {
            name: np.array(arrays[name][off[index] : off[index + 1]])
            for name, off in offsets.items()
        }

    return sequence


def _flush(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


FORMATS = [
    Format(
        name="parquet",
        write=_write_parquet,
        read=_read_parquet,
        sequence=_parquet_sequences,
    ),
    Format(name="raw npy", write=_write_npy, read=_read_npy, sequence=_npy_sequences),
]


# Formats with a fixed K.


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedRow:
    """A format with K entries in every row, and their bytes."""

    name: str
    k: int
    bytes: float
    note: str = ""


def distillkit_bytes(k: int, exact: int, terms: int, vocabulary: int = V) -> float:
    """Return bytes: bf16 for `exact` values, float32 for a term, ceil(log2 V) bits for an id."""
    return 2 * exact + 4 * terms + math.ceil(k * math.ceil(math.log2(vocabulary)) / 8)


FIXED = [
    FixedRow(name="DistillKit recommended", k=128, bytes=distillkit_bytes(128, 16, 6)),
    FixedRow(name="DistillKit budget", k=50, bytes=distillkit_bytes(50, 1, 3)),
    FixedRow(name="Megatron-LM K=128", k=128, bytes=5 * 128, note="ids below 131,072 only"),
    FixedRow(name="MaxText K=128", k=128, bytes=7 * 128),
    FixedRow(name="fixed K=64, float16", k=64, bytes=6 * 64, note="unpacked"),
]
"""Values of the first two are a fit of the log-probs, those of the others rounded."""

DISTILLKIT = {
    "DistillKit recommended": {
        "k": 128,
        "exact_k": 16,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    },
    "DistillKit budget": {
        "k": 50,
        "exact_k": 1,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1, "sqrt"],
    },
}
"""The two configurations of its README."""


def distillkit_values(name: str, ids: Array, lp: Array) -> tuple[Array, float] | None:
    """Return log-probs [P, K] from its own writer and reader, and bytes; None without it."""
    if name not in DISTILLKIT or find_spec("distillkit") is None:
        return None
    import torch
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    config = DistributionQuantizationConfig(
        d=V,
        term_dtype="float32",
        residual_bins=[],
        delta_encoding=False,
        error_diffusion=False,
        **DISTILLKIT[name],
    )
    compressor = LogprobCompressor(config)
    k = DISTILLKIT[name]["k"]
    parts, size = [], 0
    for first in range(0, len(lp), 4096):
        part = slice(first, first + 4096)
        packed = compressor.compress_from_sparse(
            torch.from_numpy(ids[part, :k].astype(np.int64)), torch.from_numpy(lp[part, :k])
        )
        size += sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
        parts.append(compressor.decompress_to_sparse(packed)[1].float().numpy())
    return np.concatenate(parts), size / len(lp)
