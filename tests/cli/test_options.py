"""Flags are configuration fields: same name, same default, same rule."""

import re
from pathlib import Path

import pytest

from logitcask.cli.options import config_from_flags
from logitcask.engine.config.parse.toml import read_job, read_toml, to_toml, validate
from logitcask.engine.config.sections import RolloutConfig, RunConfig, ScoreConfig, TrainConfig
from logitcask.engine.errors import ConfigError

MINIMAL = """
[student]
model = "student"
[teacher]
model = "org/teacher"
name = "big"
[prompts]
file = "prompts.jsonl"
[store]
url = "store"
[loop]
rounds = 2
"""


def test_an_omitted_flag_takes_the_default_of_the_configuration() -> None:
    flags = {
        "student__model": "m",
        "prompts__file": "p.jsonl",
        "store__url": "s",
        "rollout__n": None,
        "rollout__top_k": 7,
    }
    config = config_from_flags(RolloutConfig, flags)
    assert (config.rollout.n, config.rollout.top_k, config.rollout.student_topk) == (4, 7, 16)
    assert config.rollout.record()["top_k"] == 7


@pytest.mark.parametrize(
    ("kind", "flags", "causes"),
    [
        (RolloutConfig, {"rollout__top_p": 1.5}, ["--top-p = 1.5", "less than or equal to 1"]),
        (ScoreConfig, {"teacher__name": "../x"}, ["--teacher = '../x'"]),
        (TrainConfig, {"train__learning_rate": -1.0}, ["--learning-rate = -1.0", "greater than 0"]),
        (
            ScoreConfig,
            {"score__teacher_topk_min": 65},
            ["--teacher-topk-max = 64: must be teacher_topk_min = 65 or more"],
        ),
    ],
)
def test_a_forbidden_value_is_reported_with_its_rule(
    kind: type, flags: dict[str, object], causes: list[str]
) -> None:
    required = {"student__model": "m", "prompts__file": "p", "store__url": "s"}
    required |= {"teacher__model": "t", "teacher__name": "t"}
    fields = {f"{s}__" for s in kind.model_fields}
    values = {k: v for k, v in required.items() if any(k.startswith(f) for f in fields)}
    with pytest.raises(ConfigError) as caught:
        config_from_flags(kind, values | flags)
    assert all(word in caught.value.cause for word in causes)
    assert caught.value.hint


def test_toml_round_trip_and_paths_relative_to_the_file(tmp_path) -> None:
    (tmp_path / "student").mkdir()
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL)
    config = read_toml(file, ["train.learning_rate=1e-5", "run.out=other", "train.loss_topk=4"])
    assert config.train.learning_rate == 1e-5
    assert config.train.loss_topk == 4
    assert config.run.out == tmp_path / "other"
    assert config.student.model == str(tmp_path / "student")
    assert config.teacher.model == "org/teacher"
    written = tmp_path / "again.toml"
    written.write_text(to_toml(config))
    assert read_toml(written) == config


def test_every_path_of_a_section_is_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    keys = ["eval.prompts=held.jsonl", "eval.store=other", "teacher.api_key_file=key"]
    file.write_text(MINIMAL)
    config = read_toml(file, keys)
    assert config.eval.prompts == tmp_path / "held.jsonl"
    assert config.eval.store == str(tmp_path / "other")
    assert config.teacher.api_key_file == tmp_path / "key"
    assert config.teacher.tokenizer == ""


@pytest.mark.parametrize(
    ("text", "cause", "hint"),
    [
        ("[trian]\nlr = 1", "unknown key trian", "train"),
        ("[train]\nnum_epochs = 1", "unknown key train.num_epochs", "train.num_train_epochs"),
        ("[loop]\nrounds = 0", "loop.rounds = 0", "Rounds"),
        ("[loop", "not TOML", "repair"),
    ],
)
def test_a_wrong_key_is_reported_with_the_nearest_valid_one(
    tmp_path, text: str, cause: str, hint: str
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        MINIMAL.replace("[loop]\nrounds = 2", "") + text if "loop" in text else MINIMAL + text
    )
    with pytest.raises(ConfigError) as caught:
        read_toml(file)
    assert cause in caught.value.cause
    assert hint in caught.value.hint


