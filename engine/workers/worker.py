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
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from logitcask.engine.config.teacher import Work
from logitcask.engine.errors import (
    ConfigError,
    IdentityError,
    IncompleteError,
    ServerError,
    StoreError,
    UnitError,
)
from logitcask.engine.events import Cancelled, EventHandler, peak_memory
from logitcask.engine.store import Store
from logitcask.engine.store.log.claims import (
    Claim,
    Claims,
    failed_units,
    failures_of,
    forget_failures,
    note_failure,
    shard_of,
)
from logitcask.engine.types import Progress, no_progress

T = TypeVar("T")

STOPS = (ConfigError, IdentityError, StoreError, ServerError)
"""Errors that every unit would meet: they end the worker and count as no unit's failure."""
BEATS = 4
"""Renewals of a claim in a lease: a claim survives until all but one of them are lost."""
REPORT_S = 60.0
"""Seconds between two events on the pace of the work."""
SHARDS = 16
"""Shards of units that one look for a free unit lists, two requests each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkPlan(Generic[T]):
    """The units that are missing now."""

    units: Mapping[str, T]
    """unit_key -> input of the work; without units that may not begin yet."""
    done: int
    total: int
    """Units committed, and units planned so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkReport:
    """Counts and times of one worker."""

    units: int
    positions: int
    seconds: float
    """From the start of the worker to its end, waiting included."""
    positions_per_second: float
    """Per second at work, without waiting."""
    failed: int
    """Planned units that are left out, over all workers."""
    first_error: str
    """Error of one of them."""
    peak_memory_bytes: Mapping[str, int] = field(default_factory=peak_memory)
    """As of `events.peak_memory`."""


def run_worker(
    store: Store,
    plan: Callable[[Collection[str]], WorkPlan[T]],
    work: Callable[[str, T], int],
    *,
    settings: Work,
    stage: str,
    stop: threading.Event,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> WorkReport:
    """Do the missing units one by one, until `stop` is set or no unit was missing for
    `idle_exit` seconds.

    plan(left_out) -> WorkPlan, without the units left out. work(key, unit) commits a unit and
    returns its positions; it raises Cancelled where it waited for others when `stop` was set.
    Otherwise `stop` is read between units. Raises the errors of STOPS and every BaseException that
    is no Exception, with the claim removed; any other error is a failure of the unit.
    """
    name = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"
    claims = Claims(store.storage, worker=name, lease_s=settings.lease_seconds, clock=clock)
    order = random.Random(name)
    begun_s = busy_s = reported_s = clock()
    done_before: int | None = None
    units = positions = 0
    at_work_s = 0.0
    seen: set[str] = set()
    reported = (-1, -1)
    failures = _Failures(store, settings.max_attempts)
    while not stop.is_set():
        number = store.head().number
        planned = plan(failures.left_out)
        if reported != (planned.done, planned.total):
            reported = (planned.done, planned.total)
            progress(stage, *reported)
        taken = _take_one(planned.units, claims, failures, order)
        seen |= planned.units.keys() & failures.left_out
        if taken is None:
            busy_s = clock() if planned.units.keys() - failures.left_out else busy_s
            if settings.idle_exit and clock() - busy_s >= settings.idle_exit:
                break
            stop.wait(settings.poll)
            continue
        key, claim = taken
        with _renewed(claim, settings.lease_seconds / BEATS):
            # Another worker may have committed the unit between the plan and the claim.
            if store.head().number != number:
                planned = plan(failures.left_out)
            if key not in planned.units:
                continue
            start_s = clock()
            try:
                positions += work(key, planned.units[key])
                units += 1
            except Cancelled:
                break
            except STOPS:
                raise
            # A unit's data may make any library raise any error; the note keeps all of it.
            except Exception as error:
                note_failure(store.storage, key, error, name)
            else:
                failures.forget(key)
            at_work_s += clock() - start_s
        busy_s = clock()
        done_before = planned.done if done_before is None else done_before
        if busy_s - reported_s >= REPORT_S:
            reported_s = busy_s
            rate = positions / at_work_s if at_work_s else 0.0
            on_event(f"{rate:.0f} positions/s{_remaining(planned, done_before, busy_s - begun_s)}")
    failed = sorted(seen & failures.left_out)
    return WorkReport(
        units=units,
        positions=positions,
        seconds=clock() - begun_s,
        positions_per_second=positions / at_work_s if at_work_s else 0.0,
        failed=len(failed),
        first_error=_first_error(store, failed),
    )


def check_failed(report: WorkReport, url: str) -> None:
    """Raise IncompleteError where units were left out."""
    if report.failed:
        raise IncompleteError(
            f"{report.failed} units failed too often and are left out; one with "
            f"{report.first_error}",
            hint=f"remove the cause, then: logitcask store retry-failed {url}",
        )


def retry_failed(store: Store) -> list[dict[str, Any]]:
    """Remove every failure note, so that workers try these units again.

    Return the last note of each unit, and its number of failures.
    """
    removed: list[dict[str, Any]] = []
    for key, times in failed_units(store.storage).items():
        for note in failures_of(store.storage, key)[-1:]:
            message = _first_line(note.message)
            brief = {"error": note.error, "message": message, "worker": note.worker}
            removed.append({"unit": key, "failures": times, **brief})
        forget_failures(store.storage, key)
    return removed


def _remaining(planned: WorkPlan[Any], done_before: int, took_s: float) -> str:
    """Return the text on the units left, at the pace of all workers; empty before the first."""
    done = planned.done - done_before
    if done < 1:
        return ""
    left_s = (planned.total - planned.done) * took_s / done
    return f", {planned.total - planned.done} units left, about {left_s / 60:.0f} min"


def _take_one(
    units: Collection[str], claims: Claims, failures: "_Failures", order: random.Random
) -> tuple[str, Claim] | None:
    """Claim one of the units that is free and not left out; look at a few shards of them."""
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


class _Failures:
    """The notes of failures as of the last look at each shard."""

    def __init__(self, store: Store, attempts: int) -> None:
        self._store, self._attempts = store, attempts
        self._seen: dict[str, dict[str, tuple[int, bool]]] = {}
        """Shard -> unit_key -> (number of notes, True where left out): each note is read once."""
        self.left_out: set[str] = set()
        """Units that failed too often, or once with UnitError."""

    def refresh(self, shard: str) -> None:
        before = self._seen.get(shard, {})
        # Drop the entries of removed notes: later notes are counted from 0.
        self._seen[shard] = {
            key: before[key]
            if key in before and before[key][0] == times
            else self._read(key, times)
            for key, times in failed_units(self._store.storage, shard).items()
        }
        self.left_out -= before.keys()
        self.left_out |= {key for key, (_, left) in self._seen[shard].items() if left}

    def forget(self, key: str) -> None:
        """Remove the notes of a unit, if it had any at the last look."""
        if key in self._seen.get(shard_of(key), {}):
            forget_failures(self._store.storage, key)

    def _read(self, key: str, times: int) -> tuple[int, bool]:
        if times >= self._attempts:
            return times, True
        notes = failures_of(self._store.storage, key)
        return times, any(note.error == UnitError.__name__ for note in notes)


def _first_error(store: Store, failed: Collection[str]) -> str:
    for key in failed:
        for note in failures_of(store.storage, key):
            return f"{note.error}: {_first_line(note.message)}"
    return ""


def _first_line(message: str) -> str:
    return (message.splitlines() or [""])[0]


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
