"""Text output: within the width of the terminal, without repetition, evaluations as columns."""

import json
from typing import Any

import pytest

from logitcask.cli import output
from tests.cli.conftest import TRAIN, UNITS, World

COLUMNS = 80
EVAL = "--eval-prompts @side.jsonl --eval-n 2 --eval-max-new-tokens 4 --eval-store @st"


@pytest.fixture
def narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the width of the terminal."""
    monkeypatch.setattr(output, "_columns", lambda: COLUMNS)


@pytest.mark.usefixtures("narrow_terminal")
@pytest.mark.parametrize(
    "command",
    [
        "objectives",
        "objectives eopd",
        "store info @st",
        "store ls @st",
        "store delete @st --teacher big --dry-run",
        f"{TRAIN} @st --out OUT",
    ],
)
def test_no_line_is_wider_than_the_terminal(world: World, call: Any, command: str) -> None:
    result = call(command.replace("OUT", world.new("out")))
    assert result.code == 0, result.err
    assert max(map(len, result.out.splitlines())) <= COLUMNS


def test_piped_output_is_not_wrapped(call: Any) -> None:
    listed = call("objectives --format json").json
    assert all(row["source"] for row in listed)
    lines = call("objectives").out.splitlines()
    assert len(lines) == 1 + len(listed)
    assert all(row["formula"] in line for row, line in zip(listed, lines[1:], strict=True))


def test_ls_prints_common_fields_of_segments_once(call: Any) -> None:
    listed = call("store ls @st --format json").json
    out = call("store ls @st").out
    headers = [line for line in out.splitlines() if ": layout" in line]
    assert [header.split(":")[0] for header in headers] == ["rollout main", "score big"]
    assert out.count("profile default") == len(headers)
    assert out.count(listed[-1]["request"]) == 1
    assert all(row["segment"] not in out and row["segment"][:8] in out for row in listed)


def test_delete_prints_short_segment_ids(call: Any) -> None:
    command = "store delete @st --teacher big --dry-run"
    deleted = call(f"{command} --format json").json
    assert len(deleted) == UNITS
    out = call(command).out
    assert all(row["segment"] not in out and row["segment"][:8] in out for row in deleted)


def test_evaluations_are_columns(world: World, call: Any) -> None:
    row = {"id": "e", "prompt": "1 + 1 =", "answer": "2"}
    world.at("side.jsonl").write_text(json.dumps(row) + "\n")
    command = f"{TRAIN} @st --out {world.new('out')} {EVAL} --eval-every 1"
    evaluated = call(f"{command} --format json").json["evaluations"]
    assert len(evaluated) > 4
    shown = [evaluated[0], *evaluated[-3:]]
    out = call(command).out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    for name in ("progress/step", "eval/loss", "eval/overlap/ratio", "eval/mean_length"):
        assert lines[name] == [f"{each[name]:.4g}" for each in shown]
    assert max(len(line) for line in out.splitlines() if "eval/" in line) < COLUMNS
