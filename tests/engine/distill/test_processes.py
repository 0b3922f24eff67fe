"""A loop as processes: the student of one process, and every unit once whatever is killed.

The killer reads the timeline, as a picture of the loop would.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import logitcask.engine.distill.processes as runner
from logitcask.engine.config.parse.toml import read_toml
from logitcask.engine.errors import ConfigError
from logitcask.engine.store import open_store
from logitcask.engine.store.verify import verify
from logitcask.engine.workers.processes import Command
from logitcask.engine.workers.timeline import Span, read_timeline
from tests.engine.distill import forked_roles
from tests.engine.distill.small_loop import ROUNDS, UPDATES, save_case, with_values

UNITS = 8
"""Units of rollouts."""
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Kill:
    """SIGKILL to the process of a role that began the newest unit or update of it."""

    role: str
    begun: int
    """Units or updates that all processes of the role have begun by then."""
    delay_s: float


class Loops:
    """Loops that run one after the other, in processes that begin as copies of one."""

    def __init__(self, models: Path) -> None:
        self.models = models
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        self.process = subprocess.Popen(
            [sys.executable, forked_roles.__file__],
            env=env | {"PYTHONSAFEPATH": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, into: Path, *changes: str, kills: Sequence[Kill] = ()) -> None:
        """Run a loop in a folder to its end; each of `kills` must have ended a process."""
        code, printed = self.run(into, *changes, kills=kills)
        assert code == "0", printed
        ended = re.findall(r"^(\w+)-\d ended by SIGKILL: restart ", printed, re.MULTILINE)
        assert sorted(ended) == sorted(each.role for each in kills), printed

    def run(self, into: Path, *changes: str, kills: Sequence[Kill]) -> tuple[str, str]:
        """Return the exit code of a loop, and what it printed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        into.mkdir(exist_ok=True)
        sets = [f"store.url={into / 'store'}", f"run.out={into / 'out'}", *changes]
        words = ["distill", str(self.models / "d.toml")]
        words += [word for each in sets for word in ("--set", each)]
        over = threading.Event()
        killer = threading.Thread(target=carry_out, args=(into / "out", kills, over))
        killer.start()
        self.process.stdin.write(json.dumps([*words, str(into / "printed")]) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline().strip()
        over.set()
        killer.join()
        return code, (into / "printed").read_text()


def carry_out(out: Path, kills: Sequence[Kill], over: threading.Event) -> None:
    left = list(kills)
    while left and not over.wait(0.01):
        for each in list(left):
            found = begun(out, each.role)
            if len(found) >= each.begun:
                time.sleep(each.delay_s)
                os.kill(found[-1].pid, signal.SIGKILL)
                left.remove(each)


def begun(out: Path, role: str) -> list[Span]:
    """Return the units or updates of a role, also those in which its process died."""
    return [e for e in read_timeline(out) if e.role == role and e.kind in ("unit", "update")]


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loops]:
    toml = with_values(max_new_tokens=4, save_steps=2, poll=0.02) + "[runner]\nrestarts = 30\n"
    path = save_case(tmp_path_factory.mktemp("models"), toml)
    loops = Loops(path)
    with loops.process:
        yield loops
        assert loops.process.stdin is not None
        loops.process.stdin.close()


@pytest.fixture(scope="module")
def inline(loops: Loops, tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("inline")
    loops(into)
    return into


def metrics(into: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (into / "out/metrics.jsonl").read_text().splitlines()]
    clocks = ("progress/seconds", "train/data_wait")
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]


def check_units(into: Path) -> None:
    """Check that each unit is in the store once, and that few were done twice."""
    store = open_store(into / "store")
    segments = store.head().segments
    assert Counter(s.kind for s in segments) == {"rollout": UNITS, "score": UNITS}
    assert len({s.unit_key for s in segments}) == 2 * UNITS
    assert verify(store).segments == 2 * UNITS
    for role in ("rollout", "score"):
        assert UNITS <= len(begun(into / "out", role)) < 1.6 * UNITS, role


