"""`--eval-prompts`, `--eval-store` and `ablate` on the command line."""

import json
from typing import Any

import pytest

from logitcask.engine.metrics.metrics import COMMON_METRICS
from tests.cli.conftest import ROLL, SCORE, TRAIN, UNITS, World

EVAL = "--eval-prompts @e.jsonl --eval-n 2 --eval-max-new-tokens 4"


@pytest.fixture(scope="module", autouse=True)
def prompts(world: World) -> None:
    rows = [{"id": f"e{i}", "prompt": f"{i} + 1 =", "answer": f"{i + 1}"} for i in range(3)]
    world.at("e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = '[student]\nmodel = "student"\n[store]\nurl = "st"\n[run]\ndevice = "cpu"\n'
    train = "[train]\nlearning_rate = 1e-3\nloss_topk = 4\npack_length = 64\n"
    world.at("t.toml").write_text(config + train)


def test_train_evaluates_at_both_ends(world: World, call: Any) -> None:
    result = call(f"{TRAIN} @st --out {world.new('out')} {EVAL} --format json").json
    first, last = result["evaluations"]
    assert (first["progress/step"], last["progress/step"]) == (0, result["updates"])
    assert (first["eval/prompts"], first["eval/n"]) == (3, 2)
    assert 0 <= last["eval/avg_at_n"] <= 1


def test_distill_evaluates_every_round(world: World, call: Any) -> None:
    sets = "--set eval.prompts=e.jsonl --set eval.n=2 --set eval.max_new_tokens=4"
    flags = "--set store.url=loop-e --set run.out=loop-e-out --set eval.every=1"
    result = call(f"distill @d.toml {sets} {flags} --format json")
    assert result.code == 0, result.err
    assert [line["progress/step"] for line in result.json["evaluations"]] == [0, 1, 2]


@pytest.fixture(scope="module")
def held_out(world: World) -> str:
    """Return the @name of a store of other responses, with the rollout and teacher names of st."""
    name = world.new("held")
    assert world(f"{ROLL} {name} --seed 11") == 0
    assert world(f"{SCORE} {name}") == 0
    return name


def test_train_evaluates_on_a_held_out_store(world: World, call: Any, held_out: str) -> None:
    """Compare both evaluations with `probe metrics` of the student before and after training."""
    out, objective = world.new("out"), "overlap(k=4)"
    flags = f"--eval-store {held_out} --objective {objective} --out {out}"
    result = call(f"{TRAIN.replace('--loss-topk 4 ', '')} @st {flags} --format json").json
    first, last = result["evaluations"]
    flags = f"--store {held_out} --objective {objective} --pack-length 64 --device cpu"
    for model, line in (("@student", first), (out, last)):
        table = call(f"probe metrics --model {model} {flags} --format json").json
        expected = {row["metric"]: row["all"] for row in table}
        assert line["eval/rows"] == expected["rows"]
        assert line["eval/loss"] == pytest.approx(expected[f"loss/{objective}"], rel=1e-6)
        for name in COMMON_METRICS:
            assert line[f"eval/{name}"] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
    assert first["eval/loss"] != last["eval/loss"]
    recorded = json.loads((world.at(out) / "run.json").read_text())["eval"]["held_out"]
    assert (recorded["rollouts"], recorded["teacher"]) == ("main", "big")
    assert recorded["pin"]["number"] == 2 * UNITS - 1


def test_a_resumed_run_evaluates_on_its_first_snapshot(
    world: World, call: Any, held_out: str
) -> None:
    copy, out = world.new("copy"), world.new("out")
    assert call(f"store merge {copy} {held_out}").code == 0
    command = f"{TRAIN} @st --out {out} --eval-store {copy} --format json"
    before = call(command).json["evaluations"]
    assert call(f"{ROLL} {copy} --rollouts main --seed 11 --rollouts other --seed 12").code == 0
    assert call(f"{SCORE} {copy} --rollouts other").code == 0
    call(command).assert_error(2, "eval-rollouts is missing", "--eval-rollouts")
    assert call(f"{command} --eval-rollouts main").json["evaluations"] == before
    other = f"{command} --eval-rollouts other"
    call(other).assert_error(1, "eval.held_out.rollouts = 'main', not 'other'", "--out")
    # Another set of rollouts in the store of the training.
    own = f"{TRAIN} {copy} --rollouts main --eval-rollouts other --eval-every 1 {EVAL}"
    result = call(f"{own} --out {world.new('out')} --format json").json
    assert [line["progress/step"] for line in result["evaluations"]] == [
        *range(result["updates"] + 1)
    ]
    assert all(line["eval/rows"] and line["eval/n"] == 2 for line in result["evaluations"])


def test_distill_evaluates_on_a_held_out_store(world: World, call: Any, held_out: str) -> None:
    store, out = world.at(world.new("loop")), world.at(world.new("out"))
    places = f"--set store.url={store} --set run.out={out} --set eval.store={world.at(held_out)}"
    result = call(f"distill @d.toml {places} --format json")
    assert result.code == 0, result.err
    assert "held out: prefixes: " in result.err
    first, last = result.json["evaluations"]
    assert last["eval/loss"] != first["eval/loss"]
    assert call(f"distill @d.toml {places} --format json").json["evaluations"] == [first, last]


def test_ablate_evaluates_all_runs_on_one_snapshot(world: World, call: Any, held_out: str) -> None:
    copy, out = world.new("copy"), world.new("ablation")
    assert call(f"store merge {copy} {held_out}").code == 0
    command = f"ablate @t.toml --set eval.store={world.at(copy)} --out {out} --format json"
    (row,) = call(f"{command} --vary objective=overlap").json["rows"]
    assert row["eval_loss"] > 0
    assert 0 <= row["eval_overlap_ratio"] <= 1
    assert (row["accuracy"], row["gap_recovery"]) == (None, None)
    assert call(f"store tag {copy} later").code == 0
    rows = call(f"{command} --vary objective=overlap,teacher_topk").json["rows"]
    assert rows[0]["eval_loss"] == row["eval_loss"]
    snapshots = {
        json.loads(file.read_text())["eval"]["held_out"]["pin"]["number"]
        for file in world.at(out).glob("*/seed-*/run.json")
    }
    assert snapshots == {2 * UNITS - 1}


@pytest.mark.parametrize(
    ("flags", "code", "cause", "hint"),
    [
        ("--eval-store @nowhere", 1, "not a logitcask store", "check the path"),
        ("--eval-teacher tiny", 2, "--eval-teacher tiny", "give one of these"),
        ("--eval-store HELD --eval-rollouts no", 2, "--eval-rollouts no", "give one of these"),
        ("--eval-store HELD --eval-snapshot 99", 1, "99", ""),
        ("--eval-store HELD --objective opd --loss-topk 6", 1, "k = 6", ""),
    ],
)
def test_wrong_eval_store_flags_are_an_error(
    world: World, call: Any, held_out: str, flags: str, code: int, cause: str, hint: str
) -> None:
    out = world.new("out")
    command = f"{TRAIN} @st --out {out} {flags.replace('HELD', held_out)}"
    call(command).assert_error(code, cause, hint)
    assert not (world.at(out) / "run.json").exists()


def test_an_eval_store_must_fit_the_objective(world: World, call: Any) -> None:
    """Evaluate on rollouts with only the top 2 of the student."""
    few, out = world.new("few"), world.new("out")
    assert call(f"{ROLL} {few} --student-topk 2").code == 0
    assert call(f"{SCORE} {few}").code == 0
    command = f"{TRAIN} @st --objective opd --out {out}"
    call(f"{command} --eval-store {few}").assert_error(1, "k = 4", "")
    assert not (world.at(out) / "run.json").exists()
    assert call(command).code == 0


@pytest.mark.parametrize(
    ("flags", "code", "cause", "hint"),
    [
        (f"{EVAL} --eval-prompts @p.jsonl", 1, "'p0' has no answer", "MODULE:FUNCTION"),
        (f"{EVAL} --eval-prompts @no.jsonl", 1, "no.jsonl", ""),
        (f"{EVAL} --grader nearly", 2, "grader 'nearly'", "--grader exact"),
        (f"{EVAL} --grader no_module:f", 2, "no_module cannot be imported", "PYTHONPATH"),
        (f"{EVAL} --grader builtins:max", 1, "TypeError", "repair the grader"),
        (f"{EVAL} --eval-n 0", 2, "--eval-n = 0", "Responses per evaluation prompt"),
        ("--eval-prompts @e.jsonl", 2, "eval.max_new_tokens = 512", "--eval-max-new-tokens"),
    ],
)
def test_wrong_eval_prompts_flags_are_an_error(
    world: World, call: Any, flags: str, code: int, cause: str, hint: str
) -> None:
    call(f"{TRAIN} @st --out {world.new('out')} {flags}").assert_error(code, cause, hint)


def test_ablate_prints_a_table_or_json(world: World, call: Any) -> None:
    out = world.new("ablation")
    command = f"ablate @t.toml --vary objective=overlap,teacher_topk --seeds 2 --out {out}"
    text = call(command)
    assert text.code == 0, text.err
    header, *rows = text.out.splitlines()
    assert header.split()[:4] == ["objective", "n", "loss", "overlap_ratio"]
    assert [row.split()[:2] for row in rows[:2]] == [["overlap", "2"], ["teacher_topk", "2"]]
    assert "±" in rows[0]
    assert "teacher seconds spent: 0; saved: a live teacher would have added" in rows[3]
    again = call(f"{command} --format json").json
    assert (again["runs_trained"], len(again["rows"])) == (0, 2)


@pytest.mark.parametrize(
    ("flags", "code", "cause", "hint"),
    [
        ("--vary objectve=opd", 2, "objectve", "the nearest is train.objective"),
        ("--vary objective=opd,olap", 2, "objective=olap: --objective olap", "overlap"),
        ("--vary loss_topk=2,64", 1, "loss_topk=64: k = 64 is more", "--loss-topk"),
        ("", 2, "--vary", "ablate --help"),
    ],
)
def test_wrong_ablations_are_an_error(
    world: World, call: Any, flags: str, code: int, cause: str, hint: str
) -> None:
    out = world.new("ablation")
    call(f"ablate @t.toml {flags} --out {out}").assert_error(code, cause, hint)
    assert not world.at(out).exists()
