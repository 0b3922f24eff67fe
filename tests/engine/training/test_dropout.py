"""A student that is its own teacher: the loss is zero unless dropout is requested."""

from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.commands.rollout import run_rollout
from logitcask.engine.commands.score import run_score
from logitcask.engine.commands.train import run_train
from logitcask.engine.config.parse.toml import validate
from logitcask.engine.config.sections import RolloutConfig, ScoreConfig, TrainConfig
from tests.engine.tiny import save_folder
from tests.models.build import make_family


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Make rollouts and own scores of a student with dropout 0.1, and return their sections."""
    folder = tmp_path_factory.mktemp("gpt2")
    save_folder(folder / "model", make_family("gpt2"))
    (folder / "prompts.jsonl").write_text('{"id": "a", "prompt": "12+3="}\n')
    model = str(folder / "model")
    found: dict[str, Any] = {
        "student": {"model": model},
        "store": {"url": str(folder / "store")},
        "prompts": {"file": folder / "prompts.jsonl", "chat_template": False},
        "rollout": {"n": 3, "max_new_tokens": 20},
        "teacher": {"model": model, "name": "self"},
    }
    run_rollout(validate(RolloutConfig, pick(found, RolloutConfig), source="test"))
    run_score(validate(ScoreConfig, pick(found, ScoreConfig), source="test"))
    return found


def pick(sections: dict[str, Any], kind: Any) -> dict[str, Any]:
    return {name: section for name, section in sections.items() if name in kind.model_fields}


@pytest.mark.parametrize("lora", [0, 2])
def test_p_of_the_loss_is_the_scored_distribution(
    sections: dict[str, Any], tmp_path: Path, lora: int
) -> None:
    losses, lines = {}, {}
    for dropout in (False, True):
        train = {"objective": "forward_kl", "dropout": dropout, "learning_rate": 1e-12}
        run = {"out": tmp_path / str(dropout), "device": "cpu"}
        values = {**sections, "train": train, "run": run, "lora": {"r": lora}}
        events: list[str] = []
        config = validate(TrainConfig, pick(values, TrainConfig), source="test")
        losses[dropout] = run_train(config, on_event=events.append).last["loss"]
        lines[dropout] = [line for line in events if line.startswith("note: dropout is on")]
    assert abs(losses[False]) < 1e-5
    assert losses[True] > 0.02
    assert [len(lines[each]) for each in (False, True)] == [0, 1]
