"""Long waits for others: who is told that one begins, and who may end it.

A worker that watches must end when it is told to, also while the servers that it asks are away; and
nobody should look at a command that says nothing for minutes.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from logitcask.engine.notices import Notice


class Stopped(Exception):
    """A wait was ended by who was told to stop: nothing came of the work that waited."""


class Waits:
    """The waits of one command or worker, of any of its threads."""

    def __init__(
        self,
        notice: Notice = lambda line: None,
        stop: threading.Event | None = None,
    ) -> None:
        """notice: told that a wait begins; stop: set when waits are to end, None where none is."""
        self._notice, self._stop = notice, stop
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
        return self._stop is not None and self._open > 0 and self._stop.is_set()

    def _add(self, count: int) -> None:
        with self._lock:
            self._open += count
