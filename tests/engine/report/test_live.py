"""The section of a run that goes on: worked by hand from a store, a timeline and metrics."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from logitcask.engine.report.panels import Bars, Lines, Section, Table
from logitcask.engine.report.runs import RunFacts
from logitcask.engine.report.sections import live
from logitcask.engine.report.sections.live import live_section
from logitcask.engine.report.sections.state import (
    Commits,
    Pace,
    RunState,
    run_pace,
    run_state,
    utc,
)
from logitcask.engine.store import Store
from logitcask.engine.store.log.claims import Claims, claimed_units
from logitcask.engine.workers.timeline import span, timeline_file
from tests.engine.cached import make_store, make_unit
from tests.engine.report.made import facts_of

UNIT = "sha256:" + "ab" * 32
RECORD = {
    "rollouts": "main",
    "teacher_name": "big",
    "loop": {"rounds": 5, "prompts_per_round": 6, "updates_per_round": 2},
    "config": {
        "rollout": {"n": 2},
        "loop": {"max_unscored_bytes": 4096},
        "work": {"lease_seconds": 60.0},
    },
}


def updates(count: int, seconds: float = 3.0) -> tuple[dict[str, float], ...]:
    """Return lines of updates of 100 positions each; the first is slow, as a first one is."""
    return tuple(
        {
            "loss": 1.0,
            "progress/step": step,
            "progress/positions": 100 * step,
            "progress/seconds": 50 + seconds * step,
        }
        for step in range(1, count + 1)
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    units = [make_unit(seed) for seed in range(4)]
    return make_store(tmp_path_factory.mktemp("store") / "s", units, scored=3)


@pytest.fixture
def facts(store: Store, tmp_path: Path) -> RunFacts:
    (tmp_path / "metrics.jsonl").write_text("")
    os.utime(tmp_path / "metrics.jsonl", (1_800_000_000, 1_800_000_000))
    return facts_of(store, tmp_path, record=RECORD, metrics=updates(4))


def tables(section: Section) -> dict[str, Table]:
    return {each.id: each for each in section.panels if isinstance(each, Table)}


def test_queue_rounds_and_pace_are_those_of_the_store_and_the_metrics(
    facts: RunFacts, store: Store
) -> None:
    (facts.path / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    section = live_section(facts)
    found = tables(section)
    (waiting,) = [each for each in store.head().rollouts("main") if each.first == 9]
    assert found["live-queue"].rows == (
        (1.0, 6.0, float(waiting.rows), float(waiting.size), 4096.0),
    )
    (rounds,) = [each for each in section.panels if isinstance(each, Bars)]
    # 12 sequences a round: 24 are sampled, 18 scored; 4 updates are the first two rounds.
    assert {bar.name: bar.value for bar in rounds.bars} == {
        "planned": 5.0,
        "sampled": 2.0,
        "scored": 1.5,
        "trained": 2.0,
    }
    now = {row[0]: row[1] for row in found["live-now"].rows}
    assert now["State"] == "running"
    assert now["Updates"] == "4 of 10"
    assert now["Time left"] == "18 s, until 08:00:18 UTC", "6 updates of 3 s"
    (train,) = [row for row in found["live-rates"].rows if row[0] == "train"]
    assert train == ("train", pytest.approx(100 / 3), 9.0, pytest.approx(20.0), None)
    assert {each.title for each in section.absent} == {"Processes", "Last evaluation"}


def test_scores_of_other_rollouts_and_teachers_do_not_count(facts: RunFacts, store: Store) -> None:
    other = replace(facts, record={**RECORD, "teacher_name": "small"})
    assert tables(live_section(other))["live-queue"].rows[0][0] == 4.0
    scored = {row[0]: row[4] for row in tables(live_section(facts))["live-rates"].rows}
    positions = [each.rows for each in store.head().rollouts("main")]
    assert scored["rollout"] == sum(positions)
    assert scored["score"] == sum(positions[:3])


def test_a_run_without_a_store_or_a_second_update_says_so(tmp_path: Path) -> None:
    section = live_section(facts_of(None, tmp_path, record=RECORD, metrics=updates(1)))
    now = {row[0]: row[1:] for row in tables(section)["live-now"].rows}
    assert now["Time left"] == ("-", "not known before the second logged update")
    assert now["State"][0] == "stopped", "no lock is there"
    assert ("Queue and rates", "no store at st") in {(e.title, e.why) for e in section.absent}


def test_processes_are_those_of_the_timeline(
    facts: RunFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, 130.0, 130.0, 160.0, 200.0, 201.0])
    monkeypatch.setattr("time.time", lambda: next(times))
    file = timeline_file(facts.path, "score", "0")
    with span(file, "unit", round=0, version=1):
        pass
    with span(file, "wait"):
        pass
    with span(file, "unit", round=1, version=2):
        (row,) = tables(live_section(facts))["live-processes"].rows
    # At work for 30 of the 100 seconds up to its newest line.
    assert row[:5] == ("score-0", "unit (round 1, version 2)", utc(200.0), 0.3, 0.0)


def test_claims_are_those_of_the_store(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [make_unit(1)])
    facts = facts_of(store, tmp_path, record=RECORD)
    assert "live-claims" not in tables(live_section(facts))
    claim = Claims(store.storage, worker="w-score-0", lease_s=60).take(UNIT)
    assert claim is not None
    assert claim.renew()
    (found,) = claimed_units(store.storage)
    assert (found.unit_key, found.worker, found.renewals) == (UNIT, "w-score-0", 1)
    (row,) = tables(live_section(facts))["live-claims"].rows
    assert row == (
        "w-score-0",
        "ab" * 6,
        utc(found.renewed),
        1.0,
        utc(found.renewed + 60),
    )
    claim.release()
    store.storage.create(f"claims/ab/{'cd' * 31}.0000000000", b"{")
    assert [each.worker for each in claimed_units(store.storage)] == [""], "torn by a power cut"


def test_the_pace_is_that_of_the_newest_updates(facts: RunFacts) -> None:
    slow, fast = updates(20, 9.0), updates(40, 0.5)
    shift = slow[-1]["progress/seconds"] - fast[19]["progress/seconds"]
    late = [{**line, "progress/seconds": line["progress/seconds"] + shift} for line in fast[20:]]
    found = run_pace(replace(facts, metrics=(*slow, *late)))
    assert found == Pace(
        done=40,
        planned=10,
        seconds_per_update=pytest.approx(0.5),
        positions_per_second=pytest.approx(200.0),
        over=10,
        at=1_800_000_000.0,
    )
    assert found.left_s == 0.0, "never less"
    trained = replace(facts, metrics=updates(3), record={"updates": 7})
    assert (run_pace(trained) or found).left == 4


def test_the_rate_of_commits_leaves_the_first_ones_positions_out() -> None:
    assert Commits(times=(10.0, 20.0, 30.0), positions=(900, 100, 100)).recent == (10.0, 20.0)
    assert Commits(times=(10.0, 10.0), positions=(5, 5)).recent is None
    many = Commits(times=tuple(map(float, range(100))), positions=(10**6, *[7] * 99))
    assert many.recent == (7.0, 32.0)


def test_the_state_is_read_and_no_lock_is_taken(tmp_path: Path) -> None:
    lock, node = tmp_path / ".lock", os.uname().nodename
    assert run_state(tmp_path) == RunState(name="stopped")
    lock.write_text(f"process {os.getpid()} on {node}")
    assert run_state(tmp_path).name == "running"
    lock.write_text(f"process {2**22 + 5} on {node}")  # above every pid of Linux
    assert run_state(tmp_path).name == "stopped"
    lock.write_text(f"process {2**22 + 5} on another-{node}")
    assert run_state(tmp_path).name == "running", "no host knows the processes of another"
    (tmp_path / "logitcask.json").write_text("{}")
    assert run_state(tmp_path).name == "finished"


def test_lines_are_thinned_and_keep_their_end() -> None:
    chosen = live._thinned(10_000)
    assert (len(chosen), chosen[0], chosen[-1]) == (400, 0, 9_999)
    commits = Commits(times=tuple(map(float, range(0, 6000, 60))), positions=(2,) * 100)
    (panel,) = live._made({"rollout": commits, "score": Commits(times=(), positions=())})
    assert isinstance(panel, Lines)
    assert (panel.series[0].x[-1], panel.series[0].y[-1]) == (99.0, 200.0)


def test_a_time_of_another_day_has_its_date() -> None:
    day = 1_800_000_000.0
    assert utc(day + 3600, day_of=day) == "09:00:00"
    assert utc(day + 86_400, day_of=day) == "2027-01-16 08:00:00"
