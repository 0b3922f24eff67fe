"""Tiny models and a small store, made once per process by the command line, and a way to call it.

They lie in memory where the system has /dev/shm, because a store flushes every file that it writes.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from logitcask.cli.main import run
from tests.engine.tiny import CHARACTERS, make_model, make_tokenizer, save_folder

MEMORY = Path("/dev/shm")
UNITS, N, NEW = 4, 2, 6
"""Units of two prompts, responses per prompt, response tokens at most."""

SAMPLING = f"--n {N} --max-new-tokens {NEW} --student-topk 4 --unit-prompts 2 --seed 3 --device cpu"
KEPT = "--teacher-topk-min 4 --teacher-topk-max 8 --device cpu"
TRAINING = "--pack-length 64 --lr 1e-3 --loss-topk 4 --save-steps 1 --device cpu"

PLAIN = f"--no-chat-template {SAMPLING}"
ROLL = f"rollout --model @student --prompts @p.jsonl {PLAIN} --store"
SCORE = f"score --model @teacher --teacher big {KEPT} --store"
TRAIN = f"train --model @student {TRAINING} --store"

DISTILL = f"""
[student]
model = "student"
[teacher]
model = "teacher"
name = "big"
[prompts]
file = "p.jsonl"
chat_template = false
[store]
url = "loop-store"
[rollout]
n = {N}
max_new_tokens = {NEW}
student_topk = 4
[score]
teacher_topk_min = 4
teacher_topk_max = 8
[train]
objective = "opd"
loss_topk = 4
learning_rate = 1e-3
pack_length = 64
[loop]
rounds = 2
prompts_per_round = 4
[run]
out = "loop-out"
device = "cpu"
"""


@dataclass(frozen=True)
class CommandResult:
    """Exit code, stdout and stderr of one command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Parse stdout, which must be JSON without NaN and infinities."""
        return json.loads(self.out, parse_constant=pytest.fail)

    def assert_error(self, code: int, cause: str, hint: str) -> None:
        """Check the exit code, the two lines of the error, and that stdout is empty."""
        assert self.out == ""
        error, hint_line = self.err.splitlines()[-2:]
        assert error.startswith("error: "), self.err
        assert hint_line.startswith("hint: "), self.err
        assert (self.code, cause in error, hint in hint_line) == (code, True, True), self.err


@dataclass(frozen=True)
class World:
    """`path` holds the models student, teacher and others, p.jsonl, and the store st."""

    path: Path
    fresh: Iterator[int] = field(default_factory=itertools.count)

    def __call__(self, command: str) -> int:
        """Return the exit code of `logitcask COMMAND`; @name in it is a path in this folder."""
        return run([word.replace("@", f"{self.path}/") for word in command.split()])

    def new(self, stem: str) -> str:
        """Return the @name of an unused path."""
        return f"@{stem}-{next(self.fresh)}"

    def at(self, name: str) -> Path:
        return self.path / name.removeprefix("@")

    def store(self, records: int = 2 * UNITS) -> str:
        """Return the @name of a copy of st after `records` commits: rollouts first, then scores."""
        name = self.new("store")
        shutil.copytree(self.path / "st", self.at(name))
        for record in sorted(self.at(name).glob("log/*.json"))[records:]:
            record.unlink()
        return name


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        made = World(Path(folder))
        models(made.path)
        (made.path / "d.toml").write_text(DISTILL)
        sums = [{"id": f"p{i}", "prompt": f"{i} + {i + 1} ="} for i in range(2 * UNITS)]
        (made.path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sums))
        assert made(f"{ROLL} @st") == 0
        assert made(f"{SCORE} @st") == 0
        yield made


def models(path: Path) -> None:
    save_folder(path / "student", make_model(seed=0))
    save_folder(path / "teacher", make_model(seed=1))
    save_folder(path / "other-teacher", make_model(seed=2))
    save_folder(path / "stranger", make_model(seed=3))
    reordered = make_tokenizer(characters=CHARACTERS[::-1])
    save_folder(path / "other-tokenizer", make_model(seed=4), reordered)
    save_folder(path / "no-template", make_model(seed=0), make_tokenizer(chat_template=False))
    curt = make_tokenizer()
    curt.chat_template = curt.chat_template.replace("assistant: ", "bot: ")
    save_folder(path / "other-template", make_model(seed=0), curt)
    shutil.copytree(path / "student", path / "pickled")
    (path / "pickled" / "model.safetensors").rename(path / "pickled" / "pytorch_model.bin")


@pytest.fixture
def call(world: World, capfd: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs `logitcask COMMAND` and returns its result."""

    def run_command(command: str) -> CommandResult:
        capfd.readouterr()
        code = world(command)
        return CommandResult(code, *capfd.readouterr())

    return run_command
