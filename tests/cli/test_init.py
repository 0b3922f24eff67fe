"""`logitcask init`: the file is right as it is written, and wrong answers are refused before."""

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import logitcask.cli.init as command
from logitcask.cli.main import cli
from logitcask.engine.config.parse.toml import read_toml
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.init.commented import EXAMPLES, SHOWN, first_sentence
from logitcask.engine.init.draft import RATES, learning_rate, score_name
from logitcask.engine.recipes.named import PAIRS, read_recipe, recipe_names
from tests.cli.conftest import World
from tests.engine.tiny import CHARACTERS, make_model, make_tokenizer, save_folder

PAIR = "init --student @student --teacher @teacher --prompts @p.jsonl --no-chat-template"
COMMENTED = re.compile(r"^# (\w+ = .+)$", re.M)


def test_distill_accepts_the_file_as_it_is(world: World, call: Any) -> None:
    file = world.new("distill.toml")
    made = call(f"{PAIR} -o {file} --format json")
    assert made.code == 0, made.err
    *_, last = made.json["next"]
    assert last == f"logitcask report {world.at('run')}"
    dry = call(f"distill {file} --dry-run")
    assert dry.code == 0, dry.err
    config = read_toml(world.at(file))
    # The context of 256 tokens is shared by prompt and response, and the file has 8 prompts.
    assert (config.rollout.max_new_tokens, config.loop.prompts_per_round) == (128, 8)
    assert (config.teacher.name, config.train.learning_rate) == ("teacher", 1e-3)
    assert (config.store.rollouts, config.run.out) == ("main", world.path / "run")
    again = call(f"{PAIR} -o {file}")
    again.assert_error(2, "is there already", "--force")
    assert call(f"{PAIR} -o {file} --force --set rollout.n=2").code == 0
    assert read_toml(world.at(file)).rollout.n == 2
    folder = world.at(world.new("second"))
    (folder / "run").mkdir(parents=True)
    assert call(f"{PAIR} -o {folder}/d.toml").code == 0
    config = read_toml(folder / "d.toml")
    assert (config.store.rollouts, config.run.out) == ("run-2", folder / "run-2")


def test_every_key_has_its_help_and_every_comment_is_a_key(world: World, call: Any) -> None:
    file = world.new("distill.toml")
    assert call(f"{PAIR} -o {file}").code == 0
    text = world.at(file).read_text()
    helps = {
        (section, name): first_sentence(field.description or "")
        for section, of in RunConfig.model_fields.items()
        for name, field in getattr(of.annotation, "model_fields", {}).items()
    }
    section, before = "", ""
    for line in text.splitlines():
        if line.startswith("["):
            section, before = line.strip("[]"), ""
        elif found := re.match(r"(?:# )?(\w+) = ", line):
            assert before.strip() == helps[section, found[1]], line
            before = ""
        else:
            before += line.removeprefix("#")
    assert len(COMMENTED.findall(text)) > 10
    whole = tomllib.loads(COMMENTED.sub(r"\1", text))
    set_keys = tomllib.loads(text)
    for section, keys in whole.items():
        for name, value in keys.items():
            shown = EXAMPLES.get((section, name))
            fields: Any = RunConfig.model_fields[section].annotation
            default = fields.model_fields[name].default
            allowed = [set_keys[section].get(name), shown, default]
            assert value in allowed, (section, name)
            assert name in set_keys[section] or name in SHOWN[section]


def test_paths_lead_from_the_folder_of_the_file(
    world: World, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.path)
    folder = world.at(world.new("below é \U0001f600"))
    folder.mkdir()
    shutil.copy("p.jsonl", folder / "own.jsonl")
    prompts = f"{folder.name}/own.jsonl".replace(" ", "\0")
    words = f"init --student student --teacher teacher --prompts {prompts} --no-chat-template"
    runner = CliRunner()
    done = runner.invoke(
        cli,
        [*(word.replace("\0", " ") for word in words.split()), "-o", f"{folder.name}/d.toml"],
    )
    assert done.exit_code == 0, done.output
    config = read_toml(folder / "d.toml")
    assert Path(config.student.model) == world.path / "student"
    assert config.prompts.file == folder / "own.jsonl"
    assert (config.store.url, config.run.out) == (str(folder / "store"), folder / "run")


