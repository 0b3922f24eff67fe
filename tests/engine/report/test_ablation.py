"""The folder of an ablation: its runs over each other, and its table of means."""

import json
from pathlib import Path

import pytest

from logitcask.engine.errors import IntegrityError
from logitcask.engine.report.build import MOST_RUNS, build_report
from logitcask.engine.report.panels import Lines, Table
from tests.engine.report.test_runs import make_run

COUNT = MOST_RUNS + 1


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    for seed in range(COUNT):
        run = make_run(tmp_path / "grid" / "objective=opd" / f"seed-{seed:02}")
        (run / "metrics.jsonl").write_text(f'{{"progress/step": 1, "loss": {seed}}}\n')
    (tmp_path / "grid" / "plan.json").write_text("{}")
    return tmp_path / "grid"


def test_runs_share_panels_and_have_one_table(grid: Path):
    row = {"accuracy": 0.5, "accuracy_sd": 0.25, "n": 2, "objective": "opd", "refused": ""}
    none = {"accuracy": None, "accuracy_sd": None, "n": 0, "objective": "gkd", "refused": "no k"}
    (grid / "ablate.json").write_text(json.dumps({"rows": [row, none]}))
    report = build_report(grid)
    assert report.title == "grid"
    assert report.runs == tuple(f"seed-{seed:02}" for seed in range(MOST_RUNS))
    (table,) = report.sections[0].panels
    assert isinstance(table, Table)
    assert [column.name for column in table.columns] == ["objective", "accuracy", "n", "refused"]
    assert table.rows == (("opd", "0.5 ± 0.25", "2", "-"), ("gkd", "-", "0", "no k"))
    panels = [panel for section in report.sections for panel in section.panels]
    (loss,) = (panel for panel in panels if panel.id == "loss")
    assert isinstance(loss, Lines)
    assert [each.y for each in loss.series] == [(float(seed),) for seed in range(MOST_RUNS)]
    texts = [sentence.text for sentence in report.summary]
    assert f"1 more run is left out, because a page shows {MOST_RUNS}." in texts
    # The table has the results: the summary is of the first run alone.
    assert [text for text in texts if "was trained by" in text] == texts[:1]


def test_an_ablation_without_its_table(grid: Path):
    assert "goes on" in build_report(grid).sections[0].absent[0].why
    (grid / "ablate.json").write_text(json.dumps({"rows": [{"n": 1}, {}]}))
    with pytest.raises(IntegrityError, match="is no table of an ablation"):
        build_report(grid)
