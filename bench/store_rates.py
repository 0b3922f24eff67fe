"""Commits, whole segments and single sequences, compared with parquet and raw arrays."""

import resource
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import store_peers as peers
from score_rows import kept_mask, rollouts_of, scores_of, student_of
from store_common import POSITIONS, RUNS, bar, fresh, rows, seal_rollouts, seal_scores

from logitcask.engine.store import ScoreSegments, Segment, Store, open_store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.store.format import schema
from logitcask.engine.types import Array


def rates() -> dict[str, Any]:
    """Measure commits and reads of whole segments."""
    made = rows()
    rollouts, scores = rollouts_of(made), scores_of(made, kept_mask(made, 0.999, 1, 64))
    student = student_of(made, 1.0)
    lists = student[0]
    with_lists = rollouts_of(made, student)
    once = scores_of(made, kept_mask(made, 0.999, 16, 64), lists)
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    size: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        start, begun = time.perf_counter(), cpu_seconds()
        result = work(*arguments, **options)
        wall.setdefault(name, []).append(time.perf_counter() - start)
        cpu.setdefault(name, []).append(cpu_seconds() - begun)
        return result

    with fresh("rates") as folder:
        for run in range(RUNS):
            store = open_store(folder / f"ours-{run}", create=True)
            base = timed("seal rollout whole", seal_rollouts, store, rollouts, "default")
            scored = timed("seal score whole", seal_scores, store, scores, base, "default")
            full = timed("seal rollout once", seal_rollouts, store, with_lists, "default")
            both = timed("seal score once", seal_scores, store, once, full, "default")
            known = replace(rollouts, segment=base.seg_id)
            timed("read score whole", store.read_scores, (scored,), base=known)
            known = replace(with_lists, segment=full.seg_id)
            timed("read score once", store.read_scores, (both,), base=known)
            timed("read rollout once", store.read_rollouts, full)
            size["ours"] = (base.size + scored.size) / POSITIONS
            for each in peers.FORMATS:
                place = folder / f"{each.name}-{run}"
                place.mkdir()
                timed(f"write {each.name}", each.write, place, rollouts, scores)
                timed(f"read {each.name}", each.read, place)
                size[each.name] = sum(f.stat().st_size for f in place.iterdir()) / POSITIONS
            zarr_seconds = read_by_zarr(store, scored, timed)
            shutil.rmtree(folder / f"ours-{run}")
    median = {name: statistics.median(times) for name, times in cpu.items()}
    seconds = {name: statistics.median(times) for name, times in wall.items()}
    entries = {
        "whole": len(scores.ids),
        "once": int(both.counts["E"] + both.counts["S"]),
    }
    rate = {name: n / median[f"read score {name}"] / 1e6 for name, n in entries.items()}
    # Parquet keeps the scalars of both segments in one file.
    ours = POSITIONS / median["read score whole"]
    parquet = POSITIONS / median["read parquet"]
    for name in sorted(median):
        print(f"{name:<24} {median[name]:.3f} CPU-s  {seconds[name]:.3f} s")
    return {
        "positions": POSITIONS,
        "runs": RUNS,
        "cpu_seconds": median,
        "wall_seconds": seconds,
        "bytes": size,
        "entries": entries,
        "million_entries_per_core_second": rate,
        "zarr": zarr_seconds,
        "bars": [
            bar("whole: million entries decoded a core-second >= 40", rate["whole"],
                rate["whole"] >= 40),
            bar("once: million entries decoded a core-second >= 40", rate["once"],
                rate["once"] >= 40),
            bar("whole: positions a core-second over parquet's >= 1.5", ours / parquet,
                ours >= 1.5 * parquet),
            bar("sealing 262,144 positions, score, layout once, seconds <= 2",
                seconds["seal score once"], seconds["seal score once"] <= 2),
            bar("sealing 262,144 positions, rollouts with lists, seconds <= 2",
                seconds["seal rollout once"], seconds["seal rollout once"] <= 2),
        ],
    }  # fmt: skip


def read_by_zarr(store: Store, scored: Segment, timed: Callable[..., Any]) -> list[str]:
    """Time reads of the segment by Zarr, and by its zarrs pipeline if that is installed.

    Neither compares digests. Returns the names of the pipelines.
    """
    from importlib.util import find_spec

    import zarr

    pipelines = {"zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
    if find_spec("zarrs"):
        pipelines["zarrs"] = "zarrs.ZarrsCodecPipeline"
    for name, path in pipelines.items():
        with warnings.catch_warnings(), zarr.config.set({"codec_pipeline.path": path}):
            warnings.simplefilter("ignore")  # of codecs beyond Zarr's core specification
            packed = zarr.storage.ZipStore(store.storage.where(scored.path), mode="r")
            group = zarr.open_group(packed, mode="r")
            arrays = [group[each] for each in schema.specs(scored.layout)]
            timed(f"read {name}", read_arrays, arrays)
    return list(pipelines)


def read_arrays(arrays: list[Any]) -> list[Array]:
    """Return the contents of Zarr arrays."""
    return [array[:] for array in arrays]


def cpu_seconds() -> float:
    """Return the CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def random() -> dict[str, Any]:
    """Measure reads of single sequences in random order."""
    made = rows()
    rollouts, scores = rollouts_of(made), scores_of(made, kept_mask(made, 0.999, 1, 64))
    rng = np.random.default_rng(0)
    order = rng.integers(0, len(made.lengths), 4000).tolist()
    per_second: dict[str, list[float]] = {}
    with fresh("random") as folder:
        student = student_of(made, 1.0)
        store = open_store(folder / "ours", create=True)
        base = seal_rollouts(store, rollouts_of(made, student), "default")
        masked = scores_of(made, kept_mask(made, 0.999, 16, 64), student[0])
        segments: ScoreSegments = (seal_scores(store, masked, base, "default"),)
        cache = UnitCache(folder / "cache")
        made_s = time.perf_counter()
        cache.unit(store, base, segments)
        made_s = time.perf_counter() - made_s
        cached = sum(f.stat().st_size for f in (folder / "cache").rglob("*.npy")) / POSITIONS
        readers: dict[str, Callable[[int], Any]] = {
            "ours, cached": cache.unit(store, base, segments).sequence
        }
        for each in peers.FORMATS:
            place = folder / each.name
            place.mkdir()
            each.write(place, rollouts, scores)
            readers[each.name] = each.sequence(place)
        for _ in range(RUNS):
            for name, reader in readers.items():
                some = order if name != "parquet" else order[:200]
                begun = cpu_seconds()
                for index in some:
                    touch(reader(index))
                per_second.setdefault(name, []).append(len(some) / (cpu_seconds() - begun))
    found = {name: statistics.median(values) for name, values in per_second.items()}
    for name, value in found.items():
        print(f"{name:<16} {value:,.0f} sequences a CPU-second")
    return {
        "sequences": len(made.lengths),
        "sequences_per_core_second": found,
        "cache_bytes": cached,
        "cache_seconds": made_s,
    }


def touch(sequence: dict[str, Array]) -> None:
    """Read the arrays, which a mapped file loads at the first access."""
    for array in sequence.values():
        array.copy()
