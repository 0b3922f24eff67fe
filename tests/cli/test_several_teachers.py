"""`train --teacher VALUE=NAME,... --teacher-field KEY`: a teacher for each kind of prompt."""

import json
from typing import Any

import pytest

from tests.cli.conftest import KEPT, PLAIN, World

MIXED = "--teacher big=3,other=1"
TEACHERS = "--teacher code=big,math=other --teacher-field domain"


@pytest.fixture(scope="module")
def store(world: World) -> str:
    """Store rollouts of prompts of two domains, and the scores of two teachers."""
    name = world.new("domains")
    lines = [
        {"id": f"p{i}", "prompt": f"{i} + 1 =", "domain": ("code", "math")[i % 2]} for i in range(4)
    ]
    world.at("@domains.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert world(f"rollout --model @student --prompts @domains.jsonl {PLAIN} --store {name}") == 0
    assert world(f"score --model @teacher --teacher big {KEPT} --store {name}") == 0
    assert (
        world(
            f"score --model @other-teacher --teacher other {KEPT} --teacher-topk-min 3 "
            f"--store {name}"
        )
        == 0
    )
    return name


def test_teachers_of_different_positions(world: World, call: Any, store: str) -> None:
    """Route prompts to a teacher of some positions; a mean needs the same positions of all."""
    scored = "--positions first:2 --device cpu --teacher-topk-min 4 --teacher-topk-max 8"
    for name, model in (("start", "@teacher"), ("start2", "@other-teacher")):
        line = f"score --model {model} --teacher {name} {scored} --store {store}"
        assert call(line).code == 0
    train = f"train --model @student --store {store} --objective forward_kl --device cpu"
    mixed = call(f"{train} --teacher big=1,start=1 --out {world.new('out')}")
    mixed.assert_error(2, "one has scored positions that another has not", "--positions all")
    positions = []
    for teachers in ("code=big,math=start --teacher-field domain", "start=1,start2=1"):
        out = world.new("out")
        report = call(f"{train} --teacher {teachers} --out {out} --format json")
        assert report.code == 0
        positions.append(report.json["positions"])
        assert "% of the positions: the others have no loss" in report.err
    assert positions == [4 * 6 + 4 * 2, 8 * 2]


def test_a_routed_run_trains_and_resumes(world: World, call: Any, store: str) -> None:
    train = (
        f"train --model @student --store {store} --loss-topk 3 --objective forward_kl "
        f"--pack-length 64 --lr 1e-3 --device cpu --format json"
    )
    lines = {}
    for teachers in (TEACHERS, "--teacher big", "--teacher other", MIXED):
        out = world.new("out")
        assert call(f"{train} {teachers} --out {out} --max-steps 1").code == 0
        line = (world.at(out) / "metrics.jsonl").read_text().splitlines()[0]
        lines[teachers] = json.loads(line)
        if teachers == TEACHERS:
            recorded = json.loads((world.at(out) / "run.json").read_text())
            assert recorded["teacher"] == "code=big,math=other"
            assert recorded["teacher_field"] == "domain"
            again = call(f"{train} {teachers} --out {out} --max-steps 1")
            assert again.json["resumed_at"] == again.json["updates"] == 1
            other = call(f"{train} --teacher big --out {out} --max-steps 1")
            other.assert_error(1, "teacher", "--out")
        else:
            assert "teacher_field" not in json.loads((world.at(out) / "run.json").read_text())
    for name in ("loss", "overlap/mass_teacher", "entropy/teacher", "progress/positions"):
        routed, big, other, mixed = (line[name] for line in lines.values())
        assert mixed == pytest.approx(0.75 * big + 0.25 * other, rel=1e-5), name
        assert (big == other == routed) == (name == "progress/positions")


def test_a_mixture_trains_and_is_held_out(world: World, call: Any, store: str) -> None:
    out = world.new("out")
    mix = "--teacher big+other --teacher-weighting entropy --mixture arithmetic"
    line = (
        f"train --model @student --store {store} {mix} --objective gkd --loss-topk 3 --out {out} "
        "--eval-rollouts main --eval-teacher big+other --max-steps 1 --device cpu --format json"
    )
    assert call(line).code == 0
    found: dict[str, float] = {}
    for each in (world.at(out) / "metrics.jsonl").read_text().splitlines():
        found |= json.loads(each)
    assert 0 <= found["mixture/missing_mass"] < 1
    assert found["eval/mixture/width"] >= 0
    recorded = json.loads((world.at(out) / "run.json").read_text())
    expected = {"mixture": "arithmetic", "teacher_weighting": "entropy"}
    assert recorded["teacher_mix"] == recorded["eval"]["held_out"]["teacher_mix"] == expected
    assert call(line).json["resumed_at"] == 1


@pytest.mark.parametrize(
    ("flags", "code", "cause", "hint"),
    [
        (f"{MIXED} --loss-topk 4", 1, "k = 4 is more than k_min = 3", "--loss-topk 3"),
        (f"{TEACHERS} --loss-topk 4", 1, "k = 4 is more than k_min = 3", "--loss-topk 3"),
        (
            "--teacher code=big,math=none --teacher-field domain",
            2,
            "--teacher none",
            "one of these",
        ),
        ("--teacher code=big --teacher-field domain", 2, "domain = 'math'", "add VALUE=NAME"),
        ("--teacher code=big,math=other", 2, "without --teacher-field", "--teacher-field domain"),
        ("--teacher-field domain", 2, "without --teacher", "VALUE=NAME"),
        ("--teacher big --mixture geometric", 2, "a position has one teacher", "a+b"),
        (
            "--teacher big+other --mixture geometric --objective gkd --loss-topk 3",
            1,
            "tail 'bucket' with mixture = geometric",
            "--mixture sum",
        ),
        (
            "--teacher big+other --teacher-weighting accuracy --teacher-rollouts big=x,other=x",
            3,
            "no rollouts 'x' with rewards",
            "--grader exact",
        ),
        (
            f"{TEACHERS} --eval-rollouts main --eval-teacher none=none",
            2,
            "--eval-teacher none",
            "one of these",
        ),
    ],
)
def test_wrong_teachers_stop_before_the_training(
    world: World, call: Any, store: str, flags: str, code: int, cause: str, hint: str
) -> None:
    out = world.new("out")
    result = call(f"train --model @student --store {store} {flags} --out {out} --device cpu")
    result.assert_error(code, cause, hint)
