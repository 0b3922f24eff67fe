"""Events of a long-running command: lines for the user, cancellation of a wait, and its memory.

The engine prints nothing. It calls an `EventHandler`, which the command line provides.
"""

import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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
