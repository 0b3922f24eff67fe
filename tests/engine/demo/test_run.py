"""The fast demo: one complete run, then other objectives from its store."""

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.cli.main import run
from logitcask.engine.demo import DemoResult, run_demo
from logitcask.engine.demo import run as demo_run
from logitcask.engine.errors import ConfigError, ObjectiveError
from logitcask.engine.report.build import build_report
from logitcask.engine.store import open_store
from logitcask.engine.store.verify import verify
from logitcask.engine.types import Scores

KEYS = [
    "student_before",
    "student_after",
    "teacher",
    "gap_recovery",
    "overlap_ratio_before",
    "overlap_ratio_after",
    "overlap_mass_before",
    "overlap_mass_after",
    "positions",
    "bytes_per_position",
    "seconds",
    "report_bytes",
]


@pytest.fixture(scope="module", autouse=True)
def half() -> Iterator[None]:
    """Halve the rollouts of the fast size, with models of that size."""
    scale = replace(demo_run.FAST, prompts=750, unit_prompts=75, evaluation=300, heldout=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "FAST", scale)
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", fast=True)


def test_the_student_comes_closer_to_its_teacher(first: DemoResult):
    assert first.teacher > 0.92
    assert 0.40 < first.student_before < 0.70
    assert first.student_after > first.student_before + 0.15
    gap = first.teacher - first.student_before
    assert first.gap_recovery == (first.student_after - first.student_before) / gap
    assert 0 < first.overlap_ratio_before < 1
    assert first.overlap_mass_after > first.overlap_mass_before > 0.9


def test_the_report_states_the_share_of_the_gap(first: DemoResult):
    report = build_report(first.out / "runs" / first.objective)
    closed = f"the student closed {100 * first.gap_recovery:.0f} % of the gap to the teacher"
    (sentence,) = (each.text for each in report.summary if "Accuracy" in each.text)
    assert closed in sentence
    assert (
        f"from {100 * first.student_before:.1f} % to {100 * first.student_after:.1f} %" in sentence
    )


def test_json_has_these_keys_and_plain_numbers(first: DemoResult):
    content = first.as_json()
    assert list(content) == KEYS
    assert set(content["seconds"]) == {
        "teacher",
        "student",
        "rollout",
        "score",
        "train",
        "evaluate",
        "report",
    }
    assert all(type(value) in (int, float) for key, value in content.items() if key != "seconds")


def test_table_has_the_same_numbers(first: DemoResult):
    text = first.as_text()
    assert f"{first.student_after:.1%}" in text
    assert f"{first.positions:,}" in text
    assert f"--out {first.out} --objective forward_kl --fast" in text
    full = replace(first, fast=False, seed=3, objective="forward_kl").as_text()
    assert f"logitcask demo --out {first.out} --objective overlap --seed 3\n" in full


def test_it_ends_with_the_path_of_the_report(first: DemoResult) -> None:
    file = first.out / "report.html"
    data = file.read_bytes()
    end = f"report: {file} ({len(data) / 1024:,.0f} KiB); open it in a browser"
    assert first.as_text().splitlines()[-1] == end
    assert len(data) == first.report_bytes < 2_000_000
    assert data.startswith(b"<!DOCTYPE html>")
    assert first.seconds["report"] < first.seconds["train"]


def test_store_is_whole_and_of_many_segments(first: DemoResult):
    store = open_store(first.out / "store")
    snapshot = store.head()
    report = verify(store)
    assert len(snapshot.rollouts("main")) == 10
    assert report.segments == first.segments == 22
    assert first.positions == sum(s.counts["P"] for s in snapshot.rollouts("main"))
    held = sum(s.counts["P"] for s in snapshot.rollouts("heldout"))
    files = sum(f.stat().st_size for f in (first.out / "store" / "seg").rglob("*") if f.is_file())
    assert first.bytes_per_position == pytest.approx(files / (first.positions + held))


