"""Pinned store -> packed rows: what a training step reads.

Rows of a plan are made in a thread before they are asked for. While those of one window are read,
the units of the next are decoded, so two windows are in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from logitcask.engine.packing.plan import WINDOW_BYTES, PackPlan, PlanKey, make_plan
from logitcask.engine.packing.source import Pack, PackSource
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.types import PACK_LENGTH


class Packs(Protocol):
    """Where a trainer gets its rows from: a plan, or a loop that makes them just in time."""

    def prepare(self, step: int) -> None:
        """Called once before the rows of optimizer update `step` (from 0) are read; may wait."""

    def row(self, index: int) -> Pack:
        """Row `index` of the run; an update reads consecutive indices, split over the processes."""

    def expect(self, indices: Iterable[int]) -> None:
        """These rows will be asked for next: they may be made meanwhile."""


class PlannedPacks:
    """`Packs` of a plan: everything is in the store. Also a map-style dataset of PackedRow."""

    def __init__(self, plan: PackPlan, source: PackSource) -> None:
        self.plan = plan
        self._source = source
        self._window = -1
        self._ahead = Ahead(self._make)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Pack:
        if not 0 <= index < len(self.plan):
            raise IndexError(index)
        return self.row(index)

    def prepare(self, step: int) -> None:
        """All rows exist before training starts."""

    def row(self, index: int) -> Pack:
        return self._ahead.row(index)

    def expect(self, indices: Iterable[int]) -> None:
        self._ahead.expect(indices)

    def _make(self, index: int) -> Pack:
        window = self.plan.window(index)
        if window != self._window:
            self._window = window
            for coming in self.plan.windows[window : window + 2]:
                self._source.decode_ahead(coming.ordinals)
        return self._source.row(self.plan.row(index))


class Ahead:
    """Makes rows in a thread before they are asked for."""

    def __init__(self, make: Callable[[int], Pack]) -> None:
        self._make = make
        self._start()

    def _start(self) -> None:
        self._coming: dict[int, Future[Pack]] = {}
        self._maker: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def expect(self, indices: Iterable[int]) -> None:
        """What was expected before and never asked for is forgotten."""
        if self._maker is None:
            self._maker = ThreadPoolExecutor(1, "logitcask-rows")
        for forgotten in self._coming.values():
            forgotten.cancel()
        self._coming = {index: self._maker.submit(self._make, index) for index in indices}

    def row(self, index: int) -> Pack:
        coming = self._coming.pop(index, None)
        return self._make(index) if coming is None else coming.result()


def planned(
    store: Store,
    *,
    snapshot: Snapshot,
    rollouts: str,
    teacher: str,
    base: str | None = None,
    partial: bool = False,
    pack_length: int = PACK_LENGTH,
    seed: int = 0,
    epochs: int = 1,
    window_bytes: int = WINDOW_BYTES,
    cache: str | Path | None = None,
) -> PlannedPacks:
    """The packed rows of pinned data, `epochs` times through it in shuffled order: a dataset for a
    torch DataLoader (`batch_size=None`, workers by `spawn`), or a sequence to index.

    The order depends on snapshot, names, seed, epochs, pack_length and window_bytes alone.
    base: scores of the model that the teacher was made from, for objectives that look there.
    partial: what is scored, although units are missing. window_bytes: of units that are decoded
    together, which bounds memory. cache: a folder on a local disk for decoded units.

    Raises StoreError if the names hold nothing, IncompleteError if units are missing and `partial`
    does not allow that, ConfigError for a sequence longer than pack_length.
    """
    source = PackSource(
        store,
        snapshot,
        rollouts,
        teacher,
        base=base,
        partial=partial,
        memory_bytes=window_bytes,
        cache=None if cache is None else UnitCache(Path(cache)),
    )
    key = PlanKey(
        snapshot=snapshot.number,
        snapshot_sha256=snapshot.sha256,
        rollouts=rollouts,
        teacher=teacher,
        seed=seed,
        epochs=epochs,
        pack_length=pack_length,
        window_bytes=window_bytes,
    )
    return PlannedPacks(make_plan(key, source.lengths()), source)


def batches(
    store: Store,
    *,
    snapshot: Snapshot,
    rollouts: str,
    teacher: str,
    rank: int = 0,
    world: int = 1,
    base: str | None = None,
    partial: bool = False,
    pack_length: int = PACK_LENGTH,
    seed: int = 0,
    epochs: int = 1,
    window_bytes: int = WINDOW_BYTES,
    cache: str | Path | None = None,
) -> Iterator[Pack]:
    """Packed rows for a training loop of one's own; the rest is as of `planned`.

    Of several processes each takes its own (rank of world), all of them equally many: rows beyond
    the last are empty.
    """
    rows = planned(
        store,
        snapshot=snapshot,
        rollouts=rollouts,
        teacher=teacher,
        base=base,
        partial=partial,
        pack_length=pack_length,
        seed=seed,
        epochs=epochs,
        window_bytes=window_bytes,
        cache=cache,
    )
    indices = range(rank, -(-len(rows) // world) * world, world)
    for index in indices:
        row = rows.row(index)
        rows.expect([index + world] if index + world in indices else [])
        yield row
