"""Fingerprint of a model's outputs: top ids and log-probs at the positions of a fixed probe.

Fingerprints are compared within a tolerance and never hashed, because two runs of one inference
engine can differ in the last bits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcask.engine.errors import StoreError
from logitcask.engine.types import Array

MIN_PROB = 1e-4
"""Ids of a lower probability are not compared: engines differ there, without effect on a loss."""
MIN_TOLERANCE = 1e-4
"""Nats; the difference of two float32 engines, even if each repeats its own values exactly."""
MAX_SPREAD = 0.1
"""Nats; half precision has less. A larger tolerance would accept a different model."""
SPREAD_FACTOR = 3.0
"""Tolerance as a multiple of the spread that one engine shows between two runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFingerprint:
    """Top ids and log-probs of a model at the positions of the probe."""

    ids: Array
    """[PROBE_ROWS, K], best first."""
    lp: Array
    """[PROBE_ROWS, K] log-probs, nats."""

    def record(self) -> dict[str, Any]:
        """Return the fingerprint as JSON values, for the provenance of a segment."""
        rounded = np.round(self.lp.astype(np.float64), 6)
        return {"ids": self.ids.astype(int).tolist(), "lp": rounded.tolist()}


def fingerprint_of(record: Mapping[str, Any]) -> ModelFingerprint:
    """Parse a record of `ModelFingerprint.record`. Raises StoreError for a malformed record."""
    try:
        ids, lp = np.array(record["ids"], np.int64), np.array(record["lp"], np.float64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _malformed(f"{type(error).__name__}: {error}") from error
    if ids.ndim != 2 or ids.shape != lp.shape or 0 in ids.shape or not (lp <= 1).all():
        raise _malformed(f"ids of shape {ids.shape} and log-probs of shape {lp.shape}")
    return ModelFingerprint(ids=ids, lp=lp)


def compare_records(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float]:
    """Return (distance of two records, tolerance for one and the same model), both in nats.

    The tolerance is three times the larger `control_nats` of the two records. Raises StoreError
    for a malformed record.
    """
    first, second = fingerprint_of(a), fingerprint_of(b)
    if len(first.ids) != len(second.ids):
        raise _malformed(f"{len(first.ids)} positions and {len(second.ids)} positions")
    spread = max(_spread(a), _spread(b))
    return fingerprint_distance(first, second), max(MIN_TOLERANCE, SPREAD_FACTOR * spread)


def fingerprint_distance(a: ModelFingerprint, b: ModelFingerprint) -> float:
    """Return the largest log-prob difference at ids that either model gives at least MIN_PROB.

    An id in one list only has, in the other model, at most the log-prob of that list's last id.
    """
    return max(_one_sided(a, b), _one_sided(b, a))


def _one_sided(a: ModelFingerprint, b: ModelFingerprint) -> float:
    same = a.ids[:, :, None] == b.ids[:, None, :]  # [R, Ka, Kb]
    matched = same.any(2)
    b_lp = np.take_along_axis(b.lp, same.argmax(2), 1)
    unmatched = np.maximum(a.lp - b.lp[:, -1:], 0.0)
    gap = np.where(matched, np.abs(a.lp - b_lp), unmatched)[a.lp > np.log(MIN_PROB)]
    return float(gap.max(initial=0.0))


def _spread(record: Mapping[str, Any]) -> float:
    nats = record.get("control_nats", 0.0)
    if not isinstance(nats, (int, float)) or not math.isfinite(nats):
        raise _malformed(f"control_nats = {nats!r:.80}")
    return min(float(nats), MAX_SPREAD)


def _malformed(cause: str) -> StoreError:
    return StoreError(
        f"provenance.fingerprint is not a valid fingerprint: {cause}",
        hint="record the result of `ModelFingerprint.record`, and control_nats",
    )
