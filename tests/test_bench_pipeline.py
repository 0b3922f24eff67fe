"""The arithmetic of bench_pipeline.py on made-up timelines, and its loops on three tiny rounds."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

from logitcask.cli.main import cli
from logitcask.engine.workers.timeline import Span

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def modules() -> Iterator[None]:
    """Put the folder of the scripts on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield


@pytest.fixture
def spans() -> ModuleType:
    return import_module("pipeline_spans")


def span(role: str, number: int, start: float, end: float | None, process: str = "0") -> Span:
    """Return one piece of work."""
    return Span(
        role=role,
        process=process,
        kind="update" if role == "train" else "unit",
        round=number,
        version=None,
        host="h",
        pid=1,
        start=1000.0 + start,
        end=None if end is None else 1000.0 + end,
    )


def loop(rounds: int, r: float, s: float, t: float, ahead: int) -> list[Span]:
    """Return the timeline of an ideal loop that samples `ahead` rounds before their update.

    ahead = 0: one stage after the other.
    """
    found, sampled, scored, trained = [], 0.0, 0.0, [0.0] * (rounds + 1)
    for number in range(rounds):
        sampled = max(sampled, trained[max(0, number - ahead)]) + r
        scored = max(scored, sampled) + s
        trained[number + 1] = max(trained[number], scored) + t
        found += [
            span("rollout", number, sampled - r, sampled),
            span("score", number, scored - s, scored),
            span("train", number, trained[number + 1] - t, trained[number + 1]),
        ]
    return found


def test_a_loop_in_turn_takes_the_sum_of_its_stages(spans: ModuleType) -> None:
    found = spans.summary(spans.work_of(loop(5, 1, 2, 3, ahead=0)), positions=600)
    assert found["wall_s"] == pytest.approx(found["sum_s"]) == 30
    assert found["stage_s"] == {"rollout": 5, "score": 10, "train": 15}
    assert found["use"] == pytest.approx({"rollout": 1 / 6, "score": 1 / 3, "train": 1 / 2})
    assert found["at_once"] == pytest.approx({"0": 0, "1": 1, "2": 0, "3": 0})
    assert found["positions_per_s"] == {"rollout": 120, "score": 60, "train": 40}
    # Between its first and its last work, a stage waits for the others.
    assert found["waited_s"] == {"rollout": 20, "score": 16, "train": 12}


@pytest.mark.parametrize(
    ("stages", "floor"),
    [((1, 2, 3), 3 * 8 + 3), ((1, 3, 2), 3 * 8 + 3), ((3, 2, 1), 3 * 8 + 3), ((1, 2, 2), 19)],
    ids=str,
)
def test_a_loop_far_ahead_takes_its_floor(
    spans: ModuleType, stages: tuple[int, int, int], floor: int
) -> None:
    work = spans.work_of(loop(8, *stages, ahead=8))
    assert spans.wall(work) == pytest.approx(spans.floor(work)) == floor


@pytest.mark.parametrize("ahead", range(6))
def test_no_loop_is_faster_than_its_floor_or_slower_than_the_sum(
    spans: ModuleType, ahead: int
) -> None:
    work = spans.work_of(loop(9, 0.5, 1.25, 1, ahead=ahead))
    assert spans.floor(work) <= spans.wall(work) + 1e-9
    assert spans.wall(work) <= spans.summary(work, 1)["sum_s"] + 1e-9
    shares = spans.at_once(work)
    assert sum(shares.values()) == pytest.approx(1)
    # Each second of a role is counted in the share of as many roles as work then.
    busy = sum(count * share for count, share in shares.items()) * spans.wall(work)
    assert busy == pytest.approx(spans.summary(work, 1)["sum_s"])


def test_two_processes_of_a_role_share_its_work(spans: ModuleType) -> None:
    work = spans.work_of(
        [
            span("rollout", 0, 0, 1),
            span("score", 0, 1, 3, "0"),
            span("score", 1, 1, 4, "1"),
            span("score", 2, 4, 5, "0"),
            span("train", 0, 3, 6),
        ]
    )
    assert spans.total(work, "score") == 6
    assert spans.stage(work, "score") == 3
    assert spans.waited(work, "score") == pytest.approx((1 + 0) / 2)
    assert spans.at_once(work)[2] == pytest.approx(2 / 6)


def test_a_span_in_which_a_process_died_is_no_work(spans: ModuleType) -> None:
    whole = loop(2, 1, 1, 1, ahead=0)
    died = [span("rollout", 1, 0.5, None), replace(whole[0], kind="wait", start=0.0)]
    assert spans.work_of([*died, *whole]) == spans.work_of(whole)


def test_a_picture_begins_with_the_first_work(spans: ModuleType) -> None:
    load = replace(span("rollout", 0, -3, -1), kind="load")
    wait = replace(span("score", 0, -2, 1), kind="wait", round=None)
    died = span("score", 0, 1, None)
    assert spans.picture([load, wait, died, *loop(1, 1, 2, 3, ahead=0)]) == [
        ["score", "0", "wait", None, 0.0, 1.0],
        ["rollout", "0", "unit", 0, 0.0, 1.0],
        ["score", "0", "unit", 0, 1.0, 3.0],
        ["train", "0", "update", 0, 3.0, 6.0],
    ]


def test_the_queue_holds_what_is_sampled_and_not_scored(spans: ModuleType) -> None:
    work = spans.work_of(loop(3, 1, 2, 1, ahead=3))
    found = spans.queue(work, {0: 100.0, 1: 200.0, 2: 300.0})
    assert [held for _, held in found] == [100, 300, 200, 500, 300, 0] or found[-1][1] == 0
    assert max(held for _, held in found) == 500
    assert [at for at, _ in found] == sorted(at for at, _ in found)


