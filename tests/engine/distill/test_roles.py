"""The roles of a loop: the same student as in one process, bounded ages, and kills."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import logitcask.engine.distill.follow_rows as follow_rows
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.config.toml import read_toml
from logitcask.engine.distill.loop import distill
from logitcask.engine.distill.roles import open_role, train_role
from logitcask.engine.store import open_store
from logitcask.engine.workers.worker import Worker
from tests.engine.tiny import make_model, save_folder

ROUNDS, UPDATES = 4, 2
TOML = f"""
[student]
model = "student"
[teacher]
model = "teacher"
name = "big"
[prompts]
file = "p.jsonl"
chat_template = false
[store]
url = "store"
[rollout]
n = 2
max_new_tokens = 8
student_topk = 4
unit_prompts = 2
[score]
teacher_topk_min = 8
teacher_topk_max = 16
[train]
objective = "overlap"
loss_topk = 4
learning_rate = 5e-3
pack_length = 48
save_steps = 3
[loop]
rounds = {ROUNDS}
prompts_per_round = 3
updates_per_round = {UPDATES}
[work]
poll = 0.001
[run]
out = "out"
device = "cpu"
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with student, teacher, prompts and d.toml; stores and runs are elsewhere."""
    path = tmp_path_factory.mktemp("models")
    save_folder(path / "student", make_model(hidden=16, layers=1, seed=1, spread=0.1))
    save_folder(path / "teacher", make_model(hidden=16, layers=1, seed=2, spread=0.3))
    rows = [{"id": f"p{i}", "prompt": "abcdefgh"[: i + 1]} for i in range(5)]
    (path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "d.toml").write_text(TOML)
    return path


def configure(models: Path, into: Path, *changes: str) -> RunConfig:
    places = (f"store.url={into / 'store'}", f"run.out={into / 'out'}")
    return read_toml(models / "d.toml", [*places, *changes])


def units_of(into: Path) -> Counter[tuple[str, int, int]]:
    """Return (kind, round, first prompt) of each segment."""
    segments = open_store(into / "store").head().segments
    rounds = {s.seg_id: s.provenance["round"] for s in segments if s.kind == "rollout"}
    return Counter((s.kind, rounds[s.base or s.seg_id], s.unit["first"]) for s in segments)


def follow(
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    pause: Callable[[list[Worker[Any]]], None],
    roles: tuple[str, ...] = ("score", "rollout"),
) -> Any:
    """Run the trainer in this thread; the other roles work in its pauses, as `pause` has them."""
    jobs = [open_role(config, role) for role in roles]  # type: ignore[arg-type]
    workers = [Worker(job, config.work) for job in jobs]
    monkeypatch.setattr(follow_rows, "time", SimpleNamespace(sleep=lambda _: pause(workers)))
    try:
        return train_role(config)
    finally:
        for job in jobs:
            job.close()


def one_each(workers: list[Worker[Any]]) -> None:
    for worker in workers:
        worker.do_one()


def test_without_age_the_roles_give_the_student_of_one_process(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = distill(configure(models, tmp_path / "inline"))
    roles = follow(configure(models, tmp_path / "roles"), monkeypatch, one_each)
    outs = [tmp_path / name / "out" / "model.safetensors" for name in ("inline", "roles")]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    stores = [open_store(tmp_path / name / "store") for name in ("inline", "roles")]
    keys = [Counter(s.unit_key for s in store.head().segments) for store in stores]
    assert keys[0] == keys[1]
    assert roles.last["cache/age"] == inline.last["cache/age"]
