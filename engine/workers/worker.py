"""Work that many processes share: the queue is the store.

What is to be done is planned from the store alone, so a worker needs to know nobody: it claims one
unit that is missing, does it, commits it, and plans again. Starting a process joins, killing it
leaves. The first commit of a unit wins, so two who do one unit are safe, and claims only keep that
from happening often. A unit whose work raises is tried again, by whoever comes first, until it has
failed so often that it is left alone; one that raises UnitError would do so again, and is not.
"""

import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from logitcask.engine.errors import (
    ConfigError,
    IdentityError,
    IncompleteError,
    ServerError,
    StoreError,
    UnitError,
)
from logitcask.engine.events import Cancelled, EventHandler
from logitcask.engine.store import Store
from logitcask.engine.store.log.claims import (
    Claim,
    Claims,
    failed_units,
    failures_of,
    forget_failures,
    note_failure,
)
from logitcask.engine.types import Progress, no_progress

T = TypeVar("T")

STOPS = (ConfigError, IdentityError, StoreError, ServerError)
"""What would meet every unit alike: it ends the worker, and is no unit's failure."""
BEATS = 4
"""Renewals of a claim in a lease: it outlives all but one that are lost."""
TELL_S = 60.0
"""Between two lines on how fast the work goes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkPlan(Generic[T]):
    """What is missing now."""

    units: Mapping[str, T]
    """unit_key -> what the work needs to know; without those that nobody may begin yet."""
    done: int
    total: int
    """Units that are there, and that there will be, as far as is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkSettings:
    """How a worker behaves among others."""

    worker: str
    """Its name, for others to read; also seeds the order in which it tries units."""
    lease_s: float = 600.0
    """A claim that was not renewed for so long is another's to take."""
    poll_s: float = 2.0
    attempts: int = 3
    """Failures of a unit, of all workers together, after which it is left alone."""
    idle_s: float = 0.0
    """Seconds without anything missing after which the worker ends; 0 = never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkReport:
    """What one worker did."""

    units: int
    positions: int
    seconds: float
    """From its first look at the store to its end, waiting included ..."""
    positions_per_second: float
    """... and this of the time at work."""
    failed: int
    """Planned units that are left alone, whoever tried them ..."""
    first_error: str
    """... and what one of them raised."""


def run_worker(
    store: Store,
    plan: Callable[[Collection[str]], WorkPlan[T]],
    work: Callable[[str, T], int],
    *,
    settings: WorkSettings,
    stage: str,
    stop: threading.Event,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> WorkReport:
    """Does what is missing, unit by unit, until `stop` is set or nothing was missing for a while.

    plan(given up) -> what is missing, where some units are left alone. work(key, what) commits a
    unit and returns its positions; it raises Stopped where it waited for others when `stop` was
    set, which is otherwise looked at between units. Raises what STOPS lists, and whatever is no
    Exception, with the claim removed; all else is the failure of a unit.
    """
    claims = Claims(store.storage, worker=settings.worker, lease_s=settings.lease_s, clock=clock)
    order = random.Random(settings.worker)
    begun_s = busy_s = told_s = clock()
    done_before: int | None = None
    units = positions = 0
    at_work_s = 0.0
    seen: set[str] = set()
    told = (-1, -1)
    left_alone = _LeftAlone(store, settings.attempts)
    while not stop.is_set():
        given_up = left_alone.units()
        number = store.head().number
        planned = plan(given_up)
        seen |= planned.units.keys() & given_up
        if told != (planned.done, planned.total):
            told = (planned.done, planned.total)
            progress(stage, *told)
        keys = [key for key in planned.units if key not in given_up]
        order.shuffle(keys)
        claims.look()
        if (taken := _first(claims, keys)) is None:
            busy_s = clock() if keys else busy_s
            if settings.idle_s and clock() - busy_s >= settings.idle_s:
                break
            stop.wait(settings.poll_s)
            continue
        key, claim = taken
        with _held(claim, settings.lease_s / BEATS):
            # Whoever had it may have committed it and gone between the plan and the claim.
            if store.head().number != number:
                planned = plan(given_up)
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
            # A unit's data may bring any library to raise anything; its note holds all of it.
            except Exception as error:
                note_failure(store.storage, key, error, settings.worker)
            else:
                forget_failures(store.storage, key)
            at_work_s += clock() - start_s
        busy_s = clock()
        done_before = planned.done if done_before is None else done_before
        if busy_s - told_s >= TELL_S:
            told_s = busy_s
            rate = positions / at_work_s if at_work_s else 0.0
            on_event(f"{rate:.0f} positions/s{_left(planned, done_before, busy_s - begun_s)}")
    failed = sorted(seen & left_alone.units())
    return WorkReport(
        units=units,
        positions=positions,
        seconds=clock() - begun_s,
        positions_per_second=positions / at_work_s if at_work_s else 0.0,
        failed=len(failed),
        first_error=_first_error(store, failed),
    )


def check_failed(report: WorkReport, url: str) -> None:
    """Raises IncompleteError where units were left alone."""
    if report.failed:
        raise IncompleteError(
            f"{report.failed} units failed too often and are left out; one with "
            f"{report.first_error}",
            hint=f"remove the cause, then: logitcask store retry-failed {url}",
        )


def retry_failed(store: Store) -> list[dict[str, Any]]:
    """Removes every note of a failure, so that workers try these units again; the last note of each
    unit, and how many there were.
    """
    removed: list[dict[str, Any]] = []
    for key, times in failed_units(store.storage).items():
        last = failures_of(store.storage, key)[-1:]
        forget_failures(store.storage, key)
        removed += [{"unit": key, "failures": times, **_brief(asdict(each))} for each in last]
    return removed


def _left(planned: WorkPlan[Any], done_before: int, took_s: float) -> str:
    """What is left at the pace of all workers together; empty where none has done a unit."""
    done = planned.done - done_before
    if done < 1:
        return ""
    left_s = (planned.total - planned.done) * took_s / done
    return f", {planned.total - planned.done} units left, about {left_s / 60:.0f} min"


def _brief(note: dict[str, Any]) -> dict[str, Any]:
    lines = note["message"].splitlines() or [""]
    return {"error": note["error"], "message": lines[0], "worker": note["worker"]}


class _LeftAlone:
    """Units that failed too often, or once with what they would raise again."""

    def __init__(self, store: Store, attempts: int) -> None:
        self._storage, self._attempts = store.storage, attempts
        self._lasting: dict[str, tuple[int, bool]] = {}
        """unit_key -> (how many notes, whether it is left alone): a note is read once."""

    def units(self) -> set[str]:
        failed = failed_units(self._storage)
        # Notes that were removed say nothing of those that come after.
        self._lasting = {key: self._look(key, times) for key, times in failed.items()}
        return {key for key, (_, left) in self._lasting.items() if left}

    def _look(self, key: str, times: int) -> tuple[int, bool]:
        if times >= self._attempts:
            return times, True
        known = self._lasting.get(key)
        if known is not None and known[0] == times:
            return known
        notes = failures_of(self._storage, key)
        return times, any(note.error == UnitError.__name__ for note in notes)


def _first_error(store: Store, failed: Collection[str]) -> str:
    for key in failed:
        for note in failures_of(store.storage, key):
            return f"{note.error}: {(note.message.splitlines() or [''])[0]}"
    return ""


def _first(claims: Claims, keys: Collection[str]) -> tuple[str, Claim] | None:
    """The first of these units that could be claimed."""
    for key in keys:
        if (claim := claims.take(key)) is not None:
            return key, claim
    return None


@contextmanager
def _held(claim: Claim, every_s: float) -> Iterator[None]:
    """Renews a claim from a thread while the work goes on, and removes it in the end."""
    over = threading.Event()
    lost: list[Exception] = []

    def beat() -> None:
        try:
            # Who has lost it goes on: the first commit wins, and nothing is won by giving up.
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
        # What ended the work is what the caller has to know; the claim may stay behind.
        with suppress(StoreError):
            claim.release()
        raise
