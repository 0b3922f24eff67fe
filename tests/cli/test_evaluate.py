"""`--eval-prompts` and `ablate` as they are typed."""

import json
from typing import Any

import pytest

from tests.cli.conftest import TRAIN, World

EVAL = "--eval-prompts @e.jsonl --eval-n 2 --eval-max-new-tokens 4"


@pytest.fixture(scope="module", autouse=True)
def prompts(world: World) -> None:
    rows = [{"id": f"e{i}", "prompt": f"{i} + 1 =", "answer": f"{i + 1}"} for i in range(3)]
    world.at("e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = '[student]\nmodel = "student"\n[store]\nurl = "st"\n[run]\ndevice = "cpu"\n'
    train = "[train]\nlr = 1e-3\nk = 4\ntokens_per_batch = 64\n"
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


@pytest.mark.parametrize(
    ("flags", "code", "cause", "remedy"),
    [
        (f"{EVAL} --eval-prompts @p.jsonl", 1, "'p0' has no answer", "MODULE:FUNCTION"),
        (f"{EVAL} --eval-prompts @no.jsonl", 1, "no.jsonl", ""),
        (f"{EVAL} --grader nearly", 2, "grader 'nearly'", "--grader exact"),
        (f"{EVAL} --grader no_module:f", 2, "no_module cannot be imported", "PYTHONPATH"),
        (f"{EVAL} --grader builtins:max", 1, "TypeError", "mend the grader"),
        (f"{EVAL} --eval-n 0", 2, "--eval-n = 0", "Responses per evaluation prompt"),
        ("--eval-prompts @e.jsonl", 2, "eval.max_new_tokens = 512", "--eval-max-new-tokens"),
    ],
)
def test_what_cannot_be_examined(
    world: World, call: Any, flags: str, code: int, cause: str, remedy: str
) -> None:
    call(f"{TRAIN} @st --out {world.new('out')} {flags}").refused(code, cause, remedy)


def test_ablate_prints_a_table_or_json(world: World, call: Any) -> None:
    out = world.new("ablation")
    command = f"ablate @t.toml --vary objective=overlap,teacher_topk --seeds 2 --out {out}"
    text = call(command)
    assert text.code == 0, text.err
    head, *rows = text.out.splitlines()
    assert head.split()[:4] == ["objective", "n", "loss", "overlap_ratio"]
    assert [row.split()[:2] for row in rows[:2]] == [["overlap", "2"], ["teacher_topk", "2"]]
    assert "±" in rows[0]
    assert "teacher seconds spent: 0; saved: unknown" in rows[3]
    again = call(f"{command} --format json").json
    assert (again["runs_trained"], len(again["rows"])) == (0, 2)


@pytest.mark.parametrize(
    ("flags", "code", "cause", "remedy"),
    [
        ("--vary objectve=opd", 2, "objectve", "did you mean train.objective?"),
        ("--vary objective=opd,olap", 2, "objective=olap: --objective olap", "overlap"),
        ("--vary k=2,64", 1, "k=64: k = 64 is more", "--k"),
        ("", 2, "--vary", "ablate --help"),
    ],
)
def test_what_cannot_be_ablated(
    world: World, call: Any, flags: str, code: int, cause: str, remedy: str
) -> None:
    out = world.new("ablation")
    call(f"ablate @t.toml {flags} --out {out}").refused(code, cause, remedy)
    assert not world.at(out).exists()