def test_another_objective_only_trains(first: DemoResult, monkeypatch: pytest.MonkeyPatch):
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    for stage in ("run_rollout", "run_score", "pretrain_to_at_least", "pretrain_between"):
        monkeypatch.setattr(demo_run, stage, never)
    made = {f: f.stat().st_mtime_ns for f in (first.out / "store").rglob("*") if f.is_file()}

    shown = shlex.split(first.as_text().rpartition("scoring: ")[2].splitlines()[0])
    assert shown.pop(0) == "logitcask"
    assert run(shown) == 0
    runs = {f: f.stat().st_mtime_ns for f in (first.out / "runs").rglob("*.safetensors")}
    again = run_demo(first.out, fast=True, objective="forward_kl")
    assert runs == {f: f.stat().st_mtime_ns for f in (first.out / "runs").rglob("*.safetensors")}
    same = ("student_before", "teacher", "overlap_ratio_before", "overlap_mass_before", "positions")
    assert all(getattr(again, name) == getattr(first, name) for name in same)
    assert again.student_after > again.student_before + 0.15
    assert again.student_after != first.student_after
    assert again.reused == ("teacher", "student", "rollout", "score")
    assert all(again.seconds[stage] == 0 for stage in again.reused)
    assert again.seconds["train"] > 0
    assert "nothing was sampled and nothing was scored" in again.as_text()
    assert made == {
        f: f.stat().st_mtime_ns for f in (first.out / "store").rglob("*") if f.is_file()
    }

    # Nor does the first objective train again; its report has the other one too.
    third = run_demo(first.out, fast=True)
    page = third.report.read_text()
    assert '"runs":["overlap","forward_kl"]' in page
    assert third.student_after == first.student_after
    assert runs == {f: f.stat().st_mtime_ns for f in (first.out / "runs").rglob("*.safetensors")}


def test_another_seed_or_size_in_the_same_folder_is_refused(first: DemoResult):
    with pytest.raises(ConfigError, match="holds a demo with seed = 0, not 1") as error:
        run_demo(first.out, fast=True, seed=1)
    assert "another --out" in error.value.hint
    with pytest.raises(ConfigError, match="holds a demo with fast = True, not False"):
        run_demo(first.out)


def test_other_folders_stay_untouched(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not the folder of a demo"):
        run_demo(tmp_path, fast=True)
    with pytest.raises(ConfigError, match="is not the folder of a demo"):
        run_demo(tmp_path / "thesis.txt", fast=True)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


def test_unknown_objective_is_refused_at_the_start(tmp_path: Path):
    with pytest.raises(ObjectiveError, match="overlop"):
        run_demo(tmp_path / "out", fast=True, objective="overlop")
    assert not (tmp_path / "out").exists()


def test_stages_use_one_thread_and_give_the_others_back():
    def failing_stage() -> None:
        with demo_run.one_thread():
            assert torch.get_num_threads() == 1
            raise RuntimeError("in a stage")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="in a stage"):
            failing_stage()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def scores(ids: list[list[int]], p: list[list[float]]) -> Scores:
    """Return scores with ragged rows, filled in as far as the overlap reads them."""
    rows = np.zeros(len(ids), np.float32)
    return Scores(
        lp=rows,
        entropy=rows,
        log_tail=rows,
        cnt=np.array([len(row) for row in ids], np.uint16),
        ids=np.concatenate(ids).astype(np.uint32),
        entry_lp=np.log(np.concatenate(p).astype(np.float32)),
    )


def test_overlap_by_hand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo_run, "K", 2)
    student = scores([[3, 5], [7, 1]], [[0.6, 0.3], [0.8, 0.1]])
    # Its third entries are after K and do not count.
    teacher = scores([[5, 3, 9], [1, 2, 7]], [[0.5, 0.4, 0.1], [0.7, 0.2, 0.05]])
    student, teacher = (demo_run.top(s.cnt, s.ids, s.entry_lp) for s in (student, teacher))
    ratio, mass = demo_run.overlap([student], [teacher])
    assert ratio == pytest.approx((2 + 1) / 4)
    assert mass == pytest.approx((0.9 + 0.1) / 2)
    assert demo_run.overlap([student, student], [teacher, teacher]) == pytest.approx((ratio, mass))
