"""Decoded units as files that are mapped into memory: true random access to single sequences.

Segments are compressed in chunks of many thousand positions, so reading one sequence decodes some
thousand times what it needs. A cache is a folder of plain .npy files on a local disk, larger than
the store, made once a unit and free to delete:

  CACHE/<sha256 of the segments it is made from>/<array>.npy, sizes.json

It is derived data on the user's own disk: `verify=False` trusts it but for names, types and sizes;
`verify=True` compares every byte with the digest that was taken when it was made.
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
"""Goes into the name: another meaning of the files makes another folder."""


class UnitCache:
    """Units of any store, kept decoded below one folder; safe for several processes at once."""

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
        """The unit, mapped; it is decoded and written first if the cache has not got it.

        Raises IntegrityError for a damaged cache, StoreError where it cannot be written.
        """
        place = self._folder / _name(rollout, score_segments, base)
        if not place.is_dir():
            self._write(place, read_unit(store, rollout, score_segments, base))
        names = dtypes_of(rollout, score_segments, base)
        return DecodedUnit({name: self._mapped(place, name) for name in names})

    def _write(self, place: Path, unit: DecodedUnit) -> None:
        temporary = place.with_name(f".{uuid.uuid4().hex}")
        try:
            temporary.mkdir(parents=True)
            sums = {}
            for name, array in unit.arrays.items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
                sums[name] = [len(array), sha256(array.tobytes())]
            (temporary / "sizes.json").write_bytes(canonical(sums))
            # A folder gets its name with all of its files; another process may have been faster.
            os.rename(temporary, place)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if place.is_dir():
                return
            raise StoreError(
                f"cannot write the cache {self._folder}: {error.strerror or error}",
                hint="make room there, give another folder, or train without a cache",
            ) from error

    def _mapped(self, place: Path, name: str) -> Array:
        path = place / f"{name}.npy"

        def checked() -> Array:
            length, sha = json.loads((place / "sizes.json").read_bytes())[name]
            array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
            if (array.shape, array.dtype) != ((length,), np.dtype(DTYPES[name])):
                raise ValueError(f"{array.dtype} {array.shape}, not {DTYPES[name]} ({length},)")
            if self._verify and sha256(array.tobytes()) != sha:
                raise ValueError("not the bytes that were written")
            return array

        try:
            return checked()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{path}: a damaged cache ({error})",
                hint=f"remove {place}; it is made again from the store",
            ) from error


def read_unit(
    store: Store, rollout: Segment, score_segments: ScoreSegments, base: ScoreSegments = ()
) -> DecodedUnit:
    """The unit, decoded into memory, with the scores of a `base` model if there are any. Raises
    IntegrityError.
    """
    rollouts = store.read_rollouts(rollout)
    of_base = store.read_scores(base, base=rollouts) if base else None
    return decode_unit(
        rollout.seg_id, rollouts, store.read_scores(score_segments, base=rollouts), of_base
    )


def _name(rollout: Segment, score_segments: ScoreSegments, base: ScoreSegments) -> str:
    made_from = [rollout.seg_id, *(each.seg_id for each in score_segments)]
    of_base = [each.seg_id for each in base]
    return digest({"layout": _LAYOUT, "segments": made_from, "base": of_base})[7:39]