def test_a_trainer_killed_at_random_steps_gives_the_student_of_one_process(
    loops: Loops, inline: Path, tmp_path: Path, counts: Callable[[int, int], int]
) -> None:
    for seed in range(counts(1, 5)):
        order, into = random.Random(seed), tmp_path / str(seed)
        steps = accumulate(order.randint(1, 3) for _ in range(2))
        kills = [Kill("train", step, order.uniform(0, 0.05)) for step in steps]
        loops(into, "runner.kind=processes", kills=kills)
        same = (into / "out/model.safetensors").read_bytes()
        assert same == (inline / "out/model.safetensors").read_bytes()
        assert metrics(into) == metrics(inline)
        check_units(into)


def test_every_unit_is_done_once_whatever_is_killed(
    loops: Loops, tmp_path: Path, counts: Callable[[int, int], int]
) -> None:
    for seed in range(counts(2, 10)):
        order, into = random.Random(seed), tmp_path / str(seed)
        kills = [
            Kill(role, order.randint(1, 4), order.uniform(0, 0.05))
            for role in ("rollout", "score", "train")
        ]
        loops(
            into,
            "runner.kind=processes",
            f"runner.rollout={1 + seed % 2}",
            f"loop.max_age={2 * UPDATES}",
            kills=kills,
        )
        check_units(into)
        ages = [line["cache/age"] for line in metrics(into)]
        assert len(ages) == ROUNDS * UPDATES
        assert max(ages) <= 2 * UPDATES + UPDATES - 1


def test_two_processes_train_as_one(loops: Loops, inline: Path, tmp_path: Path) -> None:
    """Kill one that trained alone, go on with two, kill the first of them, and so the other."""
    changes = ["runner.kind=processes", "train.pack_length=24"]
    kill = Kill("train", UPDATES + 1, 0.0)
    code, printed = loops.run(tmp_path, *changes, "runner.restarts=0", kills=[kill])
    assert code == "1", printed
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["rows_per_update"] == 3, "no half of them"
    changes += ["runner.train=torchrun:2"]
    loops(tmp_path, *changes, kills=[Kill("train", UPDATES + 4, 0.0)])
    check_units(tmp_path)
    ours, theirs = (
        [line["loss"] for line in metrics(into)[: 2 * UPDATES]] for into in (tmp_path, inline)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)
    files = [into / "out/model.safetensors" for into in (tmp_path, inline)]
    two, one, start = map(load_file, (*files, loops.models / "student/model.safetensors"))
    distance, moved = (
        max(float((a[name] - b[name]).abs().max()) for name in a)
        for a, b in ((two, one), (one, start))
    )
    assert distance < 0.05 * moved


def test_the_runner_is_no_part_of_a_run(inline: Path) -> None:
    run = json.loads((inline / "out/run.json").read_text())
    assert run.pop("config")["runner"]["restarts"] == 30
    segments = open_store(inline / "store").head().segments
    recorded = [run, *(dict(segment.provenance) for segment in segments)]
    assert "restarts" not in json.dumps(recorded, default=str)


def test_each_process_gets_its_command_and_its_gpus(
    loops: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Command] = []
    monkeypatch.setattr(runner, "supervise", lambda commands, *_, **__: started.extend(commands))
    changes = ["runner.rollout=2", "runner.rollout_gpus=0,1,2,3", "runner.score_gpus=4"]
    changes += ["runner.train=torchrun:2", "runner.train_gpus=5,6"]
    config = read_toml(loops.models / "d.toml", changes)
    runner.run_processes(config, ["d.toml", "--set", "run.seed=1"])
    assert {each.name: (each.env, each.ranks, each.leads) for each in started} == {
        "rollout-0": ({"CUDA_VISIBLE_DEVICES": "0,1"}, 1, False),
        "rollout-1": ({"CUDA_VISIBLE_DEVICES": "2,3"}, 1, False),
        "score-0": ({"CUDA_VISIBLE_DEVICES": "4"}, 1, False),
        "train-0": ({"CUDA_VISIBLE_DEVICES": "5,6"}, 2, True),
    }
    words = [sys.executable, "-P", "-m", forked_roles.MODULE, "distill", "d.toml", "--set"]
    assert started[1].argv == [*words, "run.seed=1", "--role", "rollout", "--index", "1"]
    lost = read_toml(loops.models / "d.toml", ["run.overwrite=true"])
    with pytest.raises(ConfigError, match="a restart would lose the run"):
        runner.run_processes(lost, [])
