"""Trial runs: the first prompts of a file, the first updates of a training."""

import json
from typing import Any

from tests.cli.conftest import ROLL, TRAIN, N, World


def test_a_limit_reads_the_first_prompts_alone(world: World, call: Any) -> None:
    store = world.new("store")
    lines = world.at("p.jsonl").read_text().splitlines()
    world.at("cut.jsonl").write_text("\n".join([*lines[:3], "no JSON"]))
    command = f"{ROLL} {store}".replace("@p.jsonl", "@cut.jsonl")
    found = call(f"{command} --limit 3 --format json").json
    assert (found["sequences"], found["units_total"]) == (3 * N, 2)
    again = call(f"{ROLL} {store} --limit 3 --format json").json
    assert (again["units_done_before"], again["units_new"]) == (2, 0), "the same three prompts"
    call(f"{ROLL} {store}").assert_error(1, "made with 3 prompts, not 8", "another name")
    call(f"{ROLL} {store} --limit 0").assert_error(2, "--limit = 0", "for a trial run")


def test_max_steps_ends_run_and_schedule(world: World, call: Any) -> None:
    out = world.new("out")
    command = f"{TRAIN} @st --out {out} --lr-scheduler-type linear --format json"
    report = call(f"{command} --max-steps 2").json
    assert (report["updates"], report["version"]) == (2, 2)
    assert report["last"]["train/lr"] == 0.5e-3, "the second of two updates"
    recorded = json.loads((world.at(out) / "run.json").read_text())["settings"]
    assert recorded["max_steps"] == 2
    call(command).assert_error(1, "max_steps", "--overwrite")
    whole = call(f"{command} --overwrite").json
    assert whole["updates"] > 2
    assert "max_steps" not in json.loads((world.at(out) / "run.json").read_text())["settings"]
    more = call(f"{command} --overwrite --max-steps 99").json
    assert more["updates"] == whole["updates"], "no more than the epochs have"


def test_results_show_rate_and_memory(world: World, call: Any) -> None:
    """Expect at least 100 MB for a process with torch."""
    command = f"{ROLL} {world.new('store')}"
    found = call(f"{command} --format json").json
    assert found["positions_per_second"] == found["positions"] / found["seconds"]
    assert found["peak_memory_bytes"]["process"] > 1e8
    out = call(f"{TRAIN} @st --keep-checkpoints --out {world.new('out')}").out
    shown = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert float(shown["positions_per_second"][0]) > 0
    name, number, unit = shown["peak_memory"][:3]
    assert (name, unit) in {("process", "MiB"), ("process", "GiB")}
    assert float(number) > 0
    assert float(shown["checkpoints"][0]) > 0
