"""Run work that many processes share: the queue is the store.

The plan comes from the store alone, so workers need not know each other: a worker claims one
missing unit, does it, commits it, and plans again. Start a process to join, kill it to leave. The
first commit of a unit wins, so two workers on one unit are safe; claims only make that rare.

A unit that raises is tried again, by any worker, until it has failed too often and is left out. A
unit that raises UnitError would fail again, so it is left out at once.
"""

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from logitcask.engine.config.runner import Work
from logitcask.engine.errors import (
    ConfigError,
    IdentityError,
    IncompleteError,
    ServerError,
    StoreError,
)
from logitcask.engine.events import Cancelled, EventHandler
from logitcask.engine.store.log.claims import (
    Claim,
    Claims,
    note_failure,
    shard_of,
)
from logitcask.engine.types import Detail, Progress, no_progress
from logitcask.engine.workers.failures import Failures, error_of
from logitcask.engine.workers.job import Job, Receipt, WorkPlan, WorkReport

T = TypeVar("T")

STOPS = (ConfigError, IdentityError, StoreError, ServerError)
"""Errors that every unit would meet: they end the worker and count as no unit's failure."""
BEATS = 4
"""Renewals of a claim in a lease: a claim survives until all but one of them are lost."""
REPORT_S = 60.0
"""Seconds between two events on the pace of the work."""
SHARDS = 16
"""Shards of units that one look for a free unit lists, two requests each."""
CANDIDATES = 1024
"""Missing units that one look draws from, at most."""


