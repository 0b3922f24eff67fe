"""Decoded units as memory-mapped files: true random access to single sequences.

Segments are compressed in chunks of many thousand positions, so reading one sequence decodes about
a thousand times the bytes it needs. A cache is a folder of plain .npy files on a local disk, larger
than the store, written once per unit and free to delete:

  CACHE/<sha256 of its segments>/<array>.npy, sizes.json

It is derived data on the user's own disk: `verify=False` checks names, types and sizes only,
`verify=True` compares every byte with the digest taken when it was written.
"""

import json
import os
import shutil
import uuid
from pathlib import Path

import numpy as np

from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.models.identity import canonical, digest
from logitcask.engine.store.decoded_unit import DTYPES, DecodedUnit, decode_unit, dtypes_of
from logitcask.engine.store.format.segment import Segment, sha256
from logitcask.engine.store.log.snapshot import ScoreSegments
from logitcask.engine.store.store import Store
from logitcask.engine.types import Array

_LAYOUT = 2
"""Part of the folder's digest: a new meaning of the files gets new folders."""


class UnitCache:
    """Decoded units of any store below one folder; safe for several processes at once."""

    def __init__(self, folder: Path, *, verify: bool = False) -> None:
        self._folder = folder
        self._verify = verify

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
        temporary = folder.with_name(f".{uuid.uuid4().hex}")
        try:
            temporary.mkdir(parents=True)
            sums = {}
            for name, array in unit.arrays.items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
                sums[name] = [len(array), sha256(array.tobytes())]
            (temporary / "sizes.json").write_bytes(canonical(sums))
            # A folder gets its name with all of its files; another process may have been faster.
            os.rename(temporary, folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if folder.is_dir():
                return
            raise StoreError(
                f"cannot write the cache {self._folder}: {error.strerror or error}",
                hint="make room there, give another folder, or train without a cache",
            ) from error

    def _mapped(self, folder: Path, name: str) -> Array:
        path = folder / f"{name}.npy"
        try:
            length, sha = json.loads((folder / "sizes.json").read_bytes())[name]
            array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
            if (array.shape, array.dtype) != ((length,), np.dtype(DTYPES[name])):
                raise ValueError(f"{array.dtype} {array.shape}, not {DTYPES[name]} ({length},)")
            if self._verify and sha256(array.tobytes()) != sha:
                raise ValueError("other bytes than were written")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{path}: a damaged cache ({error})",
                hint=f"remove {folder}; it is made again from the store",
            ) from error
        return array


def read_unit(
    store: Store, rollout: Segment, score_segments: ScoreSegments, base: ScoreSegments = ()
) -> DecodedUnit:
    """Decode a unit into memory, with the scores of a `base` model if there are any.

    Raises IntegrityError.
    """
    rollouts = store.read_rollouts(rollout)
    base_scores = store.read_scores(base, base=rollouts) if base else None
    scores = store.read_scores(score_segments, base=rollouts)
    return decode_unit(rollout.seg_id, rollouts, scores, base_scores)
