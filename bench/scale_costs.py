"""Costs of the simulation: this disk, stated latencies of an object store, and this CPU."""

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from scale_clock import Clock, SimulatedStorage
from scale_model import Costs, World
from scale_real import segment_like
from store_commits import synthetic_small
from store_common import seal_rollouts

from logitcask.engine.store.commit import publish_segment
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.log import record
from logitcask.engine.store.log.lines import decode_sealed, encode_sealed
from logitcask.engine.store.log.publish import Attempts
from logitcask.engine.store.storage.local import LocalStorage
from logitcask.engine.store.store import Store, open_on

S3_S = {"put": 0.12, "create": 0.06, "names": 0.06, "read": 0.03, "remove": 0.04}
"""Seconds of requests to an object store in the same region; stated, not measured."""
FORMAT_1 = {"head": 3e-4, "record": 3e-4}
"""CPU seconds of a record at commit c0dedd4, measured there on a machine like this one."""
FORMAT_1_PUT_S = 0.15
"""Seconds to put the 35 files of a segment on a disk, at the same commit."""
RECORDS, TIMES, ADDS = 1024, 40, 64


def costs_of_media(folder: Path) -> dict[str, dict[str, Costs]]:
    """Return medium -> protocol -> its costs."""
    cpu, disk = cpu_costs(), disk_costs(folder)
    return {
        name: {
            "group": Costs(**seconds, **cpu),
            "race": Costs(
                **seconds | ({"put": FORMAT_1_PUT_S} if name == "disk" else {}), **FORMAT_1
            ),
        }
        for name, seconds in (("disk", disk), ("S3", S3_S))
    }


def disk_costs(folder: Path) -> dict[str, float]:
    """Measure the storage calls on this disk, in seconds; medians."""
    storage = LocalStorage(str(folder))
    storage.prepare(("log", "seg/rollout/00", "staging"), "format.json")
    record_bytes, segment_bytes = b"x" * 3000, b"x" * 100_000
    names = [f"log/{record.file_name(n)}" for n in range(TIMES)]

    def put(n: int) -> None:
        storage.put(f"seg/rollout/00/{n:032x}.zip", segment_bytes)

    def create(n: int) -> None:
        storage.create(names[n], record_bytes)
        storage.settle("log")

    return {
        "put": _median_s(put),
        "create": _median_s(create),
        "names": _median_s(lambda n: storage.names("log", after=names[-3])),
        "read": _median_s(lambda n: storage.read(names[n], 1 << 20)),
        "remove": _median_s(lambda n: storage.remove(names[n])),
    }


def _median_s(call: Callable[[int], object]) -> float:
    seconds = []
    for n in range(TIMES):
        start = time.perf_counter()
        call(n)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def cpu_costs() -> dict[str, float]:
    """Measure the CPU seconds of a head, of a record and of one more add in a record."""
    world = World(
        workers=1, unit_s=1, costs=Costs(**S3_S, head=0, record=0), warm_s=0, end_s=0,
        rng=random.Random(0),
    )  # fmt: skip
    storage = SimulatedStorage(Clock(), world)
    with storage.free():
        store = open_on(storage, create=True)
        one = seal_rollouts(store, synthetic_small(0), "default")
        for n in range(RECORDS - 1):
            publish_segment(storage, store.log, b"", segment_like(one, 0, n))
        head = min(_refresh_s(store) for _ in range(3)) / RECORDS
        for name in [each for each in storage.objects if each.startswith("bundles/")]:
            storage.remove(name)
        single = min(_refresh_s(store) for _ in range(3)) / RECORDS
        return {"head": head, "record": single, "add": _add_s(store, one)}


def _refresh_s(store: Store) -> float:
    new = open_on(store.storage).log
    start = time.process_time()
    new.refresh()
    assert len(new) == RECORDS
    return time.process_time() - start


def _add_s(store: Store, one: Segment) -> float:
    """Return the CPU seconds of a leader for each waiting commit."""
    waiting = [encode_sealed(record.encode_segment(segment_like(one, 1, n))) for n in range(ADDS)]
    start = time.process_time()
    adds = [record.decode_segment(decode_sealed(data, "")[0], "") for data in waiting]
    Attempts(store.storage, store.log).publish({"adds": adds})
    return (time.process_time() - start) / ADDS
