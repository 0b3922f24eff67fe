"""Events of a long-running command: lines for the user, and cancellation of a wait.

The engine prints nothing. It calls an `EventHandler`, which the command line provides.
"""

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
