"""A store whose teacher has scored the whole vocabulary, and is gone."""

import shutil
from pathlib import Path

import pytest

from logitcask.engine.commands.rollout import run_rollout
from logitcask.engine.commands.score import run_score
from logitcask.engine.config.sections import RolloutConfig, ScoreConfig
from tests.engine.tiny import N_VOCAB, make_model, save_folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a student and a store of eight sequences."""
    folder = tmp_path_factory.mktemp("trainers")
    for seed, name in enumerate(("student", "teacher")):
        save_folder(folder / name, make_model(seed=seed))
    lines = "".join(f'{{"prompt": "What is {i}?"}}\n' for i in range(4))
    (folder / "p.jsonl").write_text(lines)
    common = {"store": {"url": str(folder / "store"), "profile": "raw32"}, "run": {"device": "cpu"}}
    run_rollout(
        RolloutConfig.model_validate(
            {
                "student": {"model": str(folder / "student")},
                "prompts": {"file": folder / "p.jsonl", "chat_template": False},
                "rollout": {"n": 2, "max_new_tokens": 8, "student_topk": 4},
                **common,
            }
        )
    )
    run_score(
        ScoreConfig.model_validate(
            {
                "teacher": {"model": str(folder / "teacher"), "name": "t"},
                "score": {"teacher_topk_min": N_VOCAB, "teacher_topk_max": N_VOCAB},
                **common,
            }
        )
    )
    shutil.rmtree(folder / "teacher")  # no training needs it
    return folder
