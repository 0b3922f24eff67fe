"""Output of successful commands: results on stdout, everything else on stderr."""

import tomllib
from importlib.metadata import version
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from logitcask.engine.config.parse.toml import read_toml
from logitcask.engine.objectives import PRESETS
from tests.cli.conftest import NEW, ROLL, SCORE, TRAIN, UNITS, N, World
from tests.engine.tiny import make_model, save_folder

SEQUENCES = 2 * UNITS * N
ALL = 2 * UNITS
"""Commits of a complete store."""


def commands_with_json(name: str) -> list[tuple[str, int, str]]:
    """Return (command, commits of the store, a key of its JSON) for each command."""
    return [
        (f"{ROLL} {name}", 0, "units_new"),
        (f"{SCORE} {name}", UNITS, "units_new"),
        (f"{TRAIN} {name} --out OUT", ALL, "exactness"),
        (f"store info {name}", ALL, "bytes_per_position"),
        (f"store ls {name}", ALL, "segment"),
        (f"store show {name}", ALL, "rows"),
        (f"store show {name} --tokenizer @student", ALL, "rows"),
        (f"store verify {name}", ALL, "orphans"),
        (f"store verify {name} --deep", ALL, "decoded"),
        (f"store snapshot {name}", ALL, "sha256"),
        (f"store tag {name} first", ALL, "log_number"),
        (f"store delete {name} --teacher big", ALL, "segment"),
        (f"store gc {name}", ALL, "kept"),
        (f"store pack {name} OUT", ALL, "files"),
        (f"store merge OUT {name}", ALL, "added"),
        (
            "store estimate @teacher @p.jsonl --student @student --no-chat-template "
            "--max-new-tokens 6 --sample 50 --teacher-topk-min 4 --student-topk 4 --device cpu",
            ALL,
            "rows",
        ),
    ]


@pytest.mark.parametrize(("command", "commits", "key"), commands_with_json("STORE"))
def test_stdout_is_json_only_and_stderr_has_only_known_lines(
    world: World, call: Any, command: str, commits: int, key: str
) -> None:
    command = command.replace("STORE", world.store(commits)).replace("OUT", world.new("out"))
    result = call(f"{command} --format json")
    assert result.code == 0, result.err
    values = result.json
    assert key in (values[0] if isinstance(values, list) else values)
    stages = ("rollout", "score", "train", "verify", "pack", "merge", "estimate")
    prefixes = tuple(f"{name}: " for name in (*stages, "scores", "support", "estimator"))
    unexpected = [
        line
        for line in result.err.splitlines()
        if not line.startswith((*prefixes, "prefixes: ", "note: ", "warning: cache/"))
    ]
    assert not unexpected, "stderr must be free of progress bars and warnings of libraries"


def test_text_and_json_agree(world: World, call: Any) -> None:
    text = dict(line.split(maxsplit=1) for line in call("store info @st").out.splitlines())
    values = call("store info @st --format json").json
    assert text.keys() == values.keys()
    assert int(text["bytes"]) == values["bytes"]
    table = call("store ls @st").out
    listed = call("store ls @st --format json").json
    assert len(listed) == ALL
    assert all(f"\n{row['log']:<3}  {row['segment'][:8]}  " in table for row in listed)


def test_finished_work_is_not_repeated(world: World, call: Any) -> None:
    store = world.store()
    assert call(f"{ROLL} {store} --format json").json["units_new"] == 0
    assert call(f"{SCORE} {store} --format json").json["units_new"] == 0
    assert call(f"{ROLL} {store}").out == f"nothing to do: all {UNITS} units are there\n"
    other = call(f"{SCORE} {store} --profile compact")
    assert "note: scores of 'big' are stored in profile default" in other.err
    out = world.new("run")
    first = call(f"{TRAIN} {store} --out {out} --format json").json
    again = call(f"{TRAIN} {store} --out {out} --format json").json
    assert (first["resumed_at"], again["resumed_at"]) == (0, first["updates"])
    assert again["last"] == first["last"]
    assert call(f"store info {store} --format json").json["segments"] == ALL


def test_a_small_token_budget_samples_all_responses(world: World, call: Any) -> None:
    result = call(f"{ROLL} {world.new('narrow')} --batch-tokens 1 --format json").json
    assert (result["sequences"], result["units_new"]) == (SEQUENCES, UNITS)
    assert result["positions"] <= SEQUENCES * NEW


def test_show_reads_every_sequence(call: Any) -> None:
    for sequence in (0, SEQUENCES - 1):
        found = call(f"store show @st --sequence {sequence} --top 2 --format json").json
        rows = found["rows"]
        assert found["finish"] in ("stop", "length")
        assert found["response_text"] == "".join(row["text"] for row in rows)
        assert 1 <= len(rows) <= NEW
        assert all(len(row["teacher_top"]) == 2 and row["teacher_lp"] < 0 for row in rows)


@pytest.mark.parametrize("command", [f"{ROLL} @x", f"{SCORE} @x", f"{TRAIN} @x"])
def test_dry_run_prints_toml_and_touches_nothing(world: World, call: Any, command: str) -> None:

    result = call(f"{command} --dry-run")
    assert (result.code, result.err) == (0, "")
    assert tomllib.loads(result.out)["store"]["url"] == str(world.at("@x"))
    assert not world.at("@x").exists()


def test_dry_run_of_distill_reads_back_equal(world: World, call: Any) -> None:
    result = call("distill @d.toml --set train.learning_rate=1e-5 --dry-run")
    assert result.code == 0
    world.at("@again.toml").write_text(result.out)
    assert read_toml(world.at("@again.toml")) == read_toml(
        world.at("@d.toml"), ["train.learning_rate=1e-5"]
    )
    assert call("distill @again.toml --dry-run").out == result.out
    assert not world.at("@loop-store").exists()


def test_distill_prints_one_json_object(world: World, call: Any) -> None:
    result = call("distill @d.toml --set store.url=loop-1 --set run.out=loop-1-out --format json")
    assert result.code == 0, result.err
    assert result.json["updates"] == result.json["version"] == 2
    assert "of the current student" in result.err
    assert f"warning: cache/coverage = {result.json['last']['cache/coverage']:.3f}" in result.err


def test_no_verb_version_and_list(call: Any) -> None:
    assert version("logitcask") in call("--version").out
    assert call("--help").code == 0
    assert call("store").code == 2
    listed = call("objectives")
    assert [line.split()[0] for line in listed.out.splitlines()[1:]] == list(PRESETS)


def test_objectives_explains_one_objective(call: Any) -> None:
    explained = call("objectives sampled_token+importance(cap=5) --format json").json
    assert explained["source"] == PRESETS["sampled_token"].source
    assert explained["modifiers"] == [{"name": "importance", "cap": 5.0}]
    assert "cap 5" in call("objectives sampled_token+importance(cap=5)").out
    call("objectives opdd").assert_error(1, "unknown objective 'opdd'", "the nearest is opd")


@pytest.mark.parametrize(
    "verb", ["rollout --prompts @p.jsonl --no-chat-template", "score --teacher t", "train --out @o"]
)
def test_dry_run_refuses_a_model_that_is_not_right(world: World, call: Any, verb: str) -> None:
    folder = world.at(world.new("model"))
    save_folder(folder, make_model(context=1024))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = call(f"{verb} --model {folder} --store @none --dry-run")
    assert result.code == 1
    assert "lack 1 tensors of its config" in result.err
    assert result.out == ""
