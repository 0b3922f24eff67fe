"""A loop of four rounds on tiny models, in a folder with all that its configuration names."""

import json
from pathlib import Path

from logitcask.engine.config.parse.toml import read_toml
from logitcask.engine.config.sections import RunConfig
from tests.engine.tiny import make_model, save_folder

ROUNDS, UPDATES = 4, 2
"""Rounds, and updates of each."""
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


def save_case(path: Path, toml: str = TOML) -> Path:
    """Write student, teacher, prompts and d.toml; stores and runs are elsewhere."""
    save_folder(path / "student", make_model(hidden=16, layers=1, seed=1, spread=0.1))
    save_folder(path / "teacher", make_model(hidden=16, layers=1, seed=2, spread=0.3))
    rows = [{"id": f"p{i}", "prompt": "abcdefgh"[: i + 1]} for i in range(5)]
    (path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "d.toml").write_text(toml)
    return path


def with_values(**values: float) -> str:
    """Return the configuration with other values of its keys."""
    lines = TOML.splitlines()
    for key, value in values.items():
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{key} = ")]
        lines[at] = f"{key} = {value}"
    return "\n".join(lines) + "\n"


def configure(models: Path, into: Path, *changes: str, file: str = "d.toml") -> RunConfig:
    """Read a configuration of the folder; its store and its run are below `into`."""
    places = (f"store.url={into / 'store'}", f"run.out={into / 'out'}")
    return read_toml(models / file, [*places, *changes])
