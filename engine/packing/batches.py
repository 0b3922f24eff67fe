"""Packs of a snapshot: the input of a training step.

Packs of a plan are made in a thread before they are read. While those of one window are read, the
units of the next are decoded, so two windows are in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from logitcask.engine.config.teacher import TeacherMix
from logitcask.engine.packing.plan import WINDOW_BYTES, PackPlan
from logitcask.engine.packing.source import Pack, PackSource
from logitcask.engine.packing.teachers import NO_MIX
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.store.cache import UnitCache


class Packs(Protocol):
    """Packs of a run: those of a plan, or those of a loop that makes them just in time."""

    def prepare(self, step: int) -> Sequence[str]:
        """Prepare the packs of optimizer update `step` (from 0), once, before they are read.

        Return the segments that were sampled again for them, by seg_id.
        """

    def pack(self, index: int) -> Pack:
        """Return pack `index` of the run; the processes share the indices of an update."""

    def prefetch(self, indices: Iterable[int]) -> None:
        """Announce the next packs to be read, to be made in the meantime."""


class PlannedPacks:
    """`Packs` of a plan, all from the store. Also a map-style dataset of Pack."""

    def __init__(self, plan: PackPlan, source: PackSource) -> None:
        self.plan = plan
        self._source = source
        self._window = -1
        self._prefetcher = Prefetcher(self._make)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Pack:
        if not 0 <= index < len(self.plan):
            raise IndexError(index)
        return self.pack(index)

    def prepare(self, step: int) -> Sequence[str]:
        """Do nothing: all packs are in the store."""
        return ()

    def pack(self, index: int) -> Pack:
        return self._prefetcher.pack(index)

    def prefetch(self, indices: Iterable[int]) -> None:
        self._prefetcher.prefetch(indices)

    def _make(self, index: int) -> Pack:
        window = self.plan.window(index)
        if window != self._window:
            self._window = window
            for each in self.plan.windows[window : window + 2]:
                self._source.decode_ahead(each.ordinals)
        return self._source.pack(self.plan.pack(index))


class Prefetcher:
    """A thread that makes packs before they are read."""

    def __init__(self, make: Callable[[int], Pack]) -> None:
        self.__setstate__({"_make": make})

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._make: Callable[[int], Pack] = state["_make"]
        self._futures: dict[int, Future[Pack]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def prefetch(self, indices: Iterable[int]) -> None:
        """Make these packs, and discard earlier ones that were not read."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "logitcask-packs")
        for future in self._futures.values():
            future.cancel()
        self._futures = {index: self._thread.submit(self._make, index) for index in indices}

    def pack(self, index: int) -> Pack:
        future = self._futures.pop(index, None)
        return self._make(index) if future is None else future.result()


def planned(
    store: Store,
    *,
    snapshot: Snapshot,
    rollouts: str,
    teacher: str,
    teacher_field: str | None = None,
    mix: TeacherMix = NO_MIX,
    base: str | None = None,
    partial: bool = False,
    pack_length: int | None = None,
    seed: int = 0,
    epochs: int = 1,
    window_bytes: int = WINDOW_BYTES,
    cache: str | Path | None = None,
) -> PlannedPacks:
    """Return the packs of `epochs` shuffled passes over the data of a snapshot.

    The result is a sequence, and a dataset for a torch DataLoader (`batch_size=None`, workers by
    `spawn`). The order depends on snapshot, names, seed, epochs, pack_length and window_bytes
    alone. teacher: a name of scores, or `value=name,value=name` with the values of the prompts' key
    `teacher_field`. mix: of several teachers, see teachers.py. base: name of the scores of the
    teacher's base model, for objectives that need them. partial: use the scored units although
    others are missing. window_bytes: limit of the units decoded together. pack_length: tokens of a
    pack at most; None = default_pack_length. cache: a folder on a local disk for decoded units.

    Raises StoreError if the names hold nothing, IncompleteError if units are missing and `partial`
    is False, ConfigError for a sequence longer than pack_length.
    """
    source = PackSource(
        store,
        snapshot,
        rollouts,
        teacher,
        teacher_field=teacher_field,
        mix=mix,
        base=base,
        partial=partial,
        memory_bytes=window_bytes,
        cache=None if cache is None else UnitCache(Path(cache)),
    )
    plan = source.plan(seed=seed, epochs=epochs, pack_length=pack_length, window_bytes=window_bytes)
    return PlannedPacks(plan, source)


def batches(
    store: Store,
    *,
    snapshot: Snapshot,
    rollouts: str,
    teacher: str,
    rank: int = 0,
    world: int = 1,
    teacher_field: str | None = None,
    mix: TeacherMix = NO_MIX,
    base: str | None = None,
    partial: bool = False,
    pack_length: int | None = None,
    seed: int = 0,
    epochs: int = 1,
    window_bytes: int = WINDOW_BYTES,
    cache: str | Path | None = None,
) -> Iterator[Pack]:
    """Yield the packs of one process of `world`, for your own training loop.

    The other arguments and the errors are those of `planned`. All processes get the same number:
    packs after the last are empty.
    """
    packs = planned(
        store,
        snapshot=snapshot,
        rollouts=rollouts,
        teacher=teacher,
        teacher_field=teacher_field,
        mix=mix,
        base=base,
        partial=partial,
        pack_length=pack_length,
        seed=seed,
        epochs=epochs,
        window_bytes=window_bytes,
        cache=cache,
    )
    indices = range(rank, -(-len(packs) // world) * world, world)
    for index in indices:
        pack = packs.pack(index)
        packs.prefetch([index + world] if index + world in indices else [])
        yield pack
