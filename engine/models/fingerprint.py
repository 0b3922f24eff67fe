"""How a model behaves: what it says on the rows of a fixed probe. A fingerprint that is compared,
not hashed, for engines do not repeat themselves to the bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcask.engine.errors import StoreError
from logitcask.engine.types import Array

LIKELY = 1e-4
"""Probability: below it engines differ by much, and nobody's loss by anything."""
FLOOR = 1e-4
"""Nats: the tolerance where an engine repeats itself exactly; float32 engines agree to it."""
CEILING = 0.1
"""Nats of spread: half precision has less. Behind more than that another model could hide."""
CONTROL_TIMES = 3.0
"""The tolerance is so many times the control's spread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFingerprint:
    """What a model says on the rows of the probe: a fingerprint that is compared, not hashed."""

    ids: Array
    """[PROBE_ROWS, K] its best ids, best first."""
    lp: Array
    """[PROBE_ROWS, K] their log-probs, nats."""

    def record(self) -> dict[str, Any]:
        """For a segment's lineage."""
        rounded = np.round(self.lp.astype(np.float64), 6)
        return {"ids": self.ids.astype(int).tolist(), "lp": rounded.tolist()}


def behaviour_of(record: Mapping[str, Any]) -> ModelFingerprint:
    """The inverse of `record`. Raises StoreError for what is none."""
    try:
        ids, lp = np.array(record["ids"], np.int64), np.array(record["lp"], np.float64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _unreadable(f"{type(error).__name__}: {error}") from error
    if ids.ndim != 2 or ids.shape != lp.shape or 0 in ids.shape or not (lp <= 1).all():
        raise _unreadable(f"ids of shape {ids.shape} and log-probs of shape {lp.shape}")
    return ModelFingerprint(ids=ids, lp=lp)


def apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float]:
    """(nats that two records differ by, what one model may differ by): three times the larger
    `control_nats` of the two.

    Raises StoreError for what is no record.
    """
    one, other = behaviour_of(a), behaviour_of(b)
    if len(one.ids) != len(other.ids):
        raise _unreadable(f"{len(one.ids)} rows beside {len(other.ids)}")
    spread = max(_spread(a), _spread(b))
    return distance(one, other), max(FLOOR, CONTROL_TIMES * spread)


def _spread(record: Mapping[str, Any]) -> float:
    found = record.get("control_nats", 0.0)
    if not isinstance(found, (int, float)) or not math.isfinite(found):
        raise _unreadable(f"control_nats = {found!r:.80}")
    return min(float(found), CEILING)


def _unreadable(what: str) -> StoreError:
    return StoreError(
        f"lineage.behaviour is no record of how a teacher behaved: {what}",
        hint="record what `ModelFingerprint.record` gives, and control_nats",
    )


def distance(a: ModelFingerprint, b: ModelFingerprint) -> float:
    """Nats that two behaviours differ by at least, at ids that one of them has above LIKELY.

    An id that only one of them names is at most as likely to the other as the last that it names.
    """
    return max(_beyond(a, b), _beyond(b, a))


def _beyond(a: ModelFingerprint, b: ModelFingerprint) -> float:
    same = a.ids[:, :, None] == b.ids[:, None, :]  # [R, Ka, Kb]
    there = same.any(2)
    twin = np.take_along_axis(b.lp, same.argmax(2), 1)
    missed = np.maximum(a.lp - b.lp[:, -1:], 0.0)
    gap = np.where(there, np.abs(a.lp - twin), missed)[a.lp > np.log(LIKELY)]
    return float(gap.max(initial=0.0))
