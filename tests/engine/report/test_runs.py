"""Folders as runs, their names, and files that are not whole."""

import json
from pathlib import Path

import pytest

from logitcask.engine.errors import ConfigError, IntegrityError
from logitcask.engine.report.runs import (
    distinct_names,
    find_runs,
    open_run,
    open_runs,
    read_lines,
    store_alone,
)
from tests.engine.cached import make_store, make_unit


def make_run(path: Path, store: Path | None = None, uuid: str = "u") -> Path:
    path.mkdir(parents=True)
    config = {} if store is None else {"config": {"store": {"url": str(store)}}}
    (path / "run.json").write_text(json.dumps({"updates": 3, "store": uuid, **config}))
    return path


def test_targets_are_runs_ablations_and_stores(tmp_path: Path):
    run = make_run(tmp_path / "a")
    assert find_runs(run) == (run,)
    assert find_runs("s3://bucket/store") == ()
    make_store(tmp_path / "st", [make_unit(0)])
    assert find_runs(tmp_path / "st") == ()
    for name in ("objective=opd/seed-1", "objective=opd/seed-0"):
        make_run(tmp_path / "grid" / name)
    (tmp_path / "grid" / "plan.json").write_text("{}")
    assert [path.name for path in find_runs(tmp_path / "grid")] == ["seed-0", "seed-1"]


def test_other_folders_are_refused_with_what_is_near(tmp_path: Path):
    make_run(tmp_path / "demo" / "runs" / "opd")
    with pytest.raises(ConfigError, match="demo holds runs and neither") as error:
        find_runs(tmp_path / "demo")
    assert error.value.hint == f"give a run: {tmp_path / 'demo' / 'runs' / 'opd'}"
    with pytest.raises(ConfigError, match="nothing is not there"):
        find_runs(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty holds nothing and neither"):
        find_runs(tmp_path / "empty")
    (tmp_path / "empty" / "logs").mkdir()
    with pytest.raises(ConfigError) as error:
        find_runs(tmp_path / "empty")
    assert "the trainer of this loop has not begun" in error.value.hint


def test_names_are_as_short_as_they_can_be():
    paths = [Path("/x/a/run"), Path("/x/b/run"), Path("/x/b/c")]
    assert distinct_names(paths) == ["a/run", "b/run", "b/c"]
    assert distinct_names([Path("/run"), Path("/a/run")]) == ["/run", "a/run"]
    assert distinct_names([Path("/x/a/run")]) == ["run"]


def test_a_line_that_is_being_written_is_left(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_lines(file) == ({"a": 1}, {"a": 2})
    file.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(IntegrityError, match=r"line 2 is no JSON object"):
        read_lines(file)
    assert read_lines(tmp_path / "none.jsonl") == ()


def test_a_run_is_read_without_its_store(tmp_path: Path):
    store = make_store(tmp_path / "st", [make_unit(0)])
    lost = open_run(make_run(tmp_path / "lost", tmp_path / "gone"))
    other = open_run(make_run(tmp_path / "other", tmp_path / "st", "another"))
    known = open_run(make_run(tmp_path / "known", tmp_path / "st", store.uuid))
    bare = open_run(make_run(tmp_path / "bare"))
    assert (lost.store, other.store, bare.store) == (None, None, None)
    assert "gone is not a logitcask store" in lost.store_missing
    assert f"holds store {store.uuid}, and the run read another" in other.store_missing
    assert bare.store_missing == "run.json does not say where its store is"
    assert known.snapshot == store.head()
    assert (known.store_missing, known.planned, known.done) == ("", 3, 0)
    (tmp_path / "known" / "run.json").write_text("{")
    with pytest.raises(IntegrityError, match="damaged"):
        open_run(tmp_path / "known")


def test_evaluations_of_both_files_are_in_order(tmp_path: Path):
    run = make_run(tmp_path / "a")
    rows = [{"progress/step": 0, "eval/accuracy": 0.1}, {"progress/step": 5, "loss": 1.0}]
    rows.append({"progress/step": 9, "eval/accuracy": 0.4})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "evaluations.jsonl").write_text('{"version": 5, "progress/step": 5, "eval/n": 2}\n')
    (facts,) = open_runs([run])
    assert [line["progress/step"] for line in facts.evaluated] == [0, 5, 9]
    assert facts.done == 5


def test_a_store_alone_has_no_record(tmp_path: Path):
    make_store(tmp_path / "st", [make_unit(0)])
    facts = store_alone(tmp_path / "st")
    assert (facts.name, facts.record, facts.updates) == ("st", {}, ())
    assert facts.snapshot is not None
