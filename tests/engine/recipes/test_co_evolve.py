"""Two students that score each other: models behind the scores, and the second call."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from logitcask.cli.options import config_from_flags, flags_of
from logitcask.cli.rollout import rollout_command
from logitcask.cli.score import score_command
from logitcask.cli.train import train_command
from logitcask.engine.config.sections import RunConfig, ScoreConfig
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.models.identity import read_metadata, weights_digest
from logitcask.engine.recipes.co_evolve.plan import Pairing, check_config, steps
from logitcask.engine.recipes.co_evolve.run import (
    CoEvolveReport,
    check_co_evolve,
    prove_co_evolve,
    run_co_evolve,
)
from logitcask.engine.store import open_store
from logitcask.engine.training.provenance.chain import trace
from tests.engine.tiny import CHARACTERS, make_model, make_tokenizer, save_folder

PROMPTS, ROUND = 6, 4


def pair(path: Path, **sections: dict[str, Any]) -> RunConfig:
    tables: dict[str, dict[str, Any]] = {
        "student": {"model": str(path / "a")},
        "teacher": {"model": str(path / "b"), "name": "b"},
        "prompts": {"file": str(path / "p.jsonl"), "chat_template": False},
        "store": {"url": str(path / "store")},
        "rollout": {"student_topk": 4, "max_new_tokens": 4},
        "score": {"teacher_topk_min": 4, "teacher_topk_max": 8},
        "train": {"learning_rate": 1e-3, "objective": "sampled_token", "pack_length": 256},
        "loop": {"rounds": 2, "prompts_per_round": ROUND},
        "run": {"out": str(path / "run"), "device": "cpu", "seed": 3},
    }
    return RunConfig.model_validate(
        {name: keys | sections.get(name, {}) for name, keys in tables.items()}
    )


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[CoEvolveReport]]:
    """Call the recipe for one round, for two, and for two once more."""
    path = tmp_path_factory.mktemp("pair")
    for name, seed in (("a", 0), ("b", 1)):
        save_folder(path / name, make_model(seed=seed))
    lines = [{"question": f"{i} + {i} =", "domain": "sums"} for i in range(PROMPTS)]
    (path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    column = {"prompt_column": "question"}
    rounds = [pair(path, loop={"rounds": n}, prompts=column) for n in (1, 2, 2)]
    sets = ("run.seed=3", "loop.rounds=2")
    reports = [run_co_evolve(each, file="CONFIG", overrides=sets) for each in rounds]
    return path, reports


def test_each_scores_the_other_with_the_weights_of_the_round_before(
    calls: tuple[Path, list[CoEvolveReport]],
) -> None:
    path, _ = calls
    snapshot = open_store(str(path / "store")).head()
    before = {"first": path / "a", "second": path / "b"}
    for number in (1, 2):
        for own, other in (("first", "second"), ("second", "first")):
            (sampled,) = snapshot.rollouts(f"main-{own}-{number}")
            ((scored,),) = snapshot.scores(f"{other}-{number}").values()
            assert scored.base == sampled.seg_id
            student = sampled.provenance["student"]
            assert student["weights"] == weights_digest(before[own])
            assert student["version"] == number - 1
            teacher = scored.provenance["teacher"]
            assert teacher["weights"] == weights_digest(before[other])
            assert teacher["version"] == number - 1
        before = {side: path / "run" / f"{side}-{number}" for side in before}
    for side, folder in before.items():
        found = trace(str(folder))
        other = {"first": "second", "second": "first"}[side]
        (teacher,) = found["teachers"]
        (model,) = teacher["models"]
        assert teacher["teacher"] == f"{other}-2"
        assert model["weights"] == weights_digest(path / "run" / f"{other}-1")
        assert found["parent"] == weights_digest(path / "run" / f"{side}-1")


def test_a_rerun_does_nothing_twice(calls: tuple[Path, list[CoEvolveReport]]) -> None:
    path, (one, two, again) = calls
    assert list(one.trained) == ["first-1", "second-1"]
    assert list(two.trained) == ["first-2", "second-2"]
    assert not again.trained
    assert (
        (again.first, again.second)
        == (two.first, two.second)
        == (
            path / "run" / "first-2",
            path / "run" / "second-2",
        )
    )
    assert again.next.endswith("--set run.seed=3 --set loop.rounds=3")
    # Two rounds, two students, rollouts and scores of each; no unit was committed twice.
    assert len(open_store(str(path / "store")).head().segments) == 8
    assert {(read_metadata(each) or {})["version"] for each in (two.first, two.second)} == {2}


def test_a_student_that_is_lost_is_trained_again_alone(
    calls: tuple[Path, list[CoEvolveReport]],
) -> None:
    path, (_, two, _) = calls
    before = weights_digest(two.second)
    shutil.rmtree(two.second)
    config = pair(path, prompts={"prompt_column": "question"})
    again = run_co_evolve(config, file="CONFIG")
    assert list(again.trained) == ["second-2"]
    assert len(open_store(str(path / "store")).head().segments) == 8
    assert weights_digest(two.second) == before


def test_rounds_take_the_next_prompts(calls: tuple[Path, list[CoEvolveReport]]) -> None:
    path, _ = calls
    ids = [
        [json.loads(line)["id"] for line in text.splitlines()]
        for text in ((path / "run" / f"prompts-{n}.jsonl").read_text() for n in (1, 2))
    ]
    assert ids == [[f"line-{i}" for i in part] for part in ((1, 2, 3, 4), (5, 6, 1, 2))]
    store = open_store(str(path / "store"))
    (segment,) = store.head().rollouts("main-second-2")
    read = store.read_prompts(segment)
    assert [prompt.id for prompt in read] == ids[1]
    assert read[0].extra == {"domain": "sums"}


def test_other_settings_in_the_same_folder_are_refused(
    calls: tuple[Path, list[CoEvolveReport]],
) -> None:
    path, _ = calls
    config = pair(path, train={"learning_rate": 2e-3}, prompts={"prompt_column": "question"})
    with pytest.raises(IdentityError, match=r"train\.learning_rate = 0\.001, not 0\.002"):
        run_co_evolve(config, file="CONFIG")


def test_printed_commands_mean_the_same(calls: tuple[Path, list[CoEvolveReport]]) -> None:
    path, _ = calls
    config = pair(
        path,
        prompts={"system_prompt": "be brief", "chat_template": False},
        rollout={"stop_token_ids": [5, 7]},
        train={"args": {"adam_epsilon": 1e-7}, "keep_checkpoints": True},
        store={"profile": "compact"},
    )
    pairing = Pairing(objective="sampled_token", differ=True, rendered=("second",))
    commands = {"rollout": rollout_command, "score": score_command, "train": train_command}
    found = list(steps(config, pairing))
    assert [(each.command, each.side) for each in found[:6]] == [
        (command, side) for command in commands for side in ("first", "second")
    ]
    for step in found:
        command: Any = commands[step.command]
        flags = command.make_context(step.command, flags_of(step.config)).params
        own = {name: value for name, value in flags.items() if "__" in name}
        assert config_from_flags(type(step.config), own) == step.config


def test_another_tokenizer_is_compared_for_each_scoring(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(characters=f"{CHARACTERS[:-1]}€")
    save_folder(tmp_path / "a", make_model(seed=0))
    save_folder(tmp_path / "b", make_model(seed=1), tokenizer)
    (tmp_path / "p.jsonl").write_text('{"prompt": "1 + 1 ="}\n' * ROUND)
    config, notes = pair(tmp_path), list[str]()
    pairing = check_co_evolve(config, notes.append)
    assert (pairing.differ, pairing.rendered) == (True, ())
    assert "differ in 1 ids" in notes[0]
    given = [
        (step.side, step.config.teacher.student_tokenizer)
        for step in steps(config, pairing)
        if isinstance(step.config, ScoreConfig)
    ]
    assert given[:2] == [("first", str(tmp_path / "a")), ("second", str(tmp_path / "b"))]


def test_two_vocabularies_score_spans(tmp_path: Path) -> None:
    """Train a student of characters and one whose ids are other characters, for one round."""
    save_folder(tmp_path / "a", make_model(seed=0))
    turned = make_tokenizer(characters=CHARACTERS[::-1])
    save_folder(tmp_path / "b", make_model(seed=1), turned)
    lines = [{"prompt": f"{i} + {i} ="} for i in range(ROUND)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    notes = list[str]()
    config = pair(
        tmp_path,
        loop={"rounds": 1},
        prompts={"chat_template": True},
        score={"control_tokens": "cut"},
        train={"objective": "opd", "loss_topk": 4},
    )
    report = run_co_evolve(config, file="CONFIG", on_event=notes.append)
    assert report.objective == "span_advantage"
    assert any("span_advantage in place of opd" in note for note in notes)
    snapshot = open_store(str(tmp_path / "store")).head()
    for name in ("first-1", "second-1"):
        ((scored,),) = snapshot.scores(name).values()
        assert scored.layout.startswith("spans")
    # Nats of a whole span: two random models of 99 ids are far from each other.
    assert all(loss > 0.1 for loss in report.trained.values())
    chosen = config.train.model_copy(update={"objective": "alm", "loss_topk": None})
    other = config.model_copy(update={"train": chosen})
    pairing = check_co_evolve(other)
    assert pairing == Pairing(objective="alm", differ=True, rendered=("first", "second"))
    (first, *_) = [step.config for step in steps(other, pairing) if step.command == "score"]
    assert isinstance(first, ScoreConfig)
    assert first.score.prompts == tmp_path / "run" / "prompts-1.jsonl"


def test_a_dry_run_writes_nothing(calls: tuple[Path, list[CoEvolveReport]]) -> None:
    path, _ = calls
    config = pair(path, run={"out": str(path / "dry")}, store={"url": str(path / "dry-store")})
    prompts = config.prompts.model_copy(update={"prompt_column": "question"})
    prove_co_evolve(config.model_copy(update={"prompts": prompts}))
    assert not list(path.glob("dry*"))


@pytest.mark.parametrize(
    ("section", "keys", "cause"),
    [
        ("teacher", {"model": "http://a:1"}, "both students are trained here"),
        ("teacher", {"model": "", "follow": "student"}, "both students are trained here"),
        ("student", {"model": "same"}, "nothing to teach"),
        ("teacher", {"student_tokenizer": "x"}, "not of two students"),
        ("loop", {"updates_per_round": 2}, "do not take it"),
        ("run", {"overwrite": True}, "where the last one stopped"),
        ("train", {"teacher": "b"}, "do not take it"),
        ("score", {"extra_ids": "b"}, "of rollouts that exist already"),
        ("runner", {"kind": "processes"}, "runner.kind = processes"),
    ],
)
def test_settings_of_one_student_are_refused(
    section: str, keys: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    teacher = {"teacher": {"model": "same", "name": "b"}} if keys == {"model": "same"} else {}
    config = pair(tmp_path, **{section: keys, **teacher}) if section != "runner" else None
    if config is None:
        plain = pair(tmp_path)
        config = plain.model_copy(update={"runner": plain.runner.model_copy(update=keys)})
    with pytest.raises(ConfigError, match=cause):
        check_config(config)
