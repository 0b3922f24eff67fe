"""The timeline of the roles: a span of each unit and of each wait."""

import os
import re
import socket
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from logitcask.engine.config.runner import Work
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.models.identity import digest
from logitcask.engine.types import NO_DETAIL, Detail, Progress, Report
from logitcask.engine.workers.job import Job, WorkPlan
from logitcask.engine.workers.timeline import span, timeline_file


def named(config: RunConfig, role: str, index: int | None) -> tuple[Work, Path]:
    """Return the settings of a worker with its name, and the file of its timeline.

    index: number of the process among those of its role on this machine; None = none.
    """
    host, work = socket.gethostname(), config.work
    if index is None:
        name = work.worker_name or f"{host}-{os.getpid()}"
        return work, timeline_file(config.run.out, role, re.sub(r"[^A-Za-z0-9._-]", "_", name))
    # Loops that share a store have other folders.
    run = digest(str(config.run.out.resolve()))[-8:]
    work = work.model_copy(update={"worker_name": f"{host[:80]}-{run}-{role}-{index}"})
    return work, timeline_file(config.run.out, role, str(index))


class Updates:
    """The spans of the updates of a trainer, each from the end of `prepare` to its report."""

    def __init__(self, file: Path | None) -> None:
        self.file, self._open = file, ExitStack()
        self._done: int | None = None
        """Updates done when the running one began, as its first report says."""

    def begin(self, round: int, version: int) -> None:
        """Begin an update of a version."""
        self._done = None
        self._open.enter_context(span(self.file, "update", round=round, version=version))

    def end(self) -> None:
        """End the running update, if there is one."""
        self._open.close()

    def watched(self, progress: Progress) -> Progress:
        """Return a progress that ends the running update when it reports one more as done."""

        def report(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
            if stage == "train":
                self._done = done if self._done is None else self._done
                if done > self._done:
                    self.end()
            progress(stage, done, total, detail)

        return report


def timed(job: Job[Any], file: Path | None, place: Callable[[Any], tuple[int, int]]) -> Job[Any]:
    """Return a job that records its units and waits; place(unit) -> (round, version)."""
    waiting = ExitStack()
    idle = False

    def plan(left_out: Collection[str]) -> WorkPlan[Any]:
        nonlocal idle
        planned = job.plan(left_out)
        if idle and planned.units:
            waiting.close()
        elif not idle and not planned.units:
            waiting.enter_context(span(file, "wait"))
        idle = not planned.units
        return planned

    def work(key: str, unit: Any, report: Report) -> int:
        number, version = place(unit)
        with span(file, "unit", round=number, version=version):
            return job.work(key, unit, report)

    def close() -> None:
        waiting.close()
        job.close()

    return replace(job, plan=plan, work=work, close=close)
