"""Seconds and stretches are those of the files and of the log, worked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.report.panels import Bars, Stretch, Timeline
from logitcask.engine.report.sections.sizes import store_section
from logitcask.engine.report.sections.timeline import join_neighbours, timeline_section
from logitcask.engine.store import open_store
from logitcask.engine.workers.timeline import timeline_file
from tests.engine.cached import make_store, make_unit
from tests.engine.report.made import facts_of


def write_span(
    out: Path, role: str, kind: str, start: float, end: float | None, **more: Any
) -> None:
    file = timeline_file(out, role, "0")
    file.parent.mkdir(parents=True, exist_ok=True)
    line = {"role": role, "process": "0", "kind": kind, "round": None, "version": None}
    line |= {"host": "h", "pid": 1, "start": start, "end": end, **more}
    with file.open("a") as opened:
        opened.write(json.dumps(line) + "\n")


def bars_of(panel: object) -> dict[tuple[str, str], float]:
    assert isinstance(panel, Bars)
    return {(bar.name, bar.group): bar.value for bar in panel.bars}


def test_a_loop_of_processes(tmp_path: Path) -> None:
    write_span(tmp_path, "rollout", "wait", 1000.0, 1010.0)
    write_span(tmp_path, "rollout", "load", 1004.0, 1007.0, version=2)
    write_span(tmp_path, "rollout", "unit", 1010.0, 1015.0, round=1, version=2)
    write_span(tmp_path, "train", "update", 1012.0, None, round=0)
    write_span(tmp_path, "train", "update", 1020.0, 1030.0, round=0, pid=2)
    (seconds, drawn) = timeline_section([facts_of(None, tmp_path)]).panels
    assert bars_of(seconds) == {
        ("rollout 0", "load"): 3,
        ("rollout 0", "unit"): 5,
        # 10 s, of which the load took 3.
        ("rollout 0", "wait"): 7,
        ("train 0", "update"): 10,
    }
    assert isinstance(drawn, Timeline)
    found = [(each.lane, each.group, each.start, each.end) for each in drawn.stretches]
    assert found == [
        ("rollout 0", "wait", 0, 10),
        ("rollout 0", "load", 4, 7),
        ("rollout 0", "unit", 10, 15),
        # It died, and the next process of the lane began at 1020.
        ("train 0", "update without an end", 12, 20),
        ("train 0", "update", 20, 30),
    ]
    assert drawn.stretches[2].label == "unit, round 1, version 2"


def test_many_stretches_are_joined() -> None:
    """Join 1,000 units that follow each other in two blocks, and keep the block of another kind."""
    units = [
        Stretch(lane="a", group="unit", start=at, end=at + 0.9)
        for at in (*range(500), *range(1000, 1500))
    ]
    other = Stretch(lane="a", group="load", start=1200.0, end=1201.0, label="load")
    joined, note = join_neighbours([*units, other], most=10)
    found = {(each.group, each.start, each.end, each.label) for each in joined}
    assert found == {
        ("unit", 0, 499.9, "500 times unit"),
        ("unit", 1000, 1499.9, "500 times unit"),
        ("load", 1200, 1201, "load"),
    }
    assert "Its 1,001 stretches are 3" in note
    assert join_neighbours(units[:10], most=10) == (units[:10], "")


def test_an_inline_loop_has_its_commits_and_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(f"2026-11-30T14:20:{second:02}+00:00" for second in (10, 15, 30, 40))
    monkeypatch.setattr("logitcask.engine.store.log.publish.now", lambda: next(times))
    units = [make_unit(seed) for seed in range(2)]
    store = make_store(tmp_path / "s", units, seconds=[4.0, 0.25])
    lines = (
        {"progress/step": 1, "loss": 1.0, "progress/seconds": 10.0, "train/data_wait": 0.5},
        {"progress/step": 2, "loss": 1.0, "progress/seconds": 30.0, "train/data_wait": 0.25},
        {"progress/step": 2, "eval/loss": 1.0},
    )
    record = {"rollouts": "main", "teacher": "sha256:0", "teacher_name": "big", "loop": {}}
    section = timeline_section([facts_of(store, record=record, metrics=lines)])
    (seconds, drawn) = section.panels
    # Waited 0.5 * 10 + 0.25 * 20 of 30 s, of which the teacher took 4.25 s.
    assert bars_of(seconds) == {
        ("loop", "score"): 4.25,
        ("loop", "rollout and reading"): 5.75,
        ("loop", "update"): 20,
    }
    assert isinstance(drawn, Timeline)
    # Commits of rollouts at 10 and 30 are drawn a second long; scores begin before theirs.
    assert [(each.lane, each.start, each.end) for each in drawn.stretches] == [
        ("rollout main", 0, 1),
        ("score big", 2, 6),
        ("rollout main", 20, 21),
        ("score big", 30, 31),
    ]


def test_the_stages_of_a_demo(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "overlap"
    run.mkdir(parents=True)
    (tmp_path / "demo.json").write_text(json.dumps({"seconds": {"rollout": 4.5, "teacher": 9.5}}))
    lines = ({"progress/step": 1, "loss": 1.0, "progress/seconds": 8.0, "train/data_wait": 0.25},)
    section = timeline_section([facts_of(None, run, record={"teacher": "big"}, metrics=lines)])
    assert bars_of(section.panels[0]) == {
        ("rollout", "rollout"): 4.5,
        ("train the demo's teacher", "train the demo's teacher"): 9.5,
        ("train", "reading"): 2,
        ("train", "update"): 6,
    }
    assert section.absent[0].why.startswith("no store at st")


def test_a_damaged_record_is_named_in_place_of_its_panels(tmp_path: Path) -> None:
    make_store(tmp_path / "s", [make_unit(0)], seconds=[2.5])
    record = tmp_path / "s" / "log" / "0000000001.json"
    record.chmod(0o644)
    record.write_text(record.read_text().replace('"seconds":2.5', '"seconds":9.5'))
    facts = facts_of(open_store(tmp_path / "s"))
    section = timeline_section([facts])
    assert [each.title for each in section.absent] == ["Seconds by stage", "Timeline"]
    assert all(record.name in each.why for each in section.absent)
    sizes = store_section([facts])
    assert "store-arrays" in {panel.id for panel in sizes.panels}
    assert "Newest segments" in {each.title for each in sizes.absent}
