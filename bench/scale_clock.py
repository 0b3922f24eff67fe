"""Threads on a virtual clock: one runs at a time, and sleeping costs no time.

The clock goes to the earliest end of a sleep when all threads sleep, so the store's own code runs
in a simulated world, in the order that its latencies give.
"""

import heapq
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

from scale_model import World

from logitcask.engine.store.storage.base import Found


class Clock:
    """A clock that threads share."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, threading.Event]] = []
        self._order = 0
        self._idle = threading.Event()
        self._stopped = False

    def sleep(self, seconds: float) -> None:
        """Let the others run until this thread's time has come."""
        if self._stopped:
            raise SystemExit
        mine = threading.Event()
        self._order += 1
        heapq.heappush(self._queue, (self.now + seconds, self._order, mine))
        self._idle.set()
        mine.wait()
        if self._stopped:
            raise SystemExit

    def run(self, works: Iterable[Callable[[], None]], end_s: float) -> None:
        """Run each work in a thread until `end_s`; raise the first error of one."""
        errors: list[BaseException] = []

        def guarded(work: Callable[[], None]) -> None:
            try:
                self.sleep(0.0)
                work()
            except BaseException as error:
                if not isinstance(error, SystemExit):
                    errors.append(error)
            self._idle.set()

        threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
        for thread in threads:
            self._idle.clear()
            thread.start()
            self._idle.wait()
        while self._queue and self._queue[0][0] <= end_s and not errors:
            self.now, _, event = heapq.heappop(self._queue)
            self._idle.clear()
            event.set()
            self._idle.wait()
        self._stopped = True
        for _, _, event in self._queue:
            event.set()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


class SimulatedStorage:
    """An object store in memory, whose requests take time on a virtual clock.

    Each has its effect halfway, as in `scale_model`, and is counted there.
    """

    def __init__(self, clock: Clock, world: World) -> None:
        self.url = "simulated"
        self.objects: dict[str, bytes] = {}
        self._clock, self._world, self._free = clock, world, False

    @contextmanager
    def _request(self, kind: str, mean: float) -> Any:
        world = self._world
        world.now = self._clock.now
        world.request(kind)
        delay = 0.0 if self._free else world.delay(mean) / 2
        if delay:
            self._clock.sleep(delay)
        yield
        if delay:
            self._clock.sleep(delay)

    def together(self, call: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Take the place of `map_concurrently`: the calls take the time of some at once."""
        every = list(arguments)
        if not every or self._free:
            return [call(*each) for each in every]
        seconds = self._world.several_s(len(every), self._world.costs.read)
        self._clock.sleep(seconds / 2)
        with self.free():
            found = [call(*each) for each in every]
        self._clock.sleep(seconds / 2)
        return found

    @contextmanager
    def free(self) -> Any:
        """Make requests cost no time, to set up and to look at the end."""
        self._free = True
        yield
        self._free = False

    def where(self, name: str) -> str:
        return f"simulated/{name}"

    def check_writable(self) -> None:
        """Allow writing."""

    def prepare(self, folders: Iterable[str], file: str) -> None:
        """Do nothing: there are no folders."""

    def check(self, folders: Iterable[str]) -> None:
        """Do nothing: there are no folders."""

    def settle(self, folder: str) -> None:
        """Do nothing: an object that is there is durable."""

    def read(self, name: str, limit: int) -> bytes | None:
        with self._request("GET", self._world.costs.read):
            return self.objects.get(name)

    def read_part(self, name: str, start: int, size: int) -> bytes | None:
        data = self.read(name, 0)
        return None if data is None else data[start : start + size]

    def read_all(self, limits: Mapping[str, int]) -> dict[str, bytes | None]:
        found = self.together(self.read, [(name, limit) for name, limit in limits.items()])
        return dict(zip(limits, found, strict=True))

    def create(self, name: str, data: bytes) -> bool:
        with self._request("PUT", self._world.costs.create):
            new = self.objects.setdefault(name, data) is data
            world = self._world
            world.lost += not new and "pending" not in name and world.now >= world.warm_s
            return new

    def leave(self, name: str, data: bytes) -> bool:
        return self.create(name, data)

    def put(self, name: str, data: bytes) -> None:
        with self._request("PUT", self._world.costs.put):
            self.objects[name] = data

    def names(self, folder: str, after: str = "") -> list[str]:
        start = f"{folder}/" if folder else ""
        with self._request("LIST", self._world.costs.names):
            inside = (name[len(start) :] for name in self.objects if name.startswith(start))
            found = sorted({name.split("/")[0] for name in inside})
        return [name for name in found if name > after]

    def files(self, folder: str) -> list[Found]:
        with self._request("LIST", self._world.costs.names):
            names = sorted(name for name in self.objects if name.startswith(f"{folder}/"))
        return [Found(name=name, size=len(self.objects[name])) for name in names]

    def touched_s(self, name: str) -> float:
        return 0.0

    def remove(self, name: str) -> None:
        with self._request("DELETE", self._world.costs.remove):
            self.objects.pop(name, None)
