"""`--eval-prompts` and `ablate` as they are typed."""

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
    job = '[student]\nmodel = "student"\n[store]\nurl = "st"\n[run]\ndevice = "cpu"\n'
    train = "[train]\nlearning_rate = 1e-3\nloss_topk = 4\npack_length = 64\n"
    world.at("t.toml").write_text(job + train)


def test_train_is_examined_at_both_ends(world: World, call: Any) -> None:
    done = call(f"{TRAIN} @st --out {world.new('out')} {EVAL} --format json").json
    first, last = done["evaluations"]
    assert (first["progress/step"], last["progress/step"]) == (0, done["updates"])
    assert (first["eval/prompts"], first["eval/n"]) == (3, 2)
    assert 0 <= last["eval/avg_at_n"] <= 1


def test_distill_is_examined_every_so_often(world: World, call: Any) -> None:
    sets = "--set eval.prompts=e.jsonl --set eval.n=2 --set eval.max_new_tokens=4"
    place = "--set store.url=loop-e --set run.out=loop-e-out --set eval.every=1"
    done = call(f"distill @d.toml {sets} {place} --format json")
    assert done.code == 0, done.err
    assert [line["progress/step"] for line in done.json["evaluations"]] == [0, 1, 2]


@pytest.fixture(scope="module")
def held(world: World) -> str:
    """@name of a store of other responses, under the names of st."""
    name = world.new("held")
    assert world(f"{ROLL} {name} --seed 11") == 0
    assert world(f"{SCORE} {name}") == 0
    return name


def test_a_run_is_measured_on_another_store(world: World, call: Any, held: str) -> None:
    """At both ends the numbers of `probe metrics`, of the student before and after."""
    out, objective = world.new("out"), "overlap(k=4)"
    flags = f"--eval-store {held} --objective {objective} --out {out}"
    done = call(f"{TRAIN.replace('--loss-topk 4 ', '')} @st {flags} --format json").json
    first, last = done["evaluations"]
    place = f"--store {held} --objective {objective} --pack-length 64 --device cpu"
    for model, line in (("@student", first), (out, last)):
        table = call(f"probe metrics --model {model} {place} --format json").json
        want = {row["metric"]: row["all"] for row in table}
        assert line["eval/rows"] == want["rows"]
        assert line["eval/loss"] == pytest.approx(want[f"loss/{objective}"], rel=1e-6)
        for name in COMMON_METRICS:
            assert line[f"eval/{name}"] == pytest.approx(want[name], rel=1e-6, abs=1e-9), name
    assert first["eval/loss"] != last["eval/loss"]
    noted = json.loads((world.at(out) / "run.json").read_text())["eval"]["held_out"]
    assert (noted["rollouts"], noted["teacher"]) == ("main", "big")
    assert noted["pin"]["number"] == 2 * UNITS - 1


def test_a_run_is_measured_on_what_it_pinned_first(world: World, call: Any, held: str) -> None:
    copy, out = world.new("copy"), world.new("out")
    assert call(f"store merge {copy} {held}").code == 0
    command = f"{TRAIN} @st --out {out} --eval-store {copy} --format json"
    before = call(command).json["evaluations"]
    assert call(f"{ROLL} {copy} --rollouts main --seed 11 --rollouts other --seed 12").code == 0
    assert call(f"{SCORE} {copy} --rollouts other").code == 0
    call(command).refused(2, "eval-rollouts is not given", "--eval-rollouts")
    assert call(f"{command} --eval-rollouts main").json["evaluations"] == before
    other = f"{command} --eval-rollouts other"
    call(other).refused(1, "eval.held_out.rollouts = 'main', not 'other'", "--out")
    # Another set of the very store that is trained on.
    own = f"{TRAIN} {copy} --rollouts main --eval-rollouts other --eval-every 1 {EVAL}"
    done = call(f"{own} --out {world.new('out')} --format json").json
    assert [line["progress/step"] for line in done["evaluations"]] == [*range(done["updates"] + 1)]
    assert all(line["eval/rows"] and line["eval/n"] == 2 for line in done["evaluations"])


def test_a_loop_is_measured_on_another_store(world: World, call: Any, held: str) -> None:
    store, out = world.at(world.new("loop")), world.at(world.new("out"))
    places = f"--set store.url={store} --set run.out={out} --set eval.store={world.at(held)}"
    done = call(f"distill @d.toml {places} --format json")
    assert done.code == 0, done.err
    assert "held out: prefixes: " in done.err
    first, last = done.json["evaluations"]
    assert last["eval/loss"] != first["eval/loss"]
    assert call(f"distill @d.toml {places} --format json").json["evaluations"] == [first, last]


def test_an_ablation_is_measured_on_one_state(world: World, call: Any, held: str) -> None:
    copy, out = world.new("copy"), world.new("ablation")
    assert call(f"store merge {copy} {held}").code == 0
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
def test_what_cannot_be_measured_on(
    world: World, call: Any, held: str, flags: str, code: int, cause: str, hint: str
) -> None:
    out = world.new("out")
    command = f"{TRAIN} @st --out {out} {flags.replace('HELD', held)}"
    call(command).refused(code, cause, hint)
    assert not (world.at(out) / "run.json").exists()


def test_a_store_that_cannot_serve_the_objective_is_refused(world: World, call: Any) -> None:
    """Its responses hold the student's top 2 alone."""
    few, out = world.new("few"), world.new("out")
    assert call(f"{ROLL} {few} --student-topk 2").code == 0
    assert call(f"{SCORE} {few}").code == 0
    command = f"{TRAIN} @st --objective opd --out {out}"
    call(f"{command} --eval-store {few}").refused(1, "k = 4", "")
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
def test_what_cannot_be_examined(
    world: World, call: Any, flags: str, code: int, cause: str, hint: str
) -> None:
    call(f"{TRAIN} @st --out {world.new('out')} {flags}").refused(code, cause, hint)


def test_ablate_prints_a_table_or_json(world: World, call: Any) -> None:
    out = world.new("ablation")
    command = f"ablate @t.toml --vary objective=overlap,teacher_topk --seeds 2 --out {out}"
    text = call(command)
    assert text.code == 0, text.err
    head, *rows = text.out.splitlines()
    assert head.split()[:4] == ["objective", "n", "loss", "overlap_ratio"]
    assert [row.split()[:2] for row in rows[:2]] == [["overlap", "2"], ["teacher_topk", "2"]]
    assert "±" in rows[0]
    assert "teacher seconds spent: 0; saved: a live teacher would have added" in rows[3]
    again = call(f"{command} --format json").json
    assert (again["runs_trained"], len(again["rows"])) == (0, 2)


@pytest.mark.parametrize(
    ("flags", "code", "cause", "hint"),
    [
        ("--vary objectve=opd", 2, "objectve", "did you mean train.objective?"),
        ("--vary objective=opd,olap", 2, "objective=olap: --objective olap", "overlap"),
        ("--vary loss_topk=2,64", 1, "loss_topk=64: k = 64 is more", "--loss-topk"),
        ("", 2, "--vary", "ablate --help"),
    ],
)
def test_what_cannot_be_ablated(
    world: World, call: Any, flags: str, code: int, cause: str, hint: str
) -> None:
    out = world.new("ablation")
    call(f"ablate @t.toml {flags} --out {out}").refused(code, cause, hint)
    assert not world.at(out).exists()
