"""`store provenance`: the chain behind a student, compared with its files and its store."""

import json
import shutil
from typing import Any

import pytest

from logitcask.engine.models.digests import read_json, write_json
from logitcask.engine.store import open_store
from logitcask.engine.store.transfer.card import is_ours
from tests.cli.conftest import TRAIN, World


@pytest.fixture(scope="module")
def runs(world: World) -> list[str]:
    """Return the @names of a run, of a run of its student, and of a loop."""
    first, second, loop = (world.new(stem) for stem in ("first", "second", "loop"))
    assert world(f"{TRAIN} @st --max-steps 2 --out {first}") == 0
    again = TRAIN.replace("@student", first)
    assert world(f"{again} @st --max-steps 2 --out {second}") == 0
    store = world.at(world.new("loop-store"))
    assert world(f"distill @d.toml --set run.out={world.at(loop)} --set store.url={store}") == 0
    return [first, second, loop]


def test_the_chain_leads_from_a_student_to_its_base_weights(
    world: World, call: Any, runs: list[str]
) -> None:
    first, second, _ = runs
    found = call(f"store provenance {second} --format json").json
    own, parent = (
        read_json(world.at(name) / "logitcask.json", hint="") for name in (second, first)
    )
    assert (found["version"], found["weights"], found["not_verified"]) == (4, own["weights"], [])
    assert [line.partition(":")[0] for line in found["verified"]] == [
        *("weights", "ledger", "store", "snapshot", "segments")
    ]
    assert found["trained_from"]["weights"] == parent["weights"] == own["parent"]
    assert found["trained_from"]["version"] == 2
    base = found["trained_from"]["trained_from"]
    assert (base["version"], base["weights"]) == (0, own["root"])
    (group,) = found["teachers"]
    assert (group["teacher"], group["version"], len(found["teachers"])) == ("big", 0, 1)
    assert (group["age"][0], group["age"][2]) == (2, 3)
    student = open_store(world.at("@st")).head().rollouts("main")[0].provenance["student"]
    assert [m["weights"] for m in group["sampled_by"]] == [student["weights"]] == [own["root"]]
    lines = [
        json.loads(each) for each in (world.at(second) / "ledger.jsonl").read_text().splitlines()
    ]
    assert group["rows"] == found["ledger"]["rows"] == sum(sum(x["rows"].values()) for x in lines)
    text = call(f"store provenance {second}")
    assert (text.code, text.err) == (0, "")
    assert "├─ verified: ledger: sha256 as recorded" in text.out
    assert f"student version 2 {parent['weights'][:19]}" in text.out
    assert f"base weights {own['root'][:19]}" in text.out.splitlines()[-1]
    card = (world.at(second) / "README.md").read_text()
    assert (is_ours(card), "| version | 4, after 2 updates from 2 |" in card) == (True, True)
    assert f"| snapshot | 7, `{own['pin']['sha256']}` |" in card


def test_a_loop_names_every_version_that_sampled(world: World, call: Any, runs: list[str]) -> None:
    found = call(f"store provenance {runs[2]} --format json").json
    assert [(g["version"], g["age"], g["segments"]) for g in found["teachers"]] == [
        (0, [0, 0, 0], 1),
        (1, [0, 0, 0], 1),
    ]
    sampled = [group["sampled_by"][0] for group in found["teachers"]]
    assert [model["version"] for model in sampled] == [0, 1]
    assert sampled[0]["weights"] != sampled[1]["weights"]
    assert found["store"]["snapshot"] is None


def test_what_cannot_be_compared_is_said(world: World, call: Any, runs: list[str]) -> None:
    """Take away everything that push_to_hub leaves out, and the weights."""
    alone = world.new("alone")
    shutil.copytree(world.at(runs[0]), world.at(alone))
    (world.at(alone) / "run.json").unlink()
    (world.at(alone) / "model.safetensors").unlink()
    found = call(f"store provenance {alone} --format json").json
    assert [line.partition(":")[0] for line in found["not_verified"]] == ["weights", "store"]
    text = call(f"store provenance {alone}")
    assert "the folder does not name it; give --store URL" in text.err
    with_store = call(f"store provenance {alone} --store @st --format json").json
    assert [line.partition(":")[0] for line in with_store["not_verified"]] == ["weights"]
    assert with_store["teachers"][0]["models"][0]["name"] == str(world.at("@teacher"))


def test_a_version_in_training_has_the_lines_up_to_it(
    world: World, call: Any, runs: list[str]
) -> None:
    """Make the first version of a run of two updates, before its end."""
    out = world.at(world.new("unfinished"))
    version = out / "versions" / "v1"
    shutil.copytree(world.at(runs[0]), version)
    for name in ("run.json", "ledger.jsonl"):
        (version / name).rename(out / name)
    run, metadata = (read_json(p, hint="") for p in (out / "run.json", version / "logitcask.json"))
    del run["ledger_sha256"], metadata["ledger"]
    write_json(out / "run.json", run)
    write_json(version / "logitcask.json", {**metadata, "version": 1})
    with (out / "ledger.jsonl").open("a") as file:
        file.write('{"update":3,"ro')
    found = call(f"store provenance {version} --format json").json
    assert (found["version"], found["run"]["updates"], found["ledger"]["age"]) == (1, 1, [0, 0, 0])
    assert found["not_verified"] == ["ledger: the run is not finished, so it has no digest yet"]


def test_damage_and_other_stores_are_errors(world: World, call: Any, runs: list[str]) -> None:
    other = world.new("other")
    shutil.copytree(world.at(runs[0]), world.at(other))
    command = f"store provenance {other}"
    loop = read_json(world.at(runs[2]) / "run.json", hint="")["config"]["store"]["url"]
    call(f"{command} --store {loop}").assert_error(1, "and the student was trained from", "--store")
    call(f"{command} --store @none").assert_error(1, "is not a logitcask store", "check the path")
    call("store provenance @student").assert_error(1, "no logitcask.json", "the folder of a run")
    ledger = world.at(other) / "ledger.jsonl"
    text = ledger.read_text()
    ledger.write_text(text.replace('"update":2', '"update":3'))
    call(command).assert_error(4, "ledger.jsonl holds other lines", "restore it")
    ledger.unlink()
    call(command).assert_error(4, "ledger.jsonl is missing", "restore it")
    ledger.write_text(text)
    shutil.copy(world.at(runs[1]) / "model.safetensors", world.at(other))
    call(command).assert_error(4, "holds other weights", "restore the weights")