@pytest.mark.parametrize("text", ["lr=1", "train.learning_rate", "=3"])
def test_a_malformed_override_is_reported_with_the_syntax(tmp_path, text: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL)
    with pytest.raises(ConfigError, match="section.key=value"):
        read_toml(file, [text])


def test_a_missing_file_is_reported(tmp_path) -> None:
    with pytest.raises(ConfigError, match="nothing.toml"):
        read_toml(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 5_000,
        "[train]\nlearning_rate = " + "9" * 5_000,
        "[train]\nlearning_rate = 0x" + "f" * 50_000,
        "[train]\nlearning_rate." + ".".join("a" * 3_000) + " = 1",
        f"[train]\nlearning_rate = '{'z' * 100_000}'",
        "[student]\nmodel = '\xff'",
    ],
    ids=["deep", "digits", "hexadecimal", "dotted", "long", "latin-1"],
)
def test_toml_that_python_cannot_read_is_an_error_of_bounded_length(tmp_path, text: str) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(f"{MINIMAL}{text}".encode("latin-1"))
    with pytest.raises(ConfigError, match=re.escape(str(file))) as caught:
        read_toml(file)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("value", ["[" * 5_000, "9" * 5_000, "0x" + "f" * 50_000, "inf"])
def test_an_override_that_python_cannot_read_is_an_error(tmp_path, value: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"train\.learning_rate") as caught:
        read_toml(file, [f"train.learning_rate={value}"])
    assert len(str(caught.value)) < 1_000


def test_a_printed_configuration_means_the_same_in_another_folder(tmp_path, monkeypatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here / "student", there):
        place.mkdir(parents=True)
    monkeypatch.chdir(here)
    flags = {"student__model": "student", "store__url": "s3://b/s", "eval__store": "held"}
    config = config_from_flags(TrainConfig, flags | {"run__out": Path("out")})
    (there / "run.toml").write_text(to_toml(config))
    monkeypatch.chdir(there)
    read = read_job(TrainConfig, Path("run.toml"))
    assert (read.student.model, read.store.url) == (str(here / "student"), "s3://b/s")
    assert (read.run.out, read.eval.store) == (here / "out", str(here / "held"))


def test_configuration_is_frozen() -> None:
    config = validate(TrainConfig, {"student": {"model": "m"}, "store": {"url": "s"}}, source="t")
    with pytest.raises(ValueError, match="frozen"):
        config.train.learning_rate = 1.0  # type: ignore[misc]
    assert set(RunConfig.model_fields) > set(TrainConfig.model_fields)


def test_variables_and_stop_ids_are_read_from_flags_and_toml(tmp_path) -> None:
    file, again = tmp_path / "run.toml", tmp_path / "again.toml"
    file.write_text(
        MINIMAL.replace("[store]", 'chat_template_kwargs = {b = [1], a = {c = "x"}}\n[store]')
    )
    config = read_toml(file, ["rollout.stop_token_ids=[5, 3]"])
    assert config.prompts.chat_template_kwargs == '{"a": {"c": "x"}, "b": [1]}'
    assert config.rollout.stop_token_ids == (5, 3)
    again.write_text(to_toml(config))
    assert read_toml(again) == config
    flags = {"prompts__chat_template_kwargs": '{"b":[1],"a":{"c":"x"}}'}
    flags |= {"rollout__stop_token_ids": "5, 3", "student__model": "m", "store__url": "s"}
    same = config_from_flags(RolloutConfig, {**flags, "prompts__file": "p"})
    assert same.prompts.chat_template_kwargs == config.prompts.chat_template_kwargs
    assert same.rollout.stop_token_ids == (5, 3)
    for key, value, cause in (
        ("prompts.chat_template_kwargs", "[1]", "must be a JSON object"),
        ("prompts.chat_template_kwargs", "{a = nan}", "not JSON compliant"),
        ("prompts.chat_template_kwargs", "{a = 2020-01-01}", "2020-01-01 is no JSON value"),
        ("prompts.chat_template_kwargs", '{"a": 1e400}', "1e400 is beyond 64-bit floats"),
        ("rollout.stop_token_ids", "[-1]", "greater than or equal to 0"),
    ):
        with pytest.raises(ConfigError, match=cause) as caught:
            read_toml(file, [f"{key}={value}"])
        assert key in caught.value.cause
