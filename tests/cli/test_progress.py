"""Progress on stderr: lines of a log file with rate and remaining time, and the bars' text."""

import re
from typing import Any

import pytest

from logitcask.cli import progress
from logitcask.cli.progress import FIRST_LINE_S, LINES_EVERY_S, NOUNS, Pace, duration, plain_lines
from logitcask.engine.types import Detail, unit_report
from tests.cli.conftest import ROLL, SCORE, TRAIN, World


class Log:
    """Lines of a log file, and a clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.lines: list[str] = []
        self.progress = plain_lines(NOUNS, self.lines.append, clock=lambda: self.now_s)


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
            report = unit_report(shown, "rollout", done, 2, 100 * done)
            report(Detail(0, "0/4 sequences"))
            report(Detail(100, "4/4 sequences [x]", 0.75))
    err = capfd.readouterr().err
    assert re.search(
        r"rollout units .* 1/2 .* unit 2: 4/4 sequences \[x\], \S+ positions/s, 0 s", err
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (240, "4 min"), (9000, "2.5 h")]
)
def test_durations_have_one_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


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
