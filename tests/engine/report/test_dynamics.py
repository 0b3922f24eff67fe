"""Panels of metrics over updates: lines, bands, axes, and lines that are too long."""

from typing import Any

import pytest

from logitcask.engine.report.panels import Lines
from logitcask.engine.report.sections.dynamics import (
    MOST_POINTS,
    dynamics,
    part_of,
    series_of,
)
from tests.engine.report.made import facts_of


def panels_of(*runs: list[dict[str, Any]]) -> dict[str, Lines]:
    facts = [facts_of(None, record={"updates": 9}, metrics=tuple(lines)) for lines in runs]
    return {each.id: each for each in dynamics(facts).panels if isinstance(each, Lines)}


def update(step: int, **metrics: float | None) -> dict[str, Any]:
    found = {key.replace("__", "/"): value for key, value in metrics.items()}
    return {"progress/step": step, "loss": 1.0, **found}


def test_runs_of_other_lengths_share_a_panel_and_held_out_lines_join():
    first = [update(1, overlap__ratio=0.5, overlap__ratio_se=0.1), update(3, overlap__ratio=None)]
    held_out = {"progress/step": 3, "eval/overlap/ratio": 0.75, "eval/accuracy": 0.2}
    panels = panels_of([*first, held_out], [update(n, overlap__ratio=n / 8) for n in (1, 2, 4)])
    ratio = panels["overlap-ratio"]
    assert [(each.of, each.run, each.x, each.y) for each in ratio.series] == [
        ("overlap ratio", 0, (1.0,), (0.5,)),
        ("held out", 0, (3.0,), (0.75,)),
        ("overlap ratio", 1, (1.0, 2.0, 4.0), (0.125, 0.25, 0.5)),
    ]
    assert (ratio.series[0].low, ratio.series[0].high) == ((0.4,), (0.6,))
    assert ratio.series[2].low == ()
    assert panels["accuracy"].series[0].y == (0.2,)


def test_what_is_missing_says_why():
    section = dynamics([facts_of(None, record={"updates": 9}, metrics=(update(1),))])
    assert [each.id for each in section.panels] == ["loss"]
    missing = {each.title: each.why for each in section.absent}
    assert "--eval-prompts" in missing["Accuracy"]
    (others,) = (title for title, why in missing.items() if "not logged" in why)
    assert "Coverage, Uncached mass" in others
    assert "Skipped positions" not in others


def test_an_axis_is_logarithmic_over_two_decades():
    near = panels_of([update(1, kl__reverse_bound=0.02), update(2, kl__reverse_bound=1.9)])
    far = panels_of([update(1, kl__reverse_bound=0.02), update(2, kl__reverse_bound=2.0)])
    zero = panels_of([update(1, kl__reverse_bound=0.0), update(2, kl__reverse_bound=2.0)])
    assert [each["kl"].y.form for each in (near, far, zero)] == ["", "log", ""]


def test_speed_is_positions_over_seconds_between_lines():
    lines = [
        update(1, progress__positions=100, progress__seconds=4.0),
        update(2, progress__positions=400, progress__seconds=10.0),
        update(3, progress__positions=500, progress__seconds=9.0),  # resumed
        update(4, progress__positions=600, progress__seconds=11.0),
    ]
    (speed,) = panels_of(lines)["rate"].series
    assert (speed.x, speed.y) == ((1.0, 2.0, 4.0), (25.0, 50.0, 50.0))


@pytest.mark.parametrize("count", [MOST_POINTS, MOST_POINTS + 1, 12_345])
def test_a_long_line_keeps_its_mean_and_its_spikes(count: int):
    points = [(step, float(step % 7), None) for step in range(count)]
    points[count // 3] = (count // 3, 99.0, None)
    points[count // 2] = (count // 2, -99.0, None)
    part = part_of(points, 1)
    assert (part == 1) == (count <= MOST_POINTS)
    line = series_of("loss", 0, points, part)
    assert len(line.x) == len(line.y) <= MOST_POINTS
    assert line.x[-1] == count - 1
    assert list(line.x) == sorted({*line.x})
    ends = [y for y in (*line.y, *line.low, *line.high) if y is not None]
    assert (min(ends), max(ends)) == (-99, 99)
    whole = count // part
    total = sum(value for _, value, _ in points[: whole * part])
    assert sum(y or 0.0 for y in line.y[:whole]) * part == pytest.approx(total, rel=1e-4)


def test_the_panel_has_a_sentence_on_its_parts_and_many_runs_share_the_points():
    panels = panels_of([update(n) for n in range(2 * MOST_POINTS)])
    assert "the mean of up to 2 values in a row" in panels["loss"].how
    assert "in a row" not in panels_of([update(n) for n in range(MOST_POINTS)])["loss"].how
    both = panels_of(*[[update(n) for n in range(MOST_POINTS)]] * 2)["loss"]
    assert [len(each.x) for each in both.series] == [MOST_POINTS // 2] * 2
