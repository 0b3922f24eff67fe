"""Long waits for others: who is told that one begins, and who may end it.

A worker that watches must end when it is told to, also while the servers that it asks are away. It
says so around all that it does, and whoever may have to wait looks it up when it is made, so that
nobody between the two needs to know.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_CURRENT: ContextVar["Waits"] = ContextVar("waits")


class Stopped(Exception):
    """A wait was ended by who was told to stop: nothing came of the work that waited."""


class Waits:
    """The waits of one worker, of any of its threads."""

    def __init__(self, stop: threading.Event, notice: Callable[[str], None]) -> None:
        """stop: set when they are to end; notice: called with a line."""
        self._stop, self._notice = stop, notice
        self._open = 0
        self._lock = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Around a wait."""
        self._add(1)
        try:
            yield
        finally:
            self._add(-1)

    def tell(self, names: Sequence[str]) -> None:
        """That these are waited for."""
        self._notice(f"waiting for {', '.join(names)}")

    @property
    def ended(self) -> bool:
        """Whether something waits that should not any more."""
        return self._open > 0 and self._stop.is_set()

    def _add(self, count: int) -> None:
        with self._lock:
            self._open += count


def current_waits() -> Waits:
    """Those of the worker around; without one, of nobody, who is told nothing and ends nothing."""
    return _CURRENT.get(None) or Waits(threading.Event(), lambda line: None)


@contextmanager
def worker_waits(stop: threading.Event, notice: Callable[[str], None]) -> Iterator[None]:
    """Around the work of one who is told to stop by an event."""
    token = _CURRENT.set(Waits(stop, notice))
    try:
        yield
    finally:
        _CURRENT.reset(token)
