"""Workers that share a store: every unit is done once, also if workers are killed or stopped."""

import os
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from logitcask.engine.config.runner import Work
from logitcask.engine.errors import (
    AnswerError,
    ConfigError,
    IdentityError,
    IncompleteError,
    IntegrityError,
    ServerError,
    StoreError,
    UnitError,
)
from logitcask.engine.events import Cancelled
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.log.claims import Claims, failed_units, failures_of, shard_of
from logitcask.engine.store.retention import delete_rollouts
from logitcask.engine.store.verify import verify
from logitcask.engine.workers.failures import retry_failed
from logitcask.engine.workers.job import Job, WorkPlan, WorkReport
from logitcask.engine.workers.worker import SHARDS, Worker, check_failed, run_worker
from tests.engine.store.made import commit_rollouts, commit_scores, key, make_scores
from tests.engine.workers import worker_pool

MEMORY = Path("/dev/shm")
ROOT = Path(__file__).resolve().parents[3]
UNITS = [key("unit", n) for n in range(5)]


class Ticks(threading.Event):
    """A stop event with a simulated clock: each wait adds its timeout and runs the next action."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        super().__init__()
        self.now_s, self.waited, self.actions = 0.0, 0, list(actions)

    def wait(self, timeout: float | None = None) -> bool:
        self.now_s += timeout or 0.0
        self.waited += 1
        assert self.waited < 1000, "an endless wait"
        if self.actions:
            self.actions.pop(0)()
        return self.is_set()

    def clock(self) -> float:
        return self.now_s


@pytest.fixture
def store() -> Iterator[Store]:
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield open_store(Path(folder) / "cask", create=True)


def missing(store: Store, units: Collection[str] = UNITS) -> WorkPlan[int]:
    done = store.head().unit_keys()
    left = {unit: n for n, unit in enumerate(units) if unit not in done}
    return WorkPlan(units=left, done=len(units) - len(left), total=len(units))


def run(
    store: Store,
    work: Callable[[str, int], int] | None = None,
    *,
    ticks: Ticks | None = None,
    plan: Callable[[Collection[str]], WorkPlan[int]] | None = None,
    worker: str = "w",
    **options: Any,
) -> WorkReport:
    def commit(unit: str, seed: int) -> int:
        return commit_rollouts(store, seed, unit).counts["P"]

    ticks = Ticks() if ticks is None else ticks
    return run_worker(
        job(store, plan or (lambda left_out: missing(store)), work or commit),
        Work(worker_name=worker, idle_exit=1.0, poll=1.0),
        stop=ticks,
        clock=ticks.clock,
        **options,
    )


def job(
    store: Store,
    plan: Callable[[Collection[str]], WorkPlan[int]],
    work: Callable[[str, int], int],
) -> Job[int]:
    return Job(stage="sum", store=store, plan=plan, work=lambda key, unit, report: work(key, unit))


def test_all_units_are_done_once_and_no_claim_stays(store: Store) -> None:
    reports: list[tuple[str, int, int]] = []
    report = run(store, progress=lambda *each: reports.append(each))
    assert store.head().unit_keys() == set(UNITS)
    assert (report.units, report.failed, store.head().number) == (5, 0, 4)
    assert report.positions == sum(s.counts["P"] for s in store.head().segments)
    assert reports == [("sum", n, 5) for n in range(6)], "each number once, for any wait"
    assert store.storage.files("claims") == []


def test_workers_start_at_different_units(store: Store) -> None:
    def first(worker: str) -> int:
        started: list[int] = []

        def work(unit: str, number: int) -> int:
            started.append(number)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(store, work, worker=worker)
        return started[0]

    assert first("a") == first("a")
    assert len({first(f"worker-{n}") for n in range(12)}) >= 3


def test_a_search_lists_a_few_shards_however_many_units_there_are(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [key("many", n) for n in range(2000)]
    listed: list[str] = []
    for method in ("names", "files"):
        real = getattr(store.storage, method)

        def counted(folder: str, real: Any = real, **options: Any) -> Any:
            listed.extend([folder] * folder.startswith(("claims", "failed")))
            return real(folder, **options)

        monkeypatch.setattr(store.storage, method, counted)

    def lists_of(committed: int) -> int:
        ticks = Ticks()
        listed.clear()

        def work(unit: str, seed: int) -> int:
            ticks.waited += 1
            if ticks.waited == committed:
                ticks.set()
            return commit_rollouts(store, seed, unit).counts["P"]

        run(store, work, ticks=ticks, plan=lambda left_out: missing(store, units))
        return len(listed)

    assert lists_of(4) == 2 * 4, "the claims and the notes of one shard a unit"
    other = Claims(store.storage, worker="other", lease_s=600.0)
    for unit in missing(store, units).units:
        assert other.take(unit) is not None
    ticks = Ticks()
    ticks.actions.append(ticks.set)
    listed.clear()
    run(store, ticks=ticks, plan=lambda left_out: missing(store, units))
    assert len(listed) == 2 * SHARDS, "of all 256 shards, whose units others have"


def test_new_units_are_done_until_the_stop(store: Store) -> None:
    later = [*UNITS, key("late")]
    known = list(UNITS)
    ticks = Ticks(lambda: known.append(later[-1]), lambda: None)
    report = run(store, ticks=ticks, plan=lambda left_out: missing(store, known))
    assert store.head().unit_keys() == set(later)
    assert report.units == 6


def test_a_stop_takes_effect_after_the_current_unit(store: Store) -> None:
    ticks = Ticks()

    def work(unit: str, seed: int) -> int:
        ticks.set()
        return commit_rollouts(store, seed, unit).counts["P"]

    assert run(store, work, ticks=ticks).units == 1
    assert len(store.head().unit_keys()) == 1
    assert store.storage.files("claims") == []


def test_a_unit_is_left_out_after_three_failures_over_all_workers(store: Store) -> None:
    tried: Counter[str] = Counter()

    def work(unit: str, seed: int) -> int:
        tried[unit] += 1
        if unit == UNITS[2]:
            raise AnswerError("q > 1\nand more", hint="look")
        return commit_rollouts(store, seed, unit).counts["P"]

    def one(worker: str) -> WorkReport:
        ticks = Ticks()

        def until_failed(unit: str, seed: int) -> int:
            if unit == UNITS[2]:
                ticks.set()
            return work(unit, seed)

        return run(store, until_failed, ticks=ticks, worker=worker)

    reports = [one("first"), one("second"), run(store, work, worker="third")]
    assert [each.failed for each in reports] == [0, 0, 1]
    assert tried == {unit: 3 if unit == UNITS[2] else 1 for unit in UNITS}
    notes = failures_of(store.storage, UNITS[2])
    assert [each.worker for each in notes] == ["first", "second", "third"]
    assert "in work" in notes[0].traceback
    with pytest.raises(IncompleteError) as caught:
        check_failed(reports[2].failed, reports[2].first_error, store.url)
    assert caught.value.cause == (
        "1 units failed too often and are left out; one with AnswerError: q > 1"
    )
    assert f"store retry-failed {store.url}" in caught.value.hint
    check_failed(reports[0].failed, reports[0].first_error, store.url)

    (removed,) = retry_failed(store)
    assert (removed["unit"], removed["failures"], removed["worker"]) == (UNITS[2], 3, "third")
    assert retry_failed(store) == []
    again = run(store)
    assert (again.units, again.failed) == (1, 0)
    assert store.head().unit_keys() == set(UNITS)


def test_a_unit_that_succeeds_after_failures_leaves_no_failure(store: Store) -> None:
    failures = iter([RuntimeError("out of memory")] * 2)

    def work(unit: str, seed: int) -> int:
        for error in failures:
            raise error
        return commit_rollouts(store, seed, unit).counts["P"]

    report = run(store, work)
    assert (report.units, report.failed, failed_units(store.storage)) == (5, 0, {})


@pytest.mark.parametrize(
    "error",
    [
        *(k("x", hint="y") for k in (ConfigError, IdentityError, StoreError, IntegrityError)),
        ServerError("away", hint="start it"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_every_unit_ends_the_worker(store: Store, error: BaseException) -> None:
    def work(unit: str, seed: int) -> int:
        raise error

    with pytest.raises(type(error)):
        run(store, work)
    assert store.storage.files("claims") == []
    assert failed_units(store.storage) == {}


def test_the_unit_of_a_stopped_worker_is_taken_over(store: Store) -> None:
    stopped = Claims(store.storage, worker="stopped", lease_s=600.0)
    assert stopped.take(UNITS[3]) is not None
    ticks = Ticks()
    report = run(store, ticks=ticks)
    assert (report.units, report.failed) == (5, 0), "it waits for the unit of another worker"
    assert 600 <= ticks.now_s < 605
    assert store.storage.files("claims") == []


def test_a_unit_that_was_committed_before_the_claim_is_not_done_again(store: Store) -> None:
    def plan(left_out: Collection[str]) -> WorkPlan[int]:
        found = missing(store)
        if len(found.units) == 5:
            commit_rollouts(store, 0, UNITS[0])  # by another worker, just after the plan
        return found

    done: list[str] = []

    def work(unit: str, seed: int) -> int:
        done.append(unit)
        return commit_rollouts(store, seed, unit).counts["P"]

    for _ in range(3):
        run(store, work, plan=plan)
    assert sorted(done) == sorted(UNITS[1:])


def test_a_long_unit_keeps_its_claim(store: Store) -> None:
    now_s = 0.0
    other = Claims(store.storage, worker="other", lease_s=0.2, clock=lambda: now_s)
    beats: list[str] = []

    def work(unit: str, seed: int) -> int:
        nonlocal now_s
        while len(beats) < 4:
            names = [each.name for each in store.storage.files("claims")]
            if names != beats[-1:]:
                beats.extend(names[-1:])
                other.refresh(shard_of(unit))
                now_s += 0.2
        other.refresh(shard_of(unit))
        assert other.take(unit) is None
        return commit_rollouts(store, seed, unit).counts["P"]

    run_worker(
        job(store, lambda left_out: missing(store, UNITS[:1]), work),
        Work(worker_name="w", lease_seconds=0.2, idle_exit=0.01, poll=0.01),
        stop=threading.Event(),
    )
    assert failed_units(store.storage) == {}
    assert store.head().unit_keys() == set(UNITS[:1])


def run_pool(
    store: Store, *arguments: object
) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """Return the exit code of each worker process, and event -> [(unit, worker)]."""
    log = Path(store.url).with_name("events")
    result = subprocess.run(
        [sys.executable, worker_pool.__file__, store.url, log, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    events: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for line in log.read_text().splitlines():
        event, unit, worker = line.split("\t")
        events[event].append((unit, worker))
    return result.stdout.split(), events


@pytest.mark.timeout(600)
def test_three_workers_with_kills_and_stops_do_all_units_once(
    counts: Callable[[int, int], int],
) -> None:
    for seed in range(counts(1, 10)):
        with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            check_pool(open_store(Path(folder) / "cask", create=True), seed)


def check_pool(store: Store, seed: int) -> None:
    codes, events = run_pool(
        store, "--workers", 3, "--units", 60, "--kill-share", 0.1, "--hangs", 3, "--seed", seed
    )
    assert set(codes) == {"0", "-9"}
    segments = store.head().segments
    assert {s.unit_key for s in segments} == {key("fleet", n) for n in range(60)}
    assert len(segments) == 60 >= store.head().number + 1
    assert 60 < len(events["started"]) < 1.6 * 60
    assert failed_units(store.storage) == {}
    assert verify(store, deep=True).orphans == ()

    stored = {(s.unit_key, s.unit["worker"]) for s in segments}
    assert set(events["committed"]) == stored, (
        "each worker that reports its commit has it in the store"
    )
    assert not stored & set(events["suppressed"])
    # Of the three stopped workers, two wake too late, and one before the other commits.
    first = [pair in stored for pair in events["stopped"]]
    assert first == [False, False, True]
    late = {unit for unit, _ in events["suppressed"]}
    assert late.issuperset(unit for unit, _ in events["stopped"])
    still = {unit for unit, _ in events["still claimed"]}
    assert still == {unit for unit, _ in events["stopped"]}, "a worker removed another's claim"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_worker_that_is_killed_ten_times_repeats_at_most_the_current_unit(
    store: Store, when: str
) -> None:
    codes, events = run_pool(store, "--units", 25, "--kill-second", when, "--kills", 10)
    assert codes == ["-9"] * 10 + ["0"]
    assert {s.unit_key for s in store.head().segments} == {key("fleet", n) for n in range(25)}
    assert len(events["started"]) == (35 if when == "before" else 25)


def test_a_unit_error_is_tried_once_over_all_workers(store: Store) -> None:
    tried: Counter[str] = Counter()

    def work(unit: str, seed: int) -> int:
        tried[unit] += 1
        if unit == UNITS[2]:
            raise UnitError("id 7 is not one token to both", hint="leave it out")
        if unit == UNITS[3] and tried[unit] < 3:
            raise ZeroDivisionError
        return commit_rollouts(store, seed, unit).counts["P"]

    report = run(store, work)
    assert tried == Counter({unit: 3 if unit == UNITS[3] else 1 for unit in UNITS})
    assert (report.units, report.failed) == (4, 1)
    assert report.first_error == "UnitError: id 7 is not one token to both"
    assert run(store, work, worker="later").failed == 1
    assert tried[UNITS[2]] == 1
    retry_failed(store)
    run(store, work)
    assert tried[UNITS[2]] == 2, "a retried unit runs again"


def test_a_cancelled_wait_is_no_failure_and_leaves_no_claim(store: Store) -> None:
    ticks = Ticks()
    done: list[str] = []

    def work(unit: str, seed: int) -> int:
        if done:
            ticks.set()
            raise Cancelled
        done.append(unit)
        return commit_rollouts(store, seed, unit).counts["P"]

    report = run(store, work, ticks=ticks)
    assert (report.units, report.failed) == (1, 0)
    assert store.head().unit_keys() == set(done)
    assert failed_units(store.storage) == {}
    assert store.storage.files("claims") == []


def test_one_unit_at_a_time_leaves_a_receipt_of_each(store: Store) -> None:
    """Do units by calls: done, held by another worker, failed, and nothing left but the failed."""
    now_s = 0.0

    def work(unit: str, seed: int) -> int:
        if unit == UNITS[2]:
            raise UnitError("id 7 is not one token to both", hint="leave it out")
        return commit_rollouts(store, seed, unit).counts["P"]

    worker = Worker(job(store, lambda left_out: missing(store), work), Work(), clock=lambda: now_s)
    other = Claims(store.storage, worker="other", lease_s=600.0)
    assert other.take(UNITS[0]) is not None
    receipts = [worker.do_one() for _ in range(5)]
    assert [each.claimed for each in receipts] == [True] * 4 + [False]
    assert sorted(each.units for each in receipts[:4]) == [0, 1, 1, 1]
    assert sum(each.positions for each in receipts) == sum(
        s.counts["P"] for s in store.head().segments
    )
    last = receipts[-1]
    assert (last.missing, last.left_out, last.done, last.total) == (1, 1, 3, 5)
    assert not last.over, "another worker has a unit"
    now_s = 600.0
    assert worker.do_one().units == 1, "its claim is dead"
    assert worker.do_one().over
    assert worker.failed == [UNITS[2]]


def test_a_worker_ends_after_a_number_of_units_or_when_all_are_done(store: Store) -> None:
    assert run(store, max_units=2).units == 2
    ticks = Ticks()
    assert run(store, ticks=ticks, until_over=True).units == 3
    assert ticks.waited == 0


def test_a_unit_whose_rollouts_are_deleted_meanwhile_is_no_error(store: Store) -> None:
    base = commit_rollouts(store, 0, student=True)
    scores = make_scores(0, store.read_rollouts(base))

    def work(unit: str, seed: int) -> int:
        delete_rollouts(store, [base])
        return commit_scores(store, base, 0, unit_key=unit, scores=scores).rows

    def plan(left_out: Collection[str]) -> WorkPlan[int]:
        units = {UNITS[0]: 0} if store.head().segments else {}
        return WorkPlan(units=units, done=0, total=1)

    report = run(store, work, plan=plan)
    assert (report.units, report.failed) == (0, 0)
    # An error of the storage itself leaves the unit in the plan.
    with pytest.raises(StoreError, match="no rollout segment"):
        run(store, work)


def test_a_worker_stays_while_units_that_are_done_may_be_deleted(store: Store) -> None:
    ticks = Ticks()

    def plan(left_out: Collection[str]) -> WorkPlan[int]:
        return replace(missing(store), may_shrink=True)

    assert run(store, plan=plan, ticks=ticks, until_over=True).units == 5
    assert ticks.waited == 1, "until it was idle"
