"""`rollout --grader`: stored rewards, their output, and errors of graders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.packing.source import PackSource
from logitcask.engine.store import open_store
from tests.cli.conftest import ROLL, SCORE, UNITS, World

GRADER = """
def even(prompt, response):
    return float(sum(map(ord, response)) % 2 == 0)

def never(prompt, response):
    raise KeyError(response)
"""


@pytest.fixture(autouse=True)
def grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our_grading.py").write_text(GRADER)
    monkeypatch.syspath_prepend(tmp_path)


def test_rewards_are_stored_and_shown(world: World, call: Any) -> None:
    store = world.new("store")
    report = call(f"{ROLL} {store} --grader our_grading:even --format json").json
    opened = open_store(world.at(store))
    units = [opened.read_rollouts(s) for s in opened.head().rollouts("main")]
    rewards = np.concatenate([np.asarray(unit.reward) for unit in units])
    assert set(rewards.tolist()) == {0.0, 1.0}
    mean = pytest.approx(rewards.mean(dtype=float))
    assert report["mean_reward"] == mean
    assert call(f"store info {store} --format json").json["mean_reward"] == {"main": mean}
    rows = call(f"store ls {store} --format json").json
    assert [row["mean_reward"] for row in rows] == [np.mean(unit.reward) for unit in units]
    assert "grader our_grading:even" in rows[0]["request"]
    for i in range(4):
        output = call(f"store show {store} --sequence {i} --format json").json
        assert output["reward"] == rewards[i]
    assert call(f"store verify {store} --deep").code == 0
    assert call(f"{SCORE} {store}").code == 0
    rows = call(f"store ls {store} --format json").json
    assert [row["mean_reward"] for row in rows[UNITS:]] == [None] * UNITS


def test_a_store_without_rewards_has_no_mean_reward(world: World, call: Any) -> None:
    assert call("store info @st --format json").json["mean_reward"] == {}
    assert "reward" not in call("store show @st --format json").json


def test_distill_grades_each_round(world: World, call: Any) -> None:
    store, out = world.new("store"), world.new("out")
    loop = f"distill @d.toml --set store.url={world.at(store)} --set run.out={world.at(out)}"
    # Refused before a model is loaded: no grader, or one response per prompt.
    loop += " --set train.objective=opd+reward"
    call(loop).assert_error(1, "these rollouts have none", "--grader exact")
    loop += " --set rollout.grader=our_grading:even"
    call(f"{loop} --set rollout.n=1").assert_error(1, "1 response per prompt", "--n 4")
    report = call(loop)
    assert report.code == 0
    assert "reward: one draw per position, unbiased for the mean reward" in report.err
    lines = (world.at(out) / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["loss"] == pytest.approx(line["loss/distill"] + line["loss/reward"], abs=1e-6)
    opened = open_store(world.at(store))
    source = PackSource(opened, opened.head(), "main", "big")
    assert len(source.pairs) == 2
    for ordinal, (segment, _) in enumerate(source.pairs):
        reward = np.asarray(opened.read_rollouts(segment).reward)
        found = source.pack(np.asarray([[ordinal, 1]])).targets.reward
        assert found is not None
        assert set(found.tolist()) == {float(reward[1])}
    other = loop.replace("our_grading:even", "our_grading:never")
    call(other).assert_error(1, "prompts", "set store.rollouts and run.out to new names")


def test_an_estimate_counts_the_bytes_of_rewards(call: Any) -> None:
    estimate = "store estimate @teacher @p.jsonl --student @student --no-chat-template --n 2 "
    estimate += "--max-new-tokens 6 --device cpu --format json"
    found = [call(f"{estimate} {more}").json for more in ("", "--grader our_grading:even")]
    plain, graded = (each["rows"][0]["bytes_rollout"] for each in found)
    assert plain < graded


@pytest.mark.parametrize(
    ("flags", "code", "cause", "hint"),
    [
        ("--grader exact", 1, "'p0' has no answer", "MODULE:FUNCTION"),
        ("--grader nearly", 2, "grader 'nearly'", "--grader exact"),
        ("--grader our_grading:never", 1, "on prompt 'p0': KeyError", "repair the grader"),
    ],
)
def test_wrong_graders_are_an_error(
    world: World, call: Any, flags: str, code: int, cause: str, hint: str
) -> None:
    store = world.new("store")
    call(f"{ROLL} {store} {flags}").assert_error(code, cause, hint)
    if world.at(store).exists():
        assert not open_store(world.at(store)).head().segments
