"""The store's own commit code on simulated requests and a virtual clock, to check the model."""

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from scale_clock import Clock, SimulatedStorage
from scale_model import Costs, World, claim_s, summary
from store_commits import synthetic_small
from store_common import seal_rollouts

from logitcask.engine.models.identity import digest
from logitcask.engine.store.commit import find_committed, publish_segment
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.log import log as log_module
from logitcask.engine.store.log import pending
from logitcask.engine.store.store import Store, open_on


def run_real(
    workers: int, costs: Costs, *, unit_s: float, warm_s: float, end_s: float
) -> dict[str, Any]:
    """Run workers as `scale_model.simulate` does, but with the store's own code for the log.

    Raises AssertionError where a commit is lost or doubled.
    """
    world = World(
        workers=workers,
        costs=costs,
        rng=random.Random(0),
        unit_s=unit_s,
        warm_s=warm_s,
        end_s=end_s,
    )
    clock = Clock()
    storage = SimulatedStorage(clock, world)
    with storage.free():
        store = open_on(storage, create=True)
        one = seal_rollouts(store, synthetic_small(0), "default")
        stores = [open_on(storage) for _ in range(workers)]
    time = SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep)
    committed: list[str] = []
    works = [_worker(clock, world, each, one, n, committed) for n, each in enumerate(stores)]
    together = storage.together
    with (
        patch.object(pending, "time", time),
        patch.object(pending, "random", world.rng),
        patch.object(pending, "map_concurrently", together),
        patch.object(log_module, "map_concurrently", together),
    ):
        clock.run(works, world.end_s)
    with storage.free():
        snapshot = open_on(storage).head()
    keys = [segment.unit_key for segment in snapshot.segments]
    assert len(keys) == len({*keys}), "a unit is committed twice"
    assert {*committed} <= {*keys}, "a commit is lost"
    world.batches = [len(keys) - 1, *[0] * (snapshot.number - 1)]
    return summary(world, "real")


def _worker(
    clock: Clock, world: World, store: Store, one: Segment, number: int, committed: list[str]
) -> Callable[[], None]:
    """Return the life of one worker: work, commit, claim; as in `scale_model.worker`."""

    def work(seconds: float) -> None:
        world.now = clock.now
        world.count_work(seconds)
        clock.sleep(seconds)

    def live() -> None:
        work(world.rng.uniform(0, world.unit_s))
        unit = 0
        while True:
            begun = clock.now
            new = segment_like(one, number, unit)
            if find_committed(store.log, new) is None:
                publish_segment(store.storage, store.log, b"", new)
            committed.append(new.unit_key)
            if clock.now >= world.warm_s:
                world.latencies.append(clock.now - begun)
            world.now = clock.now
            clock.sleep(claim_s(world, sharded=True))
            for _ in range(2):
                store.log.refresh()
            unit += 1
            work(world.unit_s * world.rng.uniform(0.8, 1.2))

    return live


def segment_like(one: Segment, number: int, unit: int) -> Segment:
    """Return a segment like `one` of another unit, whose object is never read."""
    key = digest([number, unit])
    seg = key.removeprefix("sha256:")
    return replace(one, seg_id=seg[:32], sha256=key, unit_key=key, number=-1, source=one.body)
