"""[runner]: numbers of processes and their GPUs."""

import pytest

from logitcask.engine.config.parse.toml import validate
from logitcask.engine.config.runner import LoopRunner
from logitcask.engine.errors import ConfigError


def test_numbers_are_texts_too_and_gpus_are_divided() -> None:
    values = {"train": "torchrun:2", "rollout": 2, "rollout_gpus": "0,1,5,6", "score_gpus": 2}
    runner = validate(LoopRunner, values, source="test")
    assert validate(LoopRunner, {"train": 1}, source="test").ranks == 1
    assert (runner.ranks, runner.gpus("rollout")) == (2, ["0,1", "5,6"])
    assert (runner.gpus("score"), runner.gpus("train")) == (["2"], [""])
    assert validate(LoopRunner, {"train": "torchrun:2", "train_gpus": "3,4"}, source="").gpus(
        "train"
    ) == ["3,4"], "one text for all that train together"


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"train": "2"}, "must be 1 or torchrun:N, as torchrun:2"),
        ({"train": "torchrun:0"}, "must be 1 or torchrun:N"),
        ({"train": True}, "valid string"),
        ({"score": 0}, "greater than or equal to 1"),
        ({"kind": "threads"}, "'inline'"),
        ({"rollout": 2, "rollout_gpus": "0,1,2"}, "as many GPUs for each of the 2 processes"),
        ({"train": "torchrun:4", "train_gpus": "0,1"}, "each of the 4 processes of train"),
        ({"score_gpus": "0;1"}, "with commas between them"),
        ({"restarts": -1}, "greater than or equal to 0"),
    ],
)
def test_other_values_are_refused(values: dict[str, object], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        validate(LoopRunner, values, source="test")
