"""Discrete-event simulation of workers that commit to one store.

A worker does a unit of work, puts its segment, commits it, and claims the next unit. Requests take
a time around their mean (log-normal, sigma 0.35) and have their effect halfway. Nothing is
throttled: the requests a second are counted instead, to be compared with what a service allows.

  race    format 1: all writers race for the next number, and read new records one by one
  group   format 2: a writer that meets others waits, the oldest waiting one names all of them
"""

import heapq
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

Process = Generator[float, None, None]
"""Yields the seconds until it goes on."""

POLL_S, PATIENCE_S, PATIENCE_RANK_S = 0.1, 5.0, 1.0
"""Waits of the group commit: see engine/store/log/pending.py."""
BATCH, LEVELS = 512, (16, 256, 4096)
SIGMA = 0.35


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of the requests of a medium, and of the CPU."""

    put: float
    """Of a segment's object; with format 1 of its files."""
    create: float
    names: float
    read: float
    remove: float
    head: float
    """CPU to check and fold one added segment from the heads of a bundle."""
    record: float
    """CPU to check and fold one record with one segment, body included."""
    add: float = 0.0
    """CPU of a leader to check one more waiting commit and to encode it."""
    concurrent: int = 16
    """Requests at a time of one reader."""


@dataclass(kw_only=True)
class World:
    """The state of one simulation: workers, records, waiting commits, counts."""

    workers: int
    unit_s: float
    costs: Costs
    warm_s: float
    end_s: float
    rng: random.Random
    now: float = 0.0
    adds: list[int] = field(default_factory=lambda: [0])
    """Entry n: segments in the records before record n."""
    waiting: dict[tuple[int, int], int] = field(default_factory=dict)
    """(length of the log when it was written, unit) -> number of it."""
    committed: set[tuple[int, int]] = field(default_factory=set)
    requests: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    lost: int = 0
    work_s: float = 0.0

    def delay(self, mean: float) -> float:
        return mean * self.rng.lognormvariate(-SIGMA * SIGMA / 2, SIGMA)

    def request(self, kind: str, count: int = 1) -> None:
        """Count requests."""
        if self.now >= self.warm_s:
            self.requests[kind] = self.requests.get(kind, 0) + count

    def count_work(self, seconds: float) -> None:
        """Count the work of one worker from now on."""
        start, stop = max(self.now, self.warm_s), min(self.now + seconds, self.end_s)
        self.work_s += max(0.0, stop - start)

    def many(self, kind: str, count: int, mean: float) -> float:
        """Count several requests and return their seconds."""
        self.request(kind, count)
        return self.several_s(count, mean)

    def several_s(self, count: int, mean: float) -> float:
        """Return the seconds of several requests, some at a time."""
        rounds = ceil(count / self.costs.concurrent)
        return sum(self.delay(mean) for _ in range(rounds)) * (1.0 if count == 1 else 1.4)


def simulate(
    protocol: str, workers: int, costs: Costs, *, unit_s: float, warm_s: float, end_s: float
) -> dict[str, Any]:
    """Run workers and return rates, shares and latencies of the time after `warm_s`."""
    world = World(
        workers=workers,
        costs=costs,
        rng=random.Random(0),
        unit_s=unit_s,
        warm_s=warm_s,
        end_s=end_s,
    )
    commit = {"race": race, "group": group}[protocol]
    queue: list[tuple[float, int, Process]] = []
    for number in range(workers):
        queue.append((0.0, number, worker(world, commit, Member())))
    heapq.heapify(queue)
    order = workers
    while queue and queue[0][0] <= world.end_s:
        world.now, _, process = heapq.heappop(queue)
        for wait in process:
            order += 1
            heapq.heappush(queue, (world.now + wait, order, process))
            break
    return summary(world, protocol)


