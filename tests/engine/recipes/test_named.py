"""Named settings: each is a configuration that a loop can run, and a file and --set override it."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from logitcask.cli.main import run
from logitcask.engine.config.cost import Cost
from logitcask.engine.config.parse.toml import to_toml
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.errors import ConfigError, ObjectiveError
from logitcask.engine.models import identity
from logitcask.engine.recipes.costs import recipe_costs
from logitcask.engine.recipes.dry_run import check_recipe
from logitcask.engine.recipes.named import (
    PAIRS,
    load_recipe,
    missing_keys,
    read_recipe,
    recipe_names,
)

GIVEN = ["student.model", "teacher.model", "teacher.name", "prompts.file", "store.url"]
"""Keys that settings leave to their user."""


def test_every_recipe_is_checked_without_a_download(monkeypatch: Any) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run with --recipe downloads nothing")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(identity, "resolve_model", download)
    names = recipe_names()
    assert {"opd", "vopd", "prune-opd", "async-opd", "r1-1.5b-from-justrl-1.5b"} <= set(names)
    for name, kind in names.items():
        recipe = load_recipe(name)
        lines: list[str] = []
        config, missing = check_recipe(recipe.tables, None, (), lines.append)
        text = to_toml(config, missing)
        printed = tomllib.loads(text)
        for section, keys in recipe.tables.items():
            for key, value in keys.items():
                shown = printed[section][key]
                if key not in ("url", "out", "chat_template_kwargs"):  # a path; JSON
                    assert shown == value, (name, section, key)
        # A prompt has at least a token, and a sequence never spans packs.
        length = config.train.pack_length or 16384
        assert config.rollout.max_new_tokens < length, name
        if kind == "pairs":
            assert missing == [], name
            assert "not on this machine" in lines[-1]
            assert config.student.model in lines[-1], name
            assert config.loop.rounds * config.loop.prompts_per_round <= (config.prompts.limit or 0)
        else:
            assert set(missing) <= {*GIVEN, "loop.rounds"}, name
            assert missing[:5] == GIVEN, name
            assert f"# {missing[0].partition('.')[2]} = " in text.splitlines()
            assert "student.model, teacher.model" in lines[-1]


def test_table_2_of_the_paper() -> None:
    """Compare with the values of arXiv 2604.13016, Table 2."""
    config, _ = check_recipe(load_recipe("opd").tables, None, ())
    rollout, train, loop = config.rollout, config.train, config.loop
    assert (train.learning_rate, train.lr_scheduler_type, train.warmup_steps) == (
        1e-6,
        "constant",
        0,
    )
    assert (loop.prompts_per_round, loop.updates_per_round, rollout.n) == (64, 1, 4)
    assert (rollout.temperature, rollout.top_p, rollout.repetition_penalty) == (1, 1, 1)
    assert (rollout.student_topk, train.loss_topk, rollout.max_new_tokens) == (16, 16, 7168)
    assert (config.eval.n, config.eval.temperature, config.eval.top_p) == (16, 0.7, 0.95)
    assert loop.rounds == 17_917 // 64, "one epoch"


def test_a_file_overrides_a_recipe_and_flags_override_both(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[train]\nlearning_rate = 3e-6\nsave_steps = 7\n[store]\nurl = "here"\n')
    overrides = ("train.save_steps=9", "student.model=a/b", "teacher.model=c/d", "teacher.name=t")
    config = read_recipe("opd", file, (*overrides, "prompts.file=p.jsonl"))
    assert config.train.learning_rate == 3e-6, "of the file"
    assert config.train.save_steps == 9, "of --set"
    assert config.train.objective == "opd", "of the recipe"
    assert config.run.seed == 0, "the default"
    assert config.store.url == str(tmp_path / "here"), "relative to the file"
    alone = read_recipe("opd", None, (*overrides, "prompts.file=p.jsonl", "store.url=s"))
    assert alone.train.learning_rate == 1e-6


@pytest.mark.parametrize(
    ("name", "overrides", "cause", "hint"),
    [
        ("opdd", (), "there is no recipe 'opdd'", "opd"),
        ("opd", (), "student.model is missing", "teacher.model, teacher.name, prompts.file"),
        ("opd", ("train.lr=1",), "missing", "--set"),
    ],
)
def test_errors(name: str, overrides: tuple[str, ...], cause: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_recipe(name, None, overrides)
    assert cause in error.value.cause
    assert hint in (error.value.hint or "")


def test_a_dry_run_refuses_what_no_loop_can_run() -> None:
    tables = load_recipe("opd").tables
    for overrides, error, cause in [
        (("train.objective=full_vocab", "train.loss_topk=65535"), ObjectiveError, "vocabulary"),
        (("train.loss_topk=32",), ObjectiveError, "k = 32 is more than student_k = 16"),
        (("train.objective=nothing",), ConfigError, "no preset of this name"),
        (("train.objective=async_mc", "train.loss_topk=1"), ObjectiveError, "--mc-draws"),
        (("loop.max_age=3",), ConfigError, "loop.max_age = 3"),
        (("train.snapshot=first",), ConfigError, "distill does not take it"),
        (("train.args.nothing=1",), ConfigError, "nothing"),
    ]:
        with pytest.raises(error) as found:
            check_recipe(tables, None, overrides)
        assert cause in f"{found.value.cause} {found.value.hint}", overrides


def test_a_teacher_that_follows_needs_no_model() -> None:
    values = {"teacher": {"follow": "student", "name": "self"}, "loop": {"rounds": 1}}
    assert missing_keys(values) == ["student.model", "prompts.file", "store.url"]
    assert missing_keys({}) == [*GIVEN, "loop.rounds"]


def test_recipes_have_a_source_and_only_known_keys() -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        assert "arXiv" in recipe.header.source or "github.com" in recipe.header.source, name
        assert recipe.header.differs, f"{name}: state what differs"
        assert set(recipe.tables) <= set(RunConfig.model_fields), name


def test_costs_of_every_pair() -> None:
    """Count an epoch of 17,856 prompts, four responses each, of at most 7,168 tokens."""
    for name, kind in recipe_names().items():
        if kind == PAIRS:
            config = read_recipe(name, None)
            found = recipe_costs(config, Cost())
            assert found["positions"] == 279 * 64 * 4 * 7168
            assert found["score_hours"] < found["gpu_hours_stored_once"]
            mean = recipe_costs(config, Cost(response_tokens=1000))
            assert mean["store_bytes"] == 279 * 64 * 4 * 1000 * 97


def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipe", "list", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["recipe"]: row["kind"] for row in rows} == recipe_names()
    pair, prices = "r1-1.5b-from-r1-7b", ["--price-gpu-hour", "2", "--runs", "4"]
    assert run(["recipe", "show", pair, *prices, "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["tables"] == load_recipe(pair).tables
    assert shown["costs"]["cost_teacher_in_trainer"] == pytest.approx(
        2 * shown["costs"]["gpu_hours_teacher_in_trainer"]
    )
    assert run(["recipe", "show", "opd"]) == 0
    printed = capsys.readouterr().out
    assert tomllib.loads(printed) == load_recipe("opd").tables
    assert "# source: arXiv 2604.13016, Eq.5 and Table 2" in printed
    assert run(["recipe", "show", "opd", *prices]) == 2
    assert "names no models" in capsys.readouterr().err