def test_bars_begin_with_the_weakest() -> None:
    bench = import_module("bench_pipeline")
    turns = [{"wall_s": 100.0, "accuracy": each} for each in (0.5, 0.6, 0.7)]
    at_once = [
        {"wall_s": wall, "floor_s": 40.0, "accuracy": each}
        for wall, each in ((45.0, 0.5), (42.0, 0.6), (41.0, 0.7))
    ]
    ablations = {
        **{"trainings": 3, "wall_s": 52.0},
        **{"rollout_s": 10.0, "score_s": 10.0, "train_s": 10.0},
    }
    measured = {
        "loops": {"synchronous": turns, "asynchronous": at_once},
        "ablations": ablations,
    }
    found = bench.bars(measured)
    assert [(each["value"], each["met"]) for each in found] == [
        (pytest.approx(1.125), False),
        (pytest.approx(1.04), True),
        (0.45, True),
        (0.0, True),
    ]
    assert [each["of_limit"] for each in found] == sorted(
        (each["of_limit"] for each in found), reverse=True
    )


def test_accuracies_are_compared_by_their_spread() -> None:
    difference = import_module("bench_pipeline").difference
    # Standard error of each mean: 0.1 / sqrt(3), of the difference sqrt(2) times that.
    assert difference([0.5, 0.6, 0.7], [0.6, 0.7, 0.8]) == pytest.approx(
        0.1 / (2 * 0.1 * math.sqrt(2 / 3))
    )
    assert difference([0.5], [0.5]) == 0
    assert difference([0.5], [0.6]) == math.inf
    assert difference([0.5, 0.5], [0.5, 0.5]) == 0


class Axes:
    """Axes of a picture that keep the lanes of their bars, and their texts."""

    def __init__(self) -> None:
        self.bars: list[int] = []
        self.texts: list[str] = []

    def barh(self, lane: int, width: float, **_: Any) -> None:
        assert width > 0
        self.bars.append(lane)

    def text(self, x: float, y: float, text: str, **_: Any) -> None:
        self.texts.append(text)


def test_loops_and_ablations_on_three_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run all that needs no process of its own, and fill the tables and the picture."""
    bench, loops = import_module("bench_pipeline"), import_module("pipeline_loops")
    live = import_module("pipeline_live")
    report, stages = import_module("report_pipeline"), import_module("pipeline_stages")
    monkeypatch.setattr(live, "trl_version", lambda: "")
    scale = replace(bench.QUICK, rounds=3, evaluation=4)
    added = stages.Seconds(0.02, 0.03, 0.05)
    models = loops.made_models(tmp_path / "models", trained=False)
    turns = loops.synchronous(scale, added, models, tmp_path / "turns", seed=0)
    assert turns["stage_s"]["rollout"] >= 6 * 0.02
    assert turns["stage_s"]["score"] >= 6 * 0.03
    assert turns["stage_s"]["train"] >= 3 * 0.05
    assert turns["at_once"]["2"] == turns["at_once"]["3"] == 0
    assert turns["floor_s"] < turns["sum_s"] <= turns["wall_s"] <= turns["whole_s"]
    assert turns["ages"] == {"mean": 0, "max": 0}
    assert [held for _, held in turns["queue"]][-1] == 0
    alone = loops.live(scale, added, models, tmp_path / "live")
    assert alone["rounds"] == 3
    assert alone["wall_s"] >= 3 * (2 * 0.02 + 2 * 0.03 + 0.05)
    cost = loops.ablated(scale, added, models, tmp_path / "ablations")
    assert cost["updates"] >= 3
    assert bench.ablation_cost(cost) > 1
    measured = {
        "loops": {"synchronous": [turns], "asynchronous": [turns]},
        "ablations": cost,
    }
    row = {
        **{"bench": "pipeline", "command": "c", "machine": "m", "python": "3", "torch": "2"},
        **{"commit": "0", "live": alone, "live_by": "plain", "scale": vars(scale)},
        **{"target_s": [1, 1, 1], "real_s": turns["stage_s"], "bars": bench.bars(measured)},
        **measured,
    }
    row = json.loads(json.dumps(row))
    assert "**missed**" in report.text(row)
    drawn = Axes()
    lanes = report.draw_work(drawn, {"in turn": row["loops"]["synchronous"][0]["picture"]})
    assert lanes == ["in turn: sampling", "scoring", "updates"]
    assert [drawn.bars.count(lane) for lane in range(3)] == [6, 6, 3]
    assert drawn.texts == ["0", "1", "2"]


def test_the_processes_of_a_loop_are_commands_that_parse(tmp_path: Path) -> None:
    seconds = import_module("pipeline_stages").Seconds(0.5, 1.5, 2.0)
    found = import_module("pipeline_loops").commands(seconds, tmp_path, tmp_path / "loop.toml")
    assert [(each.role, each.leads) for each in found] == [
        *(("rollout", False), ("score", False), ("train", True)),
    ]
    for each in found:
        _, _, added, folder, index, verb, *words = each.argv
        assert (added, folder, index) == ("0.5,1.5,2.0", str(tmp_path), "0")
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        assert command.make_context("logitcask", words).params["role"] == each.role


def test_stretched_stages_are_as_before_afterwards(tmp_path: Path) -> None:
    stages = import_module("pipeline_stages")
    from logitcask.engine.rollout import plan, unit
    from logitcask.engine.training.trainer import DistillTrainer

    def now() -> tuple[Any, ...]:
        return unit.run_rollout_unit, plan.run_rollout_unit, DistillTrainer.training_step

    before = now()
    with stages.stretched(stages.Seconds(), tmp_path):
        assert all(a is not b for a, b in zip(before, now(), strict=True))
    assert now() == before