class Worker(Generic[T]):
    """One worker on a job: the claims and the failures that it has seen."""

    def __init__(
        self,
        job: Job[T],
        settings: Work,
        *,
        progress: Progress = no_progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job, self._progress, self._clock = job, progress, clock
        self._lease_s = settings.lease_seconds
        self._name = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"
        self._claims = Claims(
            job.store.storage, worker=self._name, lease_s=settings.lease_seconds, clock=clock
        )
        self._order = random.Random(self._name)
        self._failures = Failures(job.store, settings.max_attempts)
        self._reported = (-1, -1)
        self._planned: set[str] = set()

    @property
    def failed(self) -> list[str]:
        """Return the planned units that are left out."""
        return sorted(self._planned & self._failures.left_out)

    @property
    def first_error(self) -> str:
        """Return the error of one of them; empty if there is none."""
        errors = (error_of(self._job.store, key) for key in self.failed)
        return next(filter(None, errors), "")

    def do_one(self) -> Receipt:
        """Claim one missing unit, do it and commit it, if one is free.

        Raises Cancelled, the errors of STOPS and every BaseException that is no Exception, with the
        claim removed; any other error is a failure of the unit.
        """
        job, failures = self._job, self._failures
        number = job.store.head().number
        planned = self._plan()
        taken = None
        for keys in (planned.first, planned.units):
            taken = taken or _take_one(keys, self._claims, failures, self._order)
        self._planned |= planned.units.keys() & failures.left_out
        units = positions = 0
        took_s = 0.0
        if taken is not None:
            key, claim = taken
            with _renewed(claim, self._lease_s / BEATS):
                # Another worker may have committed the unit between the plan and the claim.
                if job.store.head().number != number:
                    planned = job.plan(failures.left_out)
                if key in planned.units:
                    start_s = self._clock()
                    units, positions = self._do(key, planned.units[key])
                    took_s = self._clock() - start_s
        return Receipt(
            claimed=taken is not None,
            units=units,
            positions=positions,
            seconds=took_s,
            missing=len(planned.units) - len(planned.units.keys() & failures.left_out),
            left_out=len(self.failed),
            first_error=self.first_error,
            done=planned.done,
            total=planned.total,
            may_shrink=planned.may_shrink,
        )

    def _plan(self) -> WorkPlan[T]:
        planned = self._job.plan(self._failures.left_out)
        if self._reported != (planned.done, planned.total):
            self._reported = (planned.done, planned.total)
            self._progress(self._job.stage, *self._reported)
        return planned

    def _do(self, key: str, unit: T) -> tuple[int, int]:
        """Return the number of units done, and their positions."""

        def report(detail: Detail) -> None:
            self._progress(self._job.stage, *self._reported, detail)

        try:
            positions = self._job.work(key, unit, report)
        except (Cancelled, *STOPS) as error:
            # Nor does a unit fail whose rollouts were deleted meanwhile.
            if isinstance(error, StoreError) and key not in self._plan().units:
                return 0, 0
            raise
        # A unit's data may make any library raise any error; the note keeps all of it.
        except Exception as error:
            note_failure(self._job.store.storage, key, error, self._name)
            return 0, 0
        self._failures.forget(key)
        return 1, positions


def run_worker(
    job: Job[T],
    settings: Work,
    *,
    stop: threading.Event,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
    max_units: int = 0,
    until_over: bool = False,
) -> WorkReport:
    """Do the missing units one by one, until `stop` is set or no unit was missing for
    `idle_exit` seconds.

    max_units: end after so many units too; 0 = never. until_over: end too where nothing is left to
    do but units that are left out. `stop` is read between units. Raises as `Worker.do_one` does,
    Cancelled excepted.
    """
    worker = Worker(job, settings, progress=progress, clock=clock)
    begun_s = busy_s = reported_s = clock()
    done_before: int | None = None
    units = positions = 0
    at_work_s = 0.0
    while not stop.is_set():
        try:
            receipt = worker.do_one()
        except Cancelled:
            break
        if not receipt.claimed:
            busy_s = clock() if receipt.missing else busy_s
            idle = settings.idle_exit and clock() - busy_s >= settings.idle_exit
            if idle or (until_over and receipt.over):
                break
            stop.wait(settings.poll)
            continue
        units += receipt.units
        positions += receipt.positions
        at_work_s += receipt.seconds
        if max_units and units >= max_units:
            break
        busy_s = clock()
        done_before = receipt.done if done_before is None else done_before
        if busy_s - reported_s >= REPORT_S:
            reported_s = busy_s
            rate = positions / at_work_s if at_work_s else 0.0
            on_event(f"{rate:.0f} positions/s{_remaining(receipt, done_before, busy_s - begun_s)}")
    return WorkReport(
        units=units,
        positions=positions,
        seconds=clock() - begun_s,
        positions_per_second=positions / at_work_s if at_work_s else 0.0,
        failed=len(worker.failed),
        first_error=worker.first_error,
    )


def check_failed(failed: int, first_error: str, url: str) -> None:
    """Raise IncompleteError where units were left out."""
    if failed:
        raise IncompleteError(
            f"{failed} units failed too often and are left out; one with {first_error}",
            hint=f"remove the cause, then: logitcask store retry-failed {url}",
        )


def _remaining(planned: Receipt, done_before: int, took_s: float) -> str:
    """Return the text on the units left, at the pace of all workers; empty before the first."""
    done = planned.done - done_before
    if done < 1:
        return ""
    left_s = (planned.total - planned.done) * took_s / done
    return f", {planned.total - planned.done} units left, about {left_s / 60:.0f} min"


def _take_one(
    units: Collection[str], claims: Claims, failures: Failures, order: random.Random
) -> tuple[str, Claim] | None:
    """Claim one of the units that is free and not left out; look at a few shards of them."""
    if len(units) > CANDIDATES:
        units = order.sample(list(units), CANDIDATES)
    shards: dict[str, list[str]] = {}
    for key in units:
        shards.setdefault(shard_of(key), []).append(key)
    for shard in order.sample(list(shards), min(SHARDS, len(shards))):
        failures.refresh(shard)
        claims.refresh(shard)
        order.shuffle(shards[shard])
        for key in shards[shard]:
            if key not in failures.left_out and (claim := claims.take(key)) is not None:
                return key, claim
    return None


@contextmanager
def _renewed(claim: Claim, every_s: float) -> Iterator[None]:
    """Renew a claim from a thread while the work goes on, and remove it at the end."""
    over = threading.Event()
    lost: list[Exception] = []

    def beat() -> None:
        try:
            # The work goes on after a lost claim: the first commit wins.
            while not over.wait(every_s) and claim.renew():
                pass
        except StoreError as error:
            lost.append(error)

    thread = threading.Thread(target=beat, name="logitcask-claim", daemon=True)
    thread.start()
    try:
        yield
        over.set()
        thread.join()
        if lost:
            raise lost[0]
        claim.release()
    except BaseException:
        over.set()
        thread.join()
        # Raise the error of the work, not one of the release; the claim may stay behind.
        with suppress(StoreError):
            claim.release()
        raise