def test_a_recipe_for_a_pair_answers_all_questions(tmp_path: Path, call: Any) -> None:
    for name in [name for name, kind in recipe_names().items() if kind == PAIRS]:
        assert call(f"init --recipe {name} -o {tmp_path}/d.toml --force").code == 0
        here, published = read_toml(tmp_path / "d.toml"), read_recipe(name, tmp_path / "d.toml")
        assert here == published
        alone = read_recipe(name, None)
        assert {**here.model_dump(), "store": 0, "run": 0} == {
            **alone.model_dump(),
            "store": 0,
            "run": 0,
        }


def test_an_answer_that_is_wrong_is_refused_before_a_file_is_written(
    world: World, call: Any
) -> None:
    (world.path / "bad.jsonl").write_text('{"id": "a"}\n')
    (world.path / "empty.jsonl").write_text("")
    (world.path / "long.jsonl").write_text(json.dumps({"prompt": "1" * 200}) + "\n")
    prompts = "--prompts @p.jsonl --no-chat-template"
    models = "init --student @student --teacher @teacher"
    for line, code, cause, hint in (
        (f"init --student @none --teacher @teacher {prompts}", 1, "no folder", "hub id"),
        (f"init --student @student --teacher @pickled/x {prompts}", 1, "no folder", "hub id"),
        (f"{models} --prompts @none.jsonl", 1, "no prompts file", "JSONL"),
        (f"{models} --prompts @bad.jsonl", 1, "bad.jsonl, line 1", '"prompt"'),
        (f"{models} --prompts @empty.jsonl", 1, "no prompt", "JSON object"),
        (f"{models} --prompts @long.jsonl --no-chat-template", 1, "tokens", "max_new_tokens"),
        (f"{models} --prompts @p.jsonl", 2, "turns of a chat", "--no-chat-template"),
        (f"{models} {prompts} --set loop.prompts_per_round=9", 2, "has 8 prompts", "=8"),
        (f"{models} {prompts} --set train.objective=overlapp", 2, "overlapp", "overlap"),
        (f"{models} {prompts} --recipe opdd", 2, "no recipe 'opdd'", "opd"),
        ("init --student @student", 2, "--teacher, --prompts", "init --help"),
    ):
        file = world.new("d.toml")
        call(f"{line} -o {file}").assert_error(code, cause, hint)
        assert not world.at(file).exists(), line


def test_a_tokenizer_with_other_tokens_is_named_in_the_file(world: World, call: Any) -> None:
    renamed = make_tokenizer(characters=CHARACTERS[:-1] + "é")
    save_folder(world.path / "renamed", make_model(seed=5), renamed)
    file = world.new("d.toml")
    made = call(PAIR.replace("@teacher", "@renamed") + f" -o {file}")
    assert made.code == 0
    assert "differ in 1 ids" in made.err
    assert read_toml(world.at(file)).teacher.student_tokenizer == str(world.path / "student")
    assert call(f"distill {file} --dry-run").code == 0


def test_questions_repeat_until_an_answer_is_right(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_is_terminal", lambda: True)
    monkeypatch.chdir(world.path)
    replies = ["not a model!", "student", "teacher", "no.jsonl", "p.jsonl", "n"]
    done = CliRunner().invoke(cli, ["init", "-o", "asked.toml"], input="\n".join(replies) + "\n")
    assert done.exit_code == 0, done.output
    assert done.output.count("\nhint: ") == 2
    config = read_toml(world.path / "asked.toml")
    assert (config.prompts.file, config.prompts.chat_template) == (world.path / "p.jsonl", False)


def test_names_and_rates_follow_from_the_models() -> None:
    assert score_name("Qwen/Qwen3-4B") == "qwen3-4b"
    assert score_name("./my teacher (2)/") == "my-teacher-2-"
    assert score_name("http://host:8000") == score_name("///") == "teacher"
    assert learning_rate("Qwen/Qwen3-1.7B") == (1e-6, "")
    assert learning_rate("nothing/known") == (1e-6, "")
    assert [rate for _, rate, _ in RATES] == [1e-3, 1e-4]
