"""Progress on stderr: lines of a log file with rate and remaining time, and the bars' text."""

import re
from typing import Any

import pytest

from logitcask.cli import progress
from logitcask.cli.progress import (
    FIRST_LINE_S,
    LINES_EVERY_S,
    NOUNS,
    Bars,
    Lines,
    Pace,
)
from logitcask.engine.events import counted, download_bar, report_steps, running_step
from logitcask.engine.types import Detail, unit_report
from tests.cli.conftest import ROLL, SCORE, TRAIN, World


class Log:
    """Lines of a log file, and a clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.lines: list[str] = []
        self.shown = Lines(NOUNS, self.lines.append, clock=lambda: self.now_s)
        self.progress = self.shown.report


def test_a_line_shows_the_unit_its_rate_and_the_remaining_time() -> None:
    """Expect 400 s a unit after a quarter of one in 100 s: 8.75 of 12 units are left."""
    log = Log()
    report = unit_report(log.progress, "rollout", 3, 12, positions=500)
    report(Detail())
    log.now_s = 100.0
    report(Detail(341_200, "120/512 sequences", 0.25))
    assert log.lines == [
        "rollout: 3/12 units, unit 4: 120/512 sequences, 3,412 positions/s, 58 min left"
    ]


def test_the_first_line_comes_early_and_others_at_intervals() -> None:
    log = Log()
    for second in range(100):
        log.now_s = float(second)
        log.progress("score", second, 1000, Detail(10 * second))
        assert len(log.lines) == (second >= FIRST_LINE_S) + max(
            0, int((second - FIRST_LINE_S) // LINES_EVERY_S)
        )
    log.progress("score", 1000, 1000, Detail(10_000))
    assert log.lines[-1].startswith("score: 1,000/1,000 units, ")


def test_rounds_add_their_positions_and_an_evaluation_begins_again() -> None:
    pace = Pace.begin(0, Detail(), 0.0)
    assert pace.text(1, 4, Detail(100), 10.0) == "10 positions/s, 30 s left"
    # The next round counts from 0: 100 and 60 in 16 s.
    assert pace.text(1, 4, Detail(0), 10.0) == "10 positions/s, 30 s left"
    assert pace.text(2, 4, Detail(60), 16.0) == "10 positions/s, 16 s left"
    assert pace.text(0, 4, Detail(), 50.0) == ""
    assert pace.text(1, 4, Detail(5), 60.0) == "0.5 positions/s, 30 s left"


def test_bars_show_the_same_text(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with progress._bars(NOUNS) as shown:
        for done in range(2):
            report = unit_report(shown.report, "rollout", done, 2, 100 * done)
            report(Detail(0, "0/4 sequences"))
            report(Detail(100, "4/4 sequences [x]", 0.75))
    err = capfd.readouterr().err
    assert re.search(
        r"rollout units .* 1/2 .* unit 2: 4/4 sequences \[x\], \S+ positions/s, 0 s", err
    )


def test_a_stage_that_reports_nothing_is_shown_after_2_s() -> None:
    log = Log()
    log.progress("train", 0, 8)
    log.now_s = 1.9
    log.shown.refresh()
    assert log.lines == []
    for now_s in (2.0, 3.0, 31.9, 32.0):
        log.now_s = now_s
        log.shown.refresh()
    assert log.lines == ["train: 0/8 updates, 2 s so far", "train: 0/8 updates, 32 s so far"]
    log.progress("train", 8, 8)
    log.now_s = 500.0
    log.shown.refresh()
    assert len(log.lines) == 3, "an ended stage is silent"


def test_a_step_has_a_line_only_while_it_takes_over_2_s() -> None:
    log = Log()
    with report_steps(log.progress):
        with running_step("load big"):
            log.now_s = 1.0
            log.shown.refresh()
        with running_step("hash big", 4 << 30, "bytes") as hashing:
            log.now_s = 4.0
            hashing.add(3 << 30)
        with pytest.raises(FileNotFoundError), running_step("load other"):
            raise FileNotFoundError
        for number in counted("read prompts.jsonl", range(9), unit="prompts", every_s=0):
            log.now_s += number == 7 and 40.0
        log.progress("rollout", 0, 4)
        with running_step("save student"):
            log.now_s += 5
            log.shown.refresh()
        log.now_s += 5
        log.shown.refresh()
    assert log.lines == [
        "hash big: 3 GiB/4 GiB, 1 s left",
        "read prompts.jsonl: 8 prompts, 40 s so far",
        "save student: 5 s so far",
        "rollout: 0/4 units, 10 s so far",
    ]


def test_without_a_command_steps_report_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with running_step("load big") as step:
        step.add()
    assert capfd.readouterr() == ("", "")


def test_a_download_counts_the_bytes_on_the_disk_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Drive the bars as `snapshot_download` does: one of files, one of the network, one of bytes.

    The total grows while files are found.
    """
    log = Log()
    with report_steps(log.progress), running_step("download org/name", unit="bytes") as step:
        kind = download_bar(step)
        network = kind(total=0, unit="B", unit_scale=True, desc="Downloading bytes")
        disk = kind(total=0, unit="B", unit_scale=True, desc="Reconstructing (incomplete total...)")
        for _ in kind(range(3), desc="Fetching 3 files"):
            log.now_s += 1
            disk.total += 1 << 20
            network.update(1 << 20)
            disk.update(1 << 20)
    assert log.lines == ["download org/name: 2 MiB/2 MiB, 2 s so far"]
    assert step.done == 3 << 20
    assert capfd.readouterr() == ("", "")


