"""What the store's benchmarks share: the made-up rows, where they work, sealing a unit."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from results import ROOT
from score_rows import Packs, synthetic

from logitcask.engine.store import Segment, Store
from logitcask.engine.store.format import segment as segments
from logitcask.engine.types import Rollouts, Scores

WORK = ROOT / "build" / "bench_store"
POSITIONS = 262_144
RUNS = 5
LINEAGE = {"set": {"digest": "made up"}, "student": {"root": "made up"}}
SCORE_LINEAGE = {"teacher": {"weights": "made up"}, "role": "teacher", "context": ""}


def bar(text: str, value: float, holds: bool) -> dict[str, Any]:
    return {"bar": text, "value": value, "met": bool(holds)}


def rows() -> Packs:
    """The made-up rows, made once."""
    file = WORK / "rows.npz"
    if not file.exists():
        made = synthetic(POSITIONS)
        WORK.mkdir(parents=True, exist_ok=True)
        np.savez(file, **{name: getattr(made, name) for name in Packs.__slots__})
    with np.load(file) as found:
        return Packs(**{name: found[name] for name in Packs.__slots__})


@contextmanager
def fresh(name: str) -> Iterator[Path]:
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def key(*parts: object) -> str:
    return segments.sha256(repr(parts).encode())


def seal_rollouts(store: Store, rollouts: Rollouts, profile: str) -> Segment:
    return store.commit_rollouts(
        rollouts,
        name="main",
        unit_key=key(profile, time.time_ns()),
        unit={"version": 0, "first": 0},
        lineage=LINEAGE,
        profile=profile,
    )


def seal_scores(store: Store, scores: Scores, base: Segment, profile: str) -> Segment:
    return store.commit_scores(
        scores,
        base=base,
        name="teacher",
        unit_key=key("score", profile, time.time_ns()),
        unit={},
        lineage=SCORE_LINEAGE,
        profile=profile,
    )
