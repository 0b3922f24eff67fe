"""Events of a long-running command: lines for the user, its steps, cancellation, and its memory.

The engine prints nothing. It calls an `EventHandler`, which the command line provides.
"""

import io
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from logitcask.engine.types import Detail, Progress, no_progress

T = TypeVar("T")
EventHandler = Callable[[str], None]
"""Called with one line of text."""


def warn_once(on_event: EventHandler) -> EventHandler:
    """Return a handler that passes each distinct line on once."""
    seen: set[str] = set()

    def handler(line: str) -> None:
        if line not in seen:
            seen.add(line)
            on_event(line)

    return handler


def peak_memory() -> dict[str, int]:
    """Return the peak bytes of this process so far: `process` in RAM (resident), `gpu` in tensors
    on the current GPU, if it used one.
    """
    # Kilobytes, on macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peak["gpu"] = int(torch.cuda.max_memory_allocated())
    return peak


class Cancelled(Exception):
    """A wait ended because the command was cancelled: the waiting work has no result."""


class CancelToken:
    """Cancellation of the waits of one command or worker, from any of its threads."""

    def __init__(
        self,
        on_event: EventHandler = lambda line: None,
        stop: threading.Event | None = None,
    ) -> None:
        """on_event: called when a wait begins. stop: set to end waits; None = never."""
        self._on_event, self._stop = on_event, stop
        self._open = 0
        self._lock = threading.Lock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark the body as a wait."""
        self._add(1)
        try:
            yield
        finally:
            self._add(-1)

    def report(self, names: Sequence[str]) -> None:
        """Report the names that this command waits for."""
        self._on_event(f"waiting for {', '.join(names)}")

    @property
    def cancelled(self) -> bool:
        """Return True while a wait is open that should end."""
        return self._stop is not None and self._open > 0 and self._stop.is_set()

    def _add(self, count: int) -> None:
        with self._lock:
            self._open += count


_steps: ContextVar[Progress] = ContextVar("steps", default=no_progress)


@contextmanager
def report_steps(progress: Progress) -> Iterator[None]:
    """Report the steps that this thread takes in the body to `progress`."""
    token = _steps.set(progress)
    try:
        yield
    finally:
        _steps.reset(token)


@dataclass(kw_only=True)
class Step:
    """Work that no stage counts, such as reading weights: it prepares a stage, or ends one.

    It stands far below the commands, so its progress is of `report_steps` and no argument.
    """

    name: str
    total: int
    """0 = not known."""
    unit: str
    progress: Progress
    done: int = 0

    def add(self, count: int = 1, *, ended: bool = False) -> None:
        """Count work as done; from any thread."""
        self.done += count
        detail = Detail(unit=self.unit, brief=True, ended=ended)
        self.progress(self.name, self.done, self.total, detail)


@contextmanager
def running_step(name: str, total: int = 0, unit: str = "") -> Iterator[Step]:
    """Report the body as a step of `total` in `unit`, such as `bytes`; 0 = not known."""
    found = Step(name=name, total=total, unit=unit, progress=_steps.get())
    found.add(0)
    try:
        yield found
    finally:
        found.add(0, ended=True)


def counted(
    name: str, items: Iterable[T], total: int = 0, unit: str = "", *, every_s: float = 0.05
) -> Iterator[T]:
    """Yield the items as a step, which is reported at most every `every_s` seconds: a report takes
    microseconds, and some items less.
    """
    with running_step(name, total, unit) as found:
        due_s = time.monotonic() + every_s
        for done, item in enumerate(items, 1):
            yield item
            if (now_s := time.monotonic()) >= due_s:
                found.add(done - found.done)
                due_s = now_s + every_s


def download_bar(found: Step) -> Any:
    """Return a class of progress bars that the Hub's client accepts, which counts the bytes that
    reach the disk for a step.
    """

    def count(bar: Any, more: int) -> None:
        # Of the bytes there are two bars; the other counts those of the network.
        if bar.unit == "B" and "Download" not in (bar.desc or ""):
            found.total = int(bar.total or 0)
            found.add(more)

    return silent_bar(count)


def silent_bar(on_update: Callable[[Any, int], None]) -> Any:
    """Return a class of tqdm's bars that prints nothing and calls on_update(bar, more) after each
    update. Some libraries show their progress by such a class alone.
    """
    # tqdm has no types.
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **keys: Any) -> None:
            super().__init__(*args, **keys | {"file": io.StringIO()})

        def update(self, n: float | None = 1) -> Any:
            shown = super().update(n)
            on_update(self, int(n or 0))
            return shown

    return Silent
