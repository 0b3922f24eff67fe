"""[train.args]: each field of transformers.TrainingArguments is passed, or refused by name."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from logitcask.cli.options import config_from_flags
from logitcask.engine.ablate import combinations
from logitcask.engine.config.parse.toml import keys_of, read_job, to_toml
from logitcask.engine.config.sections import RunConfig, TrainConfig
from logitcask.engine.config.trainer_args import (
    OPTIMIZERS,
    OURS,
    PASSED,
    RECORDED,
    REFUSED,
    REFUSED_OPTIMIZERS,
)
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.errors import ConfigError

OLDER = {"logging_dir", "warmup_ratio"}
"""Fields of transformers 5.5 that 5.23 does not have."""


def test_the_table_has_each_field_of_the_installed_transformers_once() -> None:
    groups = [PASSED, RECORDED, set(OURS), set(REFUSED)]
    table: set[str] = set().union(*groups)
    assert sum(map(len, groups)) == len(table), "a field is in two groups"
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields - table == set(), "new fields: decide, and add them to the table"
    assert table - fields <= OLDER | {f for f in table if f.startswith(("trackio_", "ddp_"))}
    assert set(OURS.values()) <= {*keys_of(RunConfig), *keys_of(TrainConfig)}


def test_each_optimizer_of_transformers_is_supported_or_refused() -> None:
    names = {each.value for each in OptimizerNames}
    assert not OPTIMIZERS.keys() & REFUSED_OPTIMIZERS.keys()
    assert names <= {*OPTIMIZERS, *REFUSED_OPTIMIZERS}


@pytest.mark.parametrize(
    ("fields", "cause", "hint"),
    [
        ({"seed": 1}, "seed is a key of its own", "set run.seed"),
        ({"optim": "sgd"}, "optim is a key of its own", "set train.optim"),
        ({"torch_compile_backend": "eager"}, "torch_compile is not", "set torch_compile = true"),
        ({"torch_compile": True, "torch_compile_backend": "cudagraphs"}, "supported", "inductor"),
        (
            {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
            "torch_compile_mode = 'reduce-overhead' is not supported",
            "max-autotune-no-cudagraphs",
        ),
        ({"use_liger_kernel": True}, "the model that was checked would not be", "leave"),
        ({"neftune_noise_alpha": 5.0}, "noisy embeddings", "leave neftune_noise_alpha out"),
        ({"hub_token": "hf_x"}, "is written to run.json; set HF_TOKEN", "leave"),
        ({"adam_epsilom": 1}, "no field of transformers", "the nearest is adam_epsilon"),
        ({"sede": 1}, "no field of transformers", "the nearest is seed, which is run.seed here"),
        ({"report_to": "all"}, "whatever is installed", "name the trackers"),
        ({"save_total_limit": 1}, "a crash during a save", "give 2 or more"),
        ({"hub_model_id": "a/b"}, "push_to_hub is not set", "set push_to_hub = true"),
    ],
)
def test_what_cannot_pass_is_refused_with_a_way_out(
    fields: dict[str, Any], cause: str, hint: str
) -> None:
    flags = {"student__model": "m", "store__url": "s"}
    texts = tuple(f"{name}={str(value).lower()}" for name, value in fields.items())
    with pytest.raises(ConfigError) as caught:
        config_from_flags(TrainConfig, {**flags, "train__args": texts})
    assert caught.value.cause.startswith("command line: --train-arg: ")
    assert cause in caught.value.cause
    assert hint in caught.value.hint


def test_fields_come_from_flags_files_and_overrides(tmp_path: Path) -> None:
    flags = {"student__model": "m", "store__url": "s"}
    texts = ('report_to=["tensorboard"]', "adam_epsilon=1e-6", 'lr_scheduler_kwargs={"a"=1}')
    config = config_from_flags(TrainConfig, {**flags, "train__args": texts})
    expected = {
        "report_to": ["tensorboard"],
        "adam_epsilon": 1e-6,
        "lr_scheduler_kwargs": {"a": 1},
    }
    assert config.train.args == expected
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert read_job(TrainConfig, tmp_path / "run.toml").train.args == expected
    changed = read_job(TrainConfig, tmp_path / "run.toml", ["train.args.run_name=second"])
    assert changed.train.args == expected | {"run_name": "second"}
    (one, two) = combinations(config, ["args=adam_epsilon=1e-6,adam_epsilon=1e-7"])
    assert [each.config.train.args for each in (one, two)] == [
        {"adam_epsilon": 1e-6},
        {"adam_epsilon": 1e-7},
    ]
    assert "args" not in to_toml(config_from_flags(TrainConfig, flags))


@pytest.mark.parametrize(
    ("name", "cause", "hint"),
    [
        ("adamw", "adamw is no optimizer", "the nearest is adamw_torch_fused"),
        ("lomo", "within the backward pass", "take another"),
        ("schedule_free_adamw", "an average of the weights", "take another"),
    ],
)
def test_other_optimizers_are_refused_with_the_reason(name: str, cause: str, hint: str) -> None:
    with pytest.raises(ValueError, match=cause) as caught:
        Train(optim=name)
    assert hint in str(caught.value)


def test_keys_of_adapters_that_are_off_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora.alpha is set, and lora.r = 0"):
        Lora(alpha=8)
    assert Lora(r=2, target_modules="q_proj, v_proj").target_modules == ("q_proj", "v_proj")
    assert Lora(r=2, target_modules=".*(q|k)_proj{1,2}").target_modules == ".*(q|k)_proj{1,2}"
