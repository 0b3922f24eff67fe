"""Sentences of the summary, by metrics that are worked by hand."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.report.change import Change, change
from logitcask.engine.report.panels import Sentence
from logitcask.engine.report.runs import RunFacts
from logitcask.engine.report.sections.summary import (
    accuracy,
    held_out,
    learned,
    moved,
    overlap,
    trouble,
)
from tests.engine.report.made import facts_of

Line = Mapping[str, Any]


def lines(**metrics: Sequence[float | None]) -> tuple[Line, ...]:
    """Return a line for each update, with a loss and these metrics; a__b is a/b."""
    count = max(map(len, metrics.values()))
    return tuple(
        {
            "progress/step": update + 1,
            "loss": 1.0,
            **{key.replace("__", "/"): values[update] for key, values in metrics.items()},
        }
        for update in range(count)
    )


def run_of(*found: Line, divergence: str = "reverse_kl", **record: Any) -> RunFacts:
    objective = {"divergence": divergence, "k": 4}
    return facts_of(None, record={"objective": objective, "updates": 4, **record}, metrics=found)


def texts(sentences: Iterator[Sentence]) -> list[tuple[str, str]]:
    return [(each.state, each.text) for each in sentences]


def test_the_error_of_a_change_is_the_larger_of_noise_and_reported():
    # Two values have no noise: sqrt(0.03^2 + 0.04^2) = 0.05, and 0.11 is more than twice that.
    both = lines(x=(0.5, 0.61), x_se=(0.03, 0.04))
    found = change(both, "x")
    assert found is not None
    assert (found.before, found.after, found.window) == (0.5, 0.61, 1)
    assert found.error == pytest.approx(0.05)
    assert found.direction == 1
    assert replace(found, after=0.6).direction == 0
    assert replace(found, after=0.39).direction == -1
    # Steps +2 -2 +2 -2 +2: mean square 4, variance of a value 2, of the mean of two 1.
    noisy = change(lines(x=(0, 2, 0, 2, 0, 2), x_se=(0.1,) * 6), "x")
    assert noisy is not None
    assert noisy.window == 2
    assert noisy.error == pytest.approx(math.sqrt(2))
    assert noisy.direction == 0


def test_windows_grow_to_twenty_values_and_skip_what_is_missing():
    ramp = change(lines(x=[float(i) if i % 2 else None for i in range(400)]), "x")
    assert ramp is not None
    # 1, 3, ..., 39 and 361, ..., 399; steps of 2 have the variance 4 / 2.
    assert (ramp.before, ramp.after, ramp.window) == (20.0, 380.0, 20)
    assert ramp.error == pytest.approx(math.sqrt(2 * 2 / 20))
    assert change(lines(x=(1.0,)), "x") is None
    unknown = change(lines(x=(1.0, 2.0)), "x")
    assert unknown is not None
    assert (unknown.error, unknown.direction) == (None, 0)


@pytest.mark.parametrize(
    ("found", "unit", "text"),
    [
        ((0.5, 0.61, 0.05), "%", "rose from 50.0 to 61.0 %"),
        ((0.9977, 0.9988, 1e-5), "%", "rose from 99.77 to 99.88 %"),
        ((-0.02, -0.003, 1e-4), "nats", "rose from -0.02 to -0.003 nats"),
        ((0.5, 0.4, 0.2), "%", "went from 50.0 to 40.0 %, within the noise"),
        ((0.5, 0.4, None), "%", "went from 50.0 to 40.0 %, with an unknown error"),
        ((0.5, 0.5, 0.1), "nats", "stayed near 0.5 nats"),
    ],
)
def test_a_change_in_words(found: tuple[float, float, float | None], unit: str, text: str):
    before, after, error = found
    assert moved(Change(before=before, after=after, window=1, error=error), unit) == text


SE = 0.001


Two = tuple[float, float]


def overlap_of(ratio: Two, mass: Two, **how: str) -> tuple[str, str]:
    found = lines(
        overlap__ratio=ratio,
        overlap__ratio_se=(SE, SE),
        overlap__mass_student=mass,
        overlap__mass_student_se=(SE, SE),
    )
    return texts(overlap(run_of(*found, **how)))[0]


def test_ratio_and_mass_are_read_together():
    falls = "Overlap mass rose from 90.0 to 95.0 %, and the overlap ratio fell from 50.0 to 40.0 %"
    assert overlap_of((0.5, 0.4), (0.9, 0.95)) == (
        "good",
        f"{falls}: usual under reverse KL, which hardly moves improbable ids; read the mass.",
    )
    assert overlap_of((0.5, 0.4), (0.9, 0.95), divergence="forward_kl") == ("neutral", f"{falls}.")
    state, text = overlap_of((0.5, 0.6), (0.95, 0.9))
    assert (state, "moves probability to ids" in text) == ("warning", True)
    assert overlap_of((0.5, 0.6), (0.9, 0.9))[0] == "good"
    # 0.002 is less than two errors of sqrt(2) * 0.001.
    assert overlap_of((0.5, 0.502), (0.9, 0.902)) == (
        "neutral",
        "Overlap mass went from 90.00 to 90.20 %, within the noise, and the overlap ratio went "
        "from 50.00 to 50.20 %, within the noise.",
    )


def test_advantage_gap_and_entropy():
    names = ("overlap__advantage", "entropy__gap", "entropy__student", "entropy__teacher")
    errors = {f"{name}_se": (SE, SE) for name in names}
    values = dict(zip(names, ((-0.2, -0.1), (0.1, 0.3), (0.5, 0.1), (0.4, 0.4)), strict=True))
    found = texts(learned(run_of(*lines(**values, **errors))))
    assert found[:2] == [
        ("good", "The overlap advantage rose from -0.2 to -0.1 nats towards 0, where both agree."),
        ("warning", "The entropy gap rose from 0.1 to 0.3 nats."),
    ]
    state, text = found[2]
    assert state == "warning"
    assert "The student's entropy fell to 0.1 nats, and the teacher's is 0.4" in text
    values["entropy__student"] = (0.5, 0.25)
    assert len(texts(learned(run_of(*lines(**values, **errors))))) == len(found) - 1


def evaluated(*rows: Line) -> RunFacts:
    return run_of(*({"progress/step": 10 * n, **row} for n, row in enumerate(rows)))


def test_accuracy_and_the_gap_to_the_teacher():
    rows = [{"eval/avg_at_n": x, "eval/avg_at_n_se": 0.01} for x in (0.5, 0.8, 0.9)]
    assert texts(accuracy(evaluated(*rows))) == [("good", "Accuracy rose from 50.0 % to 90.0 %.")]
    rose = "Accuracy rose from 50.0 % to 90.0 % (teacher 95.0 %): the student closed"
    assert texts(accuracy(evaluated(*rows), 0.95)) == [
        ("good", f"{rose} 89 % of the gap to the teacher.")
    ]
    half = texts(accuracy(evaluated(*rows[:2]), 0.95))
    assert half[0][0] == "neutral"
    assert "closed 67 % of the gap" in half[0][1]
    # A teacher that is no better than the student leaves no gap to close.
    assert "gap" not in texts(accuracy(evaluated(*rows), 0.515))[0][1]
    rows[1] = {"eval/avg_at_n": 0.51, "eval/avg_at_n_se": 0.01}
    assert "no more than the noise" in texts(accuracy(evaluated(*rows[:2])))[0][1]
    (once,) = texts(accuracy(evaluated({"eval/accuracy": 0.25}), name="b"))
    assert once == ("neutral", "b: accuracy is 25.0 % after 0 updates.")
    assert texts(accuracy(evaluated())) == []


def test_held_out_rows():
    rows = [{"eval/loss": 0.2, "eval/overlap/mass_student": 0.9}, {"eval/loss": 0.1}]
    assert texts(held_out(evaluated(*rows))) == [
        ("neutral", "On held-out rows the loss went from 0.2 to 0.1 nats, between update 0 and 10.")
    ]
    rows[1]["eval/overlap/mass_student"] = 0.91
    assert (
        "0.1 nats and the overlap mass from 90.0 to 91.0 %,"
        in texts(held_out(evaluated(*rows)))[0][1]
    )
    assert texts(held_out(evaluated(rows[0]))) == []


def test_trouble_and_nothing_else(tmp_path: Path):
    config = {"train": {"max_grad_norm": 1.0}}
    clean = lines(train__grad_norm=(0.5, 0.9), cache__coverage=(1.0, 0.99))
    (tmp_path / "logitcask.json").touch()
    done = replace(run_of(*clean, preset="opd", config=config), path=tmp_path)
    assert texts(trouble(done)) == []
    bad = lines(train__grad_norm=(0.5, 2.0, 3.0), cache__coverage=(1.0, 0.99, 0.9))
    worse = ({**bad[0], "loss": None}, *bad[1:])
    run = run_of(*worse, preset="opd", config=config)
    found = texts(trouble(run))
    assert [state for state, _ in found] == ["warning", "warning", "warning", "neutral"]
    for (_, text), part in zip(
        found,
        (
            "The run stopped before its end: 3 of 4 updates are logged",
            "not finite in 1 logged updates, first in 1",
            "cache/coverage = 0.900",
            "clipped to norm 1 in 2 of 3 logged updates",
        ),
        strict=True,
    ):
        assert part in text
    (tmp_path / "going").mkdir()
    (tmp_path / "going" / ".lock").touch()
    goes_on = texts(trouble(replace(run, path=tmp_path / "going")))
    assert goes_on[0] == ("neutral", "The run goes on: 3 of 4 updates are logged.")
    aged = replace(done, ledger=({"update": 2, "age": [0, 0.5, 1]},))
    assert "up to 1 update after their sampling" in texts(trouble(aged))[0][1]
