"""A job without a model, for actors: small commits, and a line for each unit that begins."""

import os
import time
from collections.abc import Collection
from pathlib import Path

from logitcask.engine.errors import AnswerError, UnitError
from logitcask.engine.events import EventHandler
from logitcask.engine.store import open_store
from logitcask.engine.types import Report
from logitcask.engine.workers.job import Job, WorkPlan
from tests.engine.store.made import commit_rollouts, key

LIMIT_S = 600.0
UNIT_S = 0.15
UNITS = 40
ALONE = 6
"""Units after which each waits until two processes have begun one."""


def begun(log: Path) -> list[tuple[str, int]]:
    """Return (unit key, process) of each unit that has begun."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(unit, int(process)) for unit, process in map(str.split, lines)]


def open_toy(url: str, log: Path, on_event: EventHandler) -> Job[int]:
    store = open_store(url)
    units = {key("toy", n): n for n in range(UNITS)}
    on_event("a toy is open")

    def plan(left_out: Collection[str]) -> WorkPlan[int]:
        done = store.head().unit_keys()
        missing = {unit: n for unit, n in units.items() if unit not in done}
        return WorkPlan(units=missing, done=UNITS - len(missing), total=UNITS)

    def work(unit: str, number: int, report: Report) -> int:
        with log.open("a") as file:
            file.write(f"{unit} {os.getpid()}\n")
        if number == 0:
            raise UnitError("unit 0 cannot be done", hint="leave it out")
        end_s = time.monotonic() + LIMIT_S
        while len(begun(log)) > ALONE and len({process for _, process in begun(log)}) < 2:
            if time.monotonic() > end_s:
                raise AnswerError("no second process came", hint="look at the driver")
            time.sleep(0.05)
        time.sleep(UNIT_S)
        return commit_rollouts(store, number, unit).counts["P"]

    return Job(stage="toy", store=store, plan=plan, work=work)
