"""Estimates before long work: the line, the question on a terminal, a disk that is too small."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from logitcask.cli.approve import ASK_BYTES, ASK_REQUESTS, ASK_SECONDS, approve_with, is_much, text
from logitcask.engine.config.cost import Cost
from logitcask.engine.config.parse.toml import read_toml
from logitcask.engine.config.sections import StoreSection
from logitcask.engine.errors import ConfigError, StoreError
from logitcask.engine.estimate.left import (
    ROLLOUT_SHARE,
    WorkLeft,
    combined,
    loop_left,
    sampling_left,
    scoring_left,
    trainings_left,
)
from logitcask.engine.store import open_store
from tests.cli.conftest import ROLL, SCORE, World

LEFT = WorkLeft(
    stage="score",
    done=100,
    total=400,
    positions=1.5e6,
    at_most=False,
    bytes=6e7,
    measured=True,
    seconds=600.0,
    timed="scoring",
    where="/store",
    free_bytes=5 * 10**9,
)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand on a terminal whose user answers no; return the questions."""
    questions: list[str] = []

    def confirm(question: str, **_: Any) -> bool:
        questions.append(question)
        return False

    there = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr("logitcask.cli.approve.sys", SimpleNamespace(stdin=there, stderr=there))
    monkeypatch.setattr("logitcask.cli.approve.click.confirm", confirm)
    return questions


def test_the_line_says_what_is_measured_and_what_is_not() -> None:
    assert text(LEFT) == (
        "estimate: score: 300 of 400 responses left, 1,500,000 positions, 60 MB (measured; 5 GB "
        "free), about 10 min of scoring at the measured rate"
    )
    unknown = replace(
        LEFT, at_most=True, measured=False, seconds=None, free_bytes=None, requests=300
    )
    assert text(unknown) == (
        "estimate: score: 300 of 400 responses left, at most 1,500,000 positions, at most 60 MB "
        "(assumed), 300 requests to the server, time of scoring not known yet"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": ASK_BYTES + 1, "free_bytes": None},
        {"seconds": ASK_SECONDS + 1},
        {"requests": ASK_REQUESTS + 1},
        {"bytes": 6e9, "at_most": True},
    ],
    ids=["bytes", "seconds", "requests", "disk"],
)
def test_only_much_work_is_a_question_on_a_terminal(
    change: dict[str, Any], terminal: list[str]
) -> None:
    approve_with(False)(LEFT)
    approve_with(True)(replace(LEFT, **change))
    assert terminal == []
    with pytest.raises(ConfigError, match="did not begin, as the answer was no"):
        approve_with(False)(replace(LEFT, **change))
    assert terminal == ["begin?"]


def test_without_a_terminal_there_is_no_question(capfd: pytest.CaptureFixture[str]) -> None:
    much = replace(LEFT, seconds=ASK_SECONDS + 1)
    assert is_much(much)
    approve_with(False)(much)
    assert capfd.readouterr().err == text(much) + "\n"
    approve_with(False)(replace(LEFT, done=400, positions=0, bytes=0))
    assert capfd.readouterr().err == "", "nothing is left"


def test_a_disk_that_cannot_hold_it_is_refused_before(capfd: pytest.CaptureFixture[str]) -> None:
    full = replace(LEFT, bytes=6e9)
    with pytest.raises(StoreError, match="needs about 6 GB more, and the disk of /store has 5 GB"):
        approve_with(False)(full)
    capfd.readouterr()
    approve_with(True)(full)
    # Of a guess the user is warned.
    approve_with(False)(replace(full, at_most=True))
    warning = "warning: the disk of /store may not hold it"
    assert capfd.readouterr().err.splitlines().count(warning) == 2


def test_an_estimate_is_of_what_is_left_and_becomes_measured(
    world: World, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the estimates of a store before, in the middle and at the end with the store."""
    url = str(world.at(world.new("store")))
    counts = {"sequences": 40, "max_new_tokens": 100}
    fresh = sampling_left(url, "main", **counts)
    assumed = Cost().bytes_per_position * ROLLOUT_SHARE
    assert (fresh.positions, fresh.at_most, fresh.measured) == (4000, True, False)
    assert (fresh.bytes, fresh.seconds) == (4000 * assumed, None)
    assert fresh.free_bytes
    assert fresh.where == url
    result = call(f"{ROLL} {url}")
    assert result.code == 0, result.err
    assert "estimate: rollout: 16 of 16 responses left, at most" in result.err
    store = open_store(url)
    rollouts = store.head().rollouts("main")
    made = sum(each.counts["N"] for each in rollouts)
    positions = sum(each.counts["P"] for each in rollouts)
    again = call(f"{ROLL} {url}")
    assert again.code == 0
    assert "estimate" not in again.err, "nothing is left"
    more = sampling_left(url, "main", sequences=made * 3, max_new_tokens=100)
    assert (more.done, more.total, more.at_most, more.measured) == (made, made * 3, False, True)
    assert more.positions == pytest.approx(2 * positions)
    assert more.bytes == pytest.approx(2 * sum(each.size for each in rollouts))
    assert more.seconds is None, "a store has no seconds of sampling"
    scores = scoring_left(url, "main", "t", sequences=made, max_new_tokens=100, remote=True)
    assert (scores.positions, scores.requests, scores.measured) == (positions, made, False)
    both = combined("distill", [more, scores])
    assert both.positions == more.positions + scores.positions
    assert (both.requests, both.measured) == (made, False)
    assert (both.seconds, both.timed) == (None, "sampling and scoring")
    monkeypatch.setattr(
        "logitcask.engine.estimate.left.shutil.disk_usage", lambda path: SimpleNamespace(free=1)
    )
    refused = call(f"{SCORE} {url}")
    assert refused.code == 0, "bytes of the first scores are a guess"
    assert "may not hold it" in refused.err
    more = scoring_left(url, "main", "big", sequences=2 * made, max_new_tokens=100)
    took = sum(each.seconds or 0.0 for of in store.head().scores("big").values() for each in of)
    assert more.seconds == pytest.approx(took)
    assert text(combined("distill", [fresh, more])).endswith("of scoring at the measured rate")
    with pytest.raises(StoreError, match="needs about .* more, and the disk"):
        more.check_disk()


def test_a_loop_counts_the_rounds_that_are_left(world: World, tmp_path: Path) -> None:
    """Count 2 rounds of 4 prompts with 2 responses of 6 tokens at most, sampled and scored."""
    config = read_toml(world.at("d.toml"), (f"store.url={tmp_path / 'none'}",))
    fresh = loop_left(config)
    assert (fresh.done, fresh.total, fresh.positions) == (0, 16, 2 * 96)
    assert loop_left(read_toml(world.at("d.toml"), ("train.max_steps=1",))).total == 8
    there = config.model_copy(update={"store": StoreSection(url=str(world.at("st")))})
    assert loop_left(there).positions == 0, "the store of this name holds as many"


def test_an_ablation_counts_its_trainings(tmp_path: Path) -> None:
    left = trainings_left(tmp_path, done=(30.0, 50.0), total=6, positions=1000, weight_bytes=10**6)
    assert (left.positions, left.bytes, left.seconds) == (4000, 4e6, 160.0)
    assert text(replace(left, free_bytes=None)) == (
        "estimate: ablate: 4 of 6 trainings left, 4,000 positions, 4 MB (measured), about 3 min of "
        "training at the measured rate"
    )
