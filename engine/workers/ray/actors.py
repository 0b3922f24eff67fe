"""Actors: processes that Ray starts and starts again. What they say comes back with each answer.

The classes are plain: `pool` and `trainer` make Ray actors of them.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcask.engine.config.runner import Work
from logitcask.engine.errors import LogitcaskError
from logitcask.engine.events import EventHandler, peak_memory
from logitcask.engine.workers.job import Job, Receipt
from logitcask.engine.workers.worker import Worker

OpenJob = Callable[[EventHandler], Job[Any]]
"""Loads a model; called with the handler of events. Sent to another process, with its arguments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Result of one call of an actor."""

    receipt: Receipt | None
    """None where there is an error."""
    error: LogitcaskError | None
    """Returned and not raised: Ray would wrap it in an error of its own."""
    events: tuple[str, ...]
    """Lines since the last answer."""
    peak_memory_bytes: Mapping[str, int]
    """As of `events.peak_memory`."""


class UnitActor:
    """Does the units of a job, one for each call."""

    def __init__(self, open_job: OpenJob, work: Work, folder: str) -> None:
        """folder: of the driver, for relative paths, where this machine has it too."""
        enter(folder)
        self._open_job, self._work = open_job, work
        self._events: list[str] = []
        self._worker: Worker[Any] | None = None

    def do_one(self) -> Answer:
        """Do one unit if one is free; the first call loads the model."""
        receipt, found = None, None
        try:
            if self._worker is None:
                self._worker = Worker(self._open_job(self._events.append), self._work)
            receipt = self._worker.do_one()
        except LogitcaskError as error:
            found = error
        events = tuple(self._events)
        self._events.clear()
        return Answer(
            receipt=receipt,
            error=found,
            events=events,
            peak_memory_bytes=peak_memory(),
        )


def enter(folder: str) -> None:
    """Work in the folder, if this machine has it."""
    if Path(folder).is_dir():
        os.chdir(folder)


def node() -> str:
    """Return host and process."""
    return f"{os.uname().nodename}, process {os.getpid()}"