def test_the_bar_of_a_step_appears_after_2_s_and_goes() -> None:
    import io

    from rich.console import Console
    from rich.progress import Progress

    now_s = 0.0
    shown = Progress(console=Console(file=io.StringIO()))
    bars = Bars(NOUNS, shown, clock=lambda: now_s)
    with report_steps(bars.report):
        with running_step("hash [red]\x1b", 100, "bytes") as step:
            for now_s in (0.0, 1.9, 2.0):
                step.add(20)
                bars.refresh()
                assert [task.visible for task in shown.tasks] == [now_s >= 2]
            (task,) = shown.tasks
            assert (task.completed, task.total) == (60, 100)
            assert task.fields["count"] == "60 B/100 B"
            assert task.description == "hash [red]\\x1b"
        assert shown.tasks == []


def test_every_stage_reports_inside_its_units(
    world: World, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    monkeypatch.setattr(progress, "LINES_EVERY_S", 0.0)
    store, out = world.new("store"), world.new("out")
    world.at("sums.jsonl").write_text('{"id": "e", "prompt": "1 + 1 =", "answer": "2"}\n')
    evaluated = "--eval-prompts @sums.jsonl --eval-n 2 --eval-max-new-tokens 4 --eval-store @st"
    rate = r", [\d.,]+ positions/s"
    for command, patterns in (
        (
            f"{ROLL} {store}",
            [
                rf"rollout: 1/4 units, unit 2: \d/4 sequences{rate}, \d+ s left",
                rf"rollout: 3/4 units, unit 4: (\d+)/\1 positions scored{rate}",
            ],
        ),
        (f"{SCORE} {store}", [rf"score: 1/4 units, unit 2: (\d+)/\1 positions{rate}"]),
        (
            f"{TRAIN} {store} --out {out} {evaluated} --gradient-accumulation-steps 2",
            [
                r"train: 0/\d updates, 1/2 packs",
                rf"train: (\d)/\1 updates{rate}",
                rf"evaluation: 2/2 sequences{rate}",
                rf"held out: 1/\d packs{rate}",
            ],
        ),
    ):
        result = call(command)
        assert result.code == 0, result.err
        for pattern in patterns:
            assert re.search(f"^{pattern}", result.err, re.M), (pattern, result.err)
