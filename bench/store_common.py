"""Shared parts of the store's benchmarks: the made-up rows, their folder, and commits."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from results import ROOT
from score_rows import WideRows, synthetic

from logitcask.engine.store import Segment, Store
from logitcask.engine.store.format.entry import sha256
from logitcask.engine.types import Rollouts, Scores

WORK = ROOT / "build" / "bench_store"
POSITIONS = 262_144
RUNS = 5
PROVENANCE = {"set": {"digest": "made up"}, "student": {"base_weights": "made up"}}
SCORE_PROVENANCE = {"teacher": {"weights": "made up"}, "teacher_kind": "teacher", "context": ""}


def bar(text: str, value: float, holds: bool) -> dict[str, Any]:
    """Return the row of a bar."""
    return {"bar": text, "value": value, "met": bool(holds)}


def rows() -> WideRows:
    """Return the made-up rows, made once."""
    file = WORK / "rows.npz"
    if not file.exists():
        made = synthetic(POSITIONS)
        WORK.mkdir(parents=True, exist_ok=True)
        np.savez(file, **{name: getattr(made, name) for name in WideRows.__slots__})
    with np.load(file) as found:
        return WideRows(**{name: found[name] for name in WideRows.__slots__})


@contextmanager
def fresh(name: str) -> Iterator[Path]:
    """Yield an empty folder, and delete it afterwards."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def key(*parts: object) -> str:
    """Return the unit key of some parts."""
    return sha256(repr(parts).encode())


def seal_rollouts(store: Store, rollouts: Rollouts, profile: str) -> Segment:
    """Commit rollouts as a new unit."""
    return store.commit_rollouts(
        rollouts,
        name="main",
        unit_key=key(profile, time.time_ns()),
        unit={"version": 0, "first": 0},
        provenance=PROVENANCE,
        profile=profile,
    )


def seal_scores(store: Store, scores: Scores, base: Segment, profile: str) -> Segment:
    """Commit scores of `base` as a new unit."""
    return store.commit_scores(
        scores,
        base=base,
        name="teacher",
        unit_key=key("score", profile, time.time_ns()),
        unit={},
        provenance=SCORE_PROVENANCE,
        profile=profile,
    )
