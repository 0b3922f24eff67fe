"""Decoded units as memory-mapped files: true random access to single sequences.

Segments are compressed in chunks of many thousand positions, so reading one sequence decodes about
a thousand times the bytes it needs. A cache is a folder of plain .npy files on a local disk, larger
than the store, written once per unit and free to delete:

  CACHE/<sha256 of its segments>/<array>.npy, sizes.json

It is derived data: every byte of a file is compared with the digest taken when it was written, once
per process, when the file is first mapped.
"""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.models.digests import flush
from logitcask.engine.models.identity import canonical, digest
from logitcask.engine.store.decoded_unit import (
    DTYPES,
    DecodedUnit,
    decode_unit,
    dtypes_of,
    has_spans,
)
from logitcask.engine.store.format.entry import Segment, sha256
from logitcask.engine.store.log.snapshot import ScoreSegments
from logitcask.engine.store.spans.unit import decode_span_unit
from logitcask.engine.store.store import Store
from logitcask.engine.store.temporary import temporary_in
from logitcask.engine.types import Array

_LAYOUT = 2
"""Part of the folder's digest: a new meaning of the files gets new folders."""

_CHECKED: set[tuple[str, int, int, int]] = set()
"""(path, inode, bytes, time of the last change) of files whose digest was right."""


class UnitCache:
    """Decoded units of any store below one folder; safe for several processes at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def unit(
        self,
        store: Store,
        rollout: Segment,
        score_segments: ScoreSegments,
        base: ScoreSegments = (),
    ) -> DecodedUnit:
        """Return a unit, memory-mapped; decode and write it first if it is not cached.

        Raises IntegrityError for a damaged cache, StoreError where it cannot be written.
        """
        ids = [rollout.seg_id, *(each.seg_id for each in score_segments)]
        key = {"layout": _LAYOUT, "segments": ids, "base": [each.seg_id for each in base]}
        folder = self._folder / digest(key)[7:39]
        if not folder.is_dir():
            self._write(folder, read_unit(store, rollout, score_segments, base))
        names = dtypes_of(rollout, score_segments, base)
        return DecodedUnit({name: self._mapped(folder, name) for name in names})

    def _write(self, folder: Path, unit: DecodedUnit) -> None:
        temporary = None
        try:
            temporary = temporary_in(self._folder)
            temporary.mkdir()
            sums = {}
            for name, array in unit.arrays.items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
                sums[name] = [len(array), sha256(array.tobytes())]
            (temporary / "sizes.json").write_bytes(canonical(sums))
            for file in temporary.iterdir():
                flush(file)
            # A folder gets its name with all of its files; another process may have been faster.
            os.rename(temporary, folder)
        except OSError as error:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            if folder.is_dir():
                return
            raise StoreError(
                f"cannot write the cache {self._folder}: {error.strerror or error}",
                hint="make room there, give another folder, or train without a cache",
            ) from error

    def _mapped(self, folder: Path, name: str) -> Array:
        path, dtype = folder / f"{name}.npy", np.dtype(DTYPES[name])
        try:
            length, recorded = json.loads((folder / "sizes.json").read_bytes())[name]
            header = _header(dtype, length)
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if file.read(len(header)) != header:
                    raise ValueError(f"not the header of {length} {dtype}")
                if status.st_size != len(header) + length * dtype.itemsize:
                    raise ValueError(f"{status.st_size} bytes for {length} {dtype}")
                key = str(path), status.st_ino, status.st_size, status.st_mtime_ns
                if key not in _CHECKED:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                    if f"sha256:{found}" != recorded:
                        raise ValueError("other bytes than were written")
                    _CHECKED.add(key)
                return np.memmap(file, dtype, "r", len(header), (length,))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise IntegrityError(
                f"{path}: a damaged cache ({error})",
                hint=f"remove {folder}; it is made again from the store",
            ) from error


def _header(dtype: np.dtype[Any], length: int) -> bytes:
    """Return the first bytes of a .npy file, to compare with those of a file instead of a parse."""
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": (int(length),)}
    )
    return header.getvalue()


def read_unit(
    store: Store, rollout: Segment, score_segments: ScoreSegments, base: ScoreSegments = ()
) -> DecodedUnit:
    """Decode a unit into memory, with the scores of a `base` model if there are any.

    Raises IntegrityError.
    """
    rollouts = store.read_rollouts(rollout)
    if has_spans(score_segments):
        assert not base, "packs refuse a base model with scores of spans"
        spans = store.read_span_scores(score_segments, base=rollouts)
        return decode_span_unit(rollout.seg_id, rollouts, spans)
    base_scores = store.read_scores(base, base=rollouts) if base else None
    scores = store.read_scores(score_segments, base=rollouts)
    return decode_unit(rollout.seg_id, rollouts, scores, base_scores)
