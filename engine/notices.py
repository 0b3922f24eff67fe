"""Lines that a person may want to read. The engine prints none: it calls who does."""

from collections.abc import Callable

Notice = Callable[[str], None]
"""Called with a line."""


class Once:
    """A notice that says every line once."""

    def __init__(self, notice: Notice) -> None:
        self._notice = notice
        self._said: set[str] = set()

    def __call__(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._notice(line)