def summary(world: World, protocol: str) -> dict[str, Any]:
    """Return rates, shares and latencies of a simulation."""
    seconds = world.end_s - world.warm_s
    latencies = sorted(world.latencies)
    done = max(1, len(latencies))
    return {
        "protocol": protocol,
        "workers": world.workers,
        "unit_s": world.unit_s,
        "offered_per_s": world.workers / world.unit_s,
        "commits_per_s": len(latencies) / seconds,
        "worker_use": world.work_s / (world.workers * seconds),
        "p50_s": latencies[len(latencies) // 2] if latencies else None,
        "p99_s": latencies[int(0.99 * len(latencies))] if latencies else None,
        "lost_creates_per_commit": world.lost / done,
        "commits_per_record": sum(world.batches) / max(1, len(world.batches)),
        "requests_per_s": {kind: n / seconds for kind, n in sorted(world.requests.items())},
    }


class Member:
    """The knowledge of one worker."""

    known = 0
    """Records that it has read."""
    found: Sequence[tuple[int, int]] = ()
    """Waiting commits in its last listing, oldest first."""


def worker(world: World, commit: Any, me: Member) -> Process:
    """Work, commit, claim, and so on; the first unit is begun already."""
    yield from _work(world, world.rng.uniform(0, world.unit_s))
    while True:
        begun = world.now
        yield from commit(world, me)
        if world.now >= world.warm_s:
            world.latencies.append(world.now - begun)
        yield from _claim(world, me, sharded=commit is group)
        yield from _work(world, world.unit_s * world.rng.uniform(0.8, 1.2))


def _work(world: World, seconds: float) -> Process:
    world.count_work(seconds)
    yield seconds


def _claim(world: World, me: Member, *, sharded: bool) -> Process:
    """Release a claim, look at failures and claims, take the next unit; the log is read twice."""
    yield claim_s(world, sharded=sharded)
    for _ in range(2):
        yield from refresh(world, me) if sharded else _read_serially(world, me)


def claim_s(world: World, *, sharded: bool) -> float:
    """Return the seconds to release a claim and to take one."""
    pages = 1 if sharded else max(1, ceil(world.workers / 1000))
    # Format 1 lists all claims twice, format 2 one shard of them once; both list failures twice.
    lists = pages + 2 if sharded else 2 * pages + 2
    world.request("LIST", lists)
    world.request("DELETE")
    world.request("PUT")
    costs = world.costs
    listed = sum(world.delay(costs.names) for _ in range(lists))
    return listed + world.delay(costs.remove) + world.delay(costs.create)


# Format 2: group commit, bundles of three sizes, several reads at a time.


def refresh(world: World, me: Member) -> Generator[float, None, list[tuple[int, int]]]:
    """List the log and read its new records; return the waiting commits as listed, oldest first."""
    costs = world.costs
    world.request("LIST")
    delay = world.delay(costs.names) / 2
    yield delay
    end, found = len(world.adds) - 1, sorted(world.waiting)
    yield delay
    if end > me.known:
        single, bundled = pieces(me.known, end)
        new = world.adds[end] - world.adds[me.known]
        cpu = new * costs.head + single * (costs.record - costs.head)
        yield world.many("GET", single + bundled, costs.read) + cpu
        me.known = end
    return found


def pieces(start: int, end: int) -> tuple[int, int]:
    """Count (records, bundles) that a reader gets for records start..end-1."""
    single = bundled = 0
    while start < end:
        fits = [level for level in LEVELS if start % level == 0 and start + level <= end]
        single, bundled = (single, bundled + 1) if fits else (single + 1, bundled)
        start += fits[-1] if fits else 1
    return single, bundled


def create(world: World, me: Member, names: list[tuple[int, int]]) -> Generator[float, None, bool]:
    """Create the next record with these commits; return False where another writer was faster."""
    costs, number = world.costs, me.known
    world.request("PUT")
    delay = world.delay(costs.create) / 2
    yield delay + len(names) * costs.add
    won = len(world.adds) - 1 == number
    if won:
        assert not world.committed.intersection(names), "a unit is committed once"
        world.committed.update(names)
        world.adds.append(world.adds[-1] + len(names))
        if world.now >= world.warm_s:
            world.batches.append(len(names))
    else:
        world.lost += world.now >= world.warm_s
    yield delay
    if not won:
        yield from refresh(world, me)
        return False
    me.known = number + 1
    for level in LEVELS:
        if (number + 1) % level == 0:
            world.request("PUT")
            yield world.many("GET", 16, costs.read) + world.delay(costs.create)
    return True


def group(world: World, me: Member) -> Process:
    """Commit alone where no writer waits, else wait to be named, or name all that wait."""
    costs, rng = world.costs, world.rng
    # The unit may be committed already: that is looked up before the segment is put.
    me.found = yield from refresh(world, me)
    name = (me.known, rng.getrandbits(64))
    world.request("PUT")
    yield world.delay(costs.put)
    if not _left(world, me, name) and (yield from create(world, me, [name])):
        return
    world.request("PUT")
    delay = world.delay(costs.create) / 2
    yield delay
    world.waiting[name] = 1
    yield delay
    read: set[tuple[int, int]] = {name}
    wait = rng.uniform(0, POLL_S)
    grown = world.now
    while True:
        yield wait
        known = me.known
        me.found = yield from refresh(world, me)
        if name in world.committed:
            break
        grown = world.now if me.known > known else grown
        others = _left(world, me, name)
        rank = sum(each < name for each in others)
        if not rank or world.now - grown >= PATIENCE_S + PATIENCE_RANK_S * (rank - 1):
            new = [each for each in others[:BATCH] if each not in read]
            read.update(new)
            if new:
                yield world.many("GET", len(new), costs.read)
            if (yield from create(world, me, [name, *others[:BATCH]])):
                break
            if name in world.committed:
                break
        wait = POLL_S * rng.uniform(0.5, 1.5) * (1 + min(rank, 64) / 16)
    world.request("DELETE")
    yield world.delay(costs.remove)
    del world.waiting[name]


def _left(world: World, me: Member, name: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the waiting commits of others that are not done, as this worker knows, oldest first.

    A record names its units, so that is known without reading the waiting ones.
    """
    # A worker's own knowledge may be older than `committed`; a create then fails.
    return [each for each in me.found if each != name and each not in world.committed]


# Format 1, as of commit c0dedd4.


def race(world: World, me: Member) -> Process:
    """Create the next number until it works, after reading every record before it."""
    yield from _read_serially(world, me)
    world.request("PUT")
    yield world.delay(world.costs.put)
    yield from _read_serially(world, me)
    while True:
        number = me.known
        world.request("PUT")
        delay = world.delay(world.costs.create) / 2
        yield delay
        won = len(world.adds) - 1 == number
        if won:
            world.adds.append(world.adds[-1] + 1)
            world.batches.append(1)
        else:
            world.lost += world.now >= world.warm_s
        yield delay
        yield from _read_serially(world, me)
        if won:
            return


def _read_serially(world: World, me: Member) -> Process:
    """List, then read one record after the other until none is there, bundles of 256 in one."""
    costs = world.costs
    world.request("LIST")
    delay = world.delay(costs.names) / 2
    yield delay
    end = len(world.adds) - 1
    yield delay
    while True:
        if me.known % 256 == 0 and end >= me.known + 256:
            world.request("GET")
            yield world.delay(2 * costs.read) + 256 * costs.head
            me.known += 256
            continue
        world.request("GET")
        delay = world.delay(costs.read) / 2
        yield delay
        there = len(world.adds) - 1 > me.known
        yield delay + (costs.record if there else 0.0)
        if not there:
            return
        me.known += 1
