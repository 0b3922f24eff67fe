"""`logitcask evaluate`: the trainer's numbers of a folder, and of versions as they appear."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.commands.evaluate import evaluate_config, watch_evaluations
from logitcask.engine.distill.versions import remove_others
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.models.digests import read_json, write_json
from logitcask.engine.training.evaluation.versions import (
    LEASE_S,
    evaluating,
    is_due,
    published,
    read_evaluations,
)
from tests.cli.conftest import TRAIN, World

EVAL = "--eval-prompts @e.jsonl --eval-n 2 --eval-max-new-tokens 4 --eval-rollouts main"


@pytest.fixture(scope="module")
def run(world: World) -> str:
    """Return the @name of a run that evaluates at both ends, with its parent as version 0."""
    rows = [{"id": f"e{i}", "prompt": f"{i} + 1 =", "answer": f"{i + 1}"} for i in range(3)]
    world.at("e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = world.new("evaluated")
    assert world(f"{TRAIN} @st --out {out} --max-steps 2 --save-dtype float32 {EVAL}") == 0
    return out


@pytest.fixture
def loop(world: World, run: str) -> Path:
    """Return a copy of the run as that of a loop in progress, at its version 2 of 4."""
    out = world.at(world.new("loop"))
    shutil.copytree(world.at(run), out)
    version = out / "versions" / "v2"
    version.mkdir(parents=True)
    for name in ("logitcask.json", *(p.name for p in out.glob("*token*")), "config.json"):
        (out / name).rename(version / name)
    (out / "model.safetensors").rename(version / "model.safetensors")
    for each in out.glob("generation_config.json"):
        each.rename(version / each.name)
    return out


def line_of(out: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" not in line][-1]


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    assert line["eval/seconds"] > 0
    return {key: value for key, value in line.items() if key != "eval/seconds"}


def watch(out: Path, stop: threading.Event | None = None, **evaluation: Any) -> dict[str, Any]:
    flags = {"work": {"worker": True, "poll": 0.01}, "eval": evaluation}
    return watch_evaluations(evaluate_config(str(out), flags), stop=stop or threading.Event())


def test_a_folder_has_the_numbers_of_the_trainer(world: World, call: Any, run: str) -> None:
    """Take the settings of the run, and the rows of its held-out snapshot."""
    expected = {"version": 2, **untimed(line_of(world.at(run)))}
    assert {"eval/accuracy", "eval/loss", "eval/rows"} <= expected.keys()
    assert untimed(call(f"evaluate {run} --format json").json) == expected
    alone = world.new("alone")
    shutil.copytree(world.at(run), world.at(alone))
    (world.at(alone) / "run.json").unlink()
    flags = f"--store @st {EVAL} --loss-topk 4 --pack-length 64 --device cpu"
    found = untimed(call(f"evaluate {alone} {flags} --format json").json)
    assert found == {k: v for k, v in expected.items() if k != "progress/step"}


def test_versions_are_evaluated_once_until_the_final_student(loop: Path, run: str) -> None:
    stop = threading.Event()
    final = loop / "logitcask.json"

    def end(line: str) -> None:
        """Publish the final student, after the evaluation of version 2."""
        for file in (loop / "versions" / "v2").iterdir():
            shutil.copy(file, loop)

    config = evaluate_config(str(loop), {"work": {"worker": True, "poll": 0.01}})
    found = watch_evaluations(config, stop=stop, on_event=end)
    assert (found["evaluated"], final.exists()) == (1, True)
    (line,) = read_evaluations(loop)
    assert untimed(line) == {"version": 2, **untimed(line_of(loop))}
    # A line that a kill cut off is none, and what has a line is not measured again.
    with (loop / "evaluations.jsonl").open("a") as file:
        file.write('{"version": 9')
    assert watch(loop)["evaluated"] == 0
    assert read_evaluations(loop) == [line]
    assert not (loop / ".evaluator").exists()


def test_a_version_is_evaluated_after_the_first_one_is_gone(loop: Path) -> None:
    stop = threading.Event()
    first, second = (loop / "versions" / name for name in ("v2", "v3"))

    def go_on(line: str) -> None:
        if second.exists():
            stop.set()
            return
        first.rename(second)
        metadata = read_json(second / "logitcask.json", hint="")
        write_json(second / "logitcask.json", {**metadata, "version": 3})

    config = evaluate_config(str(loop), {"work": {"worker": True, "poll": 0.01}})
    watch_evaluations(config, stop=stop, on_event=go_on)
    lines = read_evaluations(loop)
    assert [line["version"] for line in lines] == [2, 3]
    assert lines[0]["eval/loss"] == lines[1]["eval/loss"]


def test_a_version_that_goes_away_is_left_out(loop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def removed(*_: Any, **__: Any) -> None:
        (loop / "versions" / "v2" / "logitcask.json").unlink()
        stop.set()
        raise ModelError("no weights", hint="")

    monkeypatch.setattr("logitcask.engine.commands.evaluate.load_for_training", removed)
    events: list[str] = []
    config = evaluate_config(str(loop), {"work": {"worker": True, "poll": 0.01}})
    watch_evaluations(config, stop=stop, on_event=events.append)
    assert events == ["version 2 was removed before its evaluation ended"]
    assert published(loop) == {}


def test_the_trainer_keeps_the_versions_of_a_living_evaluator(tmp_path: Path) -> None:
    """Want every third version from 2 on: 2, 5, 8, until each of them has its line."""

    def due() -> list[int]:
        return [number for number in range(9) if is_due(tmp_path, number)]

    assert due() == []
    with evaluating(tmp_path, 3, 2, print) as (live, append):
        assert due() == [2, 5, 8]
        append({"version": 5})
        assert due() == [2, 8]
        file = tmp_path / ".evaluator" / "due"
        os.utime(file, (0, file.stat().st_mtime - LEASE_S))
        assert due() == [], "no sign of life"
        live()
        assert due() == [2, 8]
        for number in range(10):
            (tmp_path / "versions" / f"v{number}").mkdir(parents=True)
        remove_others(tmp_path, 8)
        left = {folder.name for folder in (tmp_path / "versions").iterdir()}
        assert left == {"v2", "v7", "v8"}, "the two newest, and those that are due"
        with (
            pytest.raises(ConfigError, match="in use by process"),
            evaluating(tmp_path, 0, 0, print),
        ):
            pass
    assert due() == []
    with evaluating(tmp_path, 0, 0, print):
        assert due() == [], "any that is there will do"


@pytest.mark.parametrize(
    ("command", "code", "cause", "hint"),
    [
        ("evaluate @student --store @st", 2, "nothing is measured", "--eval-prompts"),
        ("evaluate @student", 2, "store.url is missing", "store"),
        ("evaluate @student --store @st --eval-rollouts main --worker", 2, "no run.json", "start"),
    ],
)
def test_wrong_calls_are_errors(call: Any, command: str, code: int, cause: str, hint: str) -> None:
    call(command).assert_error(code, cause, hint)
