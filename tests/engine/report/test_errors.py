"""Errors, retries and bounds are counted as they were written, and none is one sentence."""

from dataclasses import replace
from pathlib import Path

from logitcask.engine.errors import ModelError
from logitcask.engine.report.panels import Table
from logitcask.engine.report.sections.errors import errors_section
from logitcask.engine.store.log.claims import note_failure
from tests.engine.cached import make_store, make_unit
from tests.engine.report.made import facts_of
from tests.engine.report.test_timeline import write_span


def test_failed_units_with_their_last_error(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [make_unit(0)])
    done = store.head().segments[0].unit_key
    lost = "sha256:" + "ab" * 32
    note_failure(store.storage, done, ModelError("a", hint="b"), "w0")
    for message in ("first", "out of memory\nmore"):
        note_failure(store.storage, lost, ValueError(message), "w1")
    (units, _) = errors_section([facts_of(store)]).panels
    assert isinstance(units, Table)
    assert sorted(row[:5] for row in units.rows) == sorted(
        [
            (done[7:15], 1, "made since", "ModelError: a", "w0"),
            ("abababab", 2, "missing", "ValueError: out of memory", "w1"),
        ]
    )
    (note,) = (tmp_path / "s" / "failed" / "ab").glob("*1")
    note.chmod(0o644)
    note.write_text("no note")
    (units, _) = errors_section([facts_of(store)]).panels
    assert isinstance(units, Table)
    assert any("not a note of a failure" in str(row[3]) for row in units.rows)


def test_processes_that_died(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rollout-0.log").write_text("--- 2026-11-30T14:26:55 python -m x\nwaiting\n")
    (logs / "train-0.log").write_text(
        "--- 2026-11-30T14:26:55 python -m x\nCUDA error\n--- no start\n"
        "--- 2026-11-30T14:27:10 python -m x\n 1%\r 2%\rdone\n\n"
    )
    write_span(tmp_path, "rollout", "unit", 1.0, 2.0)
    write_span(tmp_path, "train", "update", 1.0, None)
    write_span(tmp_path, "train", "update", 4.0, None, pid=2)
    (tmp_path / "checkpoints" / "damaged-checkpoint-4").mkdir(parents=True)
    facts = facts_of(None, tmp_path)
    name = tmp_path.name
    aside = "1 damaged checkpoints were kept aside, and not resumed from"
    for locked, without_end in ((True, 1), (False, 2)):
        (found,) = errors_section([replace(facts, locked=locked)]).panels
        assert isinstance(found, Table)
        assert found.rows == (
            (name, "train-0", 2, without_end, "done"),
            (name, "train", None, None, aside),
        )


def test_updates_beyond_the_bounds() -> None:
    lines = tuple(
        {"loss": 1.0, "progress/step": step, "cache/coverage": c, "cache/approx_kl": d}
        for step, c, d in ((1, 0.99, 0.1), (2, 0.7, 0.5), (3, 0.6, 0.3), (4, None, None))
    )
    bounds = {"bounds": {"min_coverage": 0.8, "max_drift": 0.4, "action": "resample"}}
    for preset, rows in (
        ("overlap", [("cache/coverage", "at least 0.8", 2, 3, 0.6, 3)]),
        ("sampled_token", [("cache/approx_kl", "at most 0.4", 1, 3, 0.5, 2)]),
        # Of a version that has other presets.
        (
            "unknown",
            [
                ("cache/coverage", "at least 0.8", 2, 3, 0.6, 3),
                ("cache/approx_kl", "at most 0.4", 1, 3, 0.5, 2),
            ],
        ),
    ):
        facts = facts_of(None, record={"preset": preset, "settings": bounds}, metrics=lines)
        ledger = ({"update": 1}, {"update": 2, "resampled": ["a", "b"]})
        (found, none) = errors_section([replace(facts, ledger=ledger)]).panels
        assert none.title == "No errors of these kinds"
        assert isinstance(found, Table)
        again = ("run", "units sampled again", "0", 1, 2, 2, 2, "resample")
        assert list(found.rows) == [*(("run", *row, "resample") for row in rows), again]


def test_none_is_a_sentence(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [make_unit(0)])
    line = {"loss": 1.0, "progress/step": 1, "cache/coverage": 0.9}
    section = errors_section([facts_of(store, record={"preset": "overlap"}, metrics=(line,))])
    assert not section.absent
    (none,) = section.panels
    assert isinstance(none, Table)
    assert none.title == "No errors"
    assert none.rows == (
        ("Failed units", "none: the store has no note of a unit that failed"),
        ("Processes", "there is one, and no logs of others; no checkpoint was damaged"),
        ("Updates beyond a bound", "none; looked at cache/coverage"),
    )


def test_an_objective_that_is_exact_at_any_age_has_no_bound() -> None:
    line = {"loss": 1.0, "progress/step": 1, "cache/coverage": 0.1}
    section = errors_section([facts_of(None, record={"preset": "forward_kl"}, metrics=(line,))])
    (none,) = section.panels
    assert isinstance(none, Table)
    assert str(none.rows[-1][1]).startswith("no bound counts")
    absent = errors_section([facts_of(None)]).absent
    assert [each.why for each in absent] == [
        "there is no store to look into",
        "there are no lines of updates",
    ]
