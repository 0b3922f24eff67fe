"""Ctrl-C: exit code 130, committed units stay, and the same command finishes the work."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.cli.conftest import TRAIN, World

TIMEOUT_S = 600.0
PROMPTS = 400
INTERRUPTED = "interrupted: committed units stay. Rerun the same command to resume."
RUN = "from logitcask.cli.main import main; main()"


def run_interrupted(world: World, command: str, begun: Callable[[], bool]) -> tuple[int, str]:
    """Return (exit code, stderr) of `logitcask COMMAND`, sent SIGINT once `begun` is true."""
    words = [word.replace("@", f"{world.path}/") for word in command.split()]
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        end = time.monotonic() + TIMEOUT_S
        while not begun():
            assert child.poll() is None, child.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=TIMEOUT_S)
    finally:
        child.kill()
    assert out == ""
    return child.returncode, err


def test_a_rollout_resumes_after_ctrl_c(world: World, call: Any) -> None:
    store = world.new("store")
    world.at("@many.jsonl").write_text(
        "".join(f'{{"id": "m{i}", "prompt": "{i} ="}}\n' for i in range(PROMPTS))
    )
    command = (
        "rollout --model @student --prompts @many.jsonl --no-chat-template --n 1 --device cpu "
        f"--max-new-tokens 2 --student-topk 2 --unit-prompts 20 --store {store}"
    )
    log = world.at(store) / "log"
    code, err = run_interrupted(world, command, lambda: len(list(log.glob("*.json"))) >= 2)
    assert code == 130
    *progress, last = err.split("\n")[:-1]
    assert last == INTERRUPTED
    # click ends the interrupted line, and a slow machine reports progress after two seconds.
    known = ("estimate: rollout: ", "rollout: ", "load ", "check ", "hash ", "read ")
    assert all(line == "" or line.startswith(known) for line in progress), err
    before = {file.name: file.read_bytes() for file in log.glob("*.json")}
    done = call(f"{command} --format json").json
    assert 2 <= done["units_done_before"] == len(before) < done["units_total"] == PROMPTS // 20
    assert done["units_new"] == done["units_total"] - done["units_done_before"]
    after = {file.name: file.read_bytes() for file in log.glob("*.json")}
    assert before.items() <= after.items()
    assert len(after) == done["units_total"], "one record per unit: no unit was sampled twice"
    report = call(f"store verify {store} --format json").json
    assert (report["segments"], report["positions"]) == (
        done["units_total"],
        _positions(call, store),
    )
    assert len(report["orphans"]) <= 1, "at most the interrupted unit"


def _positions(call: Any, store: str) -> int:
    return int(call(f"store info {store} --format json").json["positions"])


def test_training_resumes_after_ctrl_c_with_equal_weights(world: World, call: Any) -> None:
    out, uninterrupted = world.new("out"), world.new("out")
    command = f"{TRAIN} @st --objective opd --num-train-epochs 10"
    checkpoints = world.at(out) / "checkpoints"
    code, err = run_interrupted(
        world,
        f"{command} --out {out}",
        lambda: bool(list(checkpoints.glob("checkpoint-*/logitcask_checkpoint.json"))),
    )
    assert code == 130
    assert err.splitlines()[-1] == INTERRUPTED
    resumed = call(f"{command} --out {out} --format json")
    assert 1 <= resumed.json["resumed_at"] < resumed.json["updates"]
    assert "[transformers]" not in err + resumed.err, "a warning of transformers about file formats"
    assert call(f"{command} --out {uninterrupted}").code == 0
    weights = [
        (world.at(folder) / "model.safetensors").read_bytes() for folder in (out, uninterrupted)
    ]
    assert weights[0] == weights[1]


def test_a_ctrl_c_inside_a_finaliser_is_not_lost() -> None:
    program = """
import os, signal, sys, time
from logitcask.cli import main

class Finalised:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

def verb(**_):
    Finalised()
    time.sleep(60)

main.cli.main = verb
main.main([])
"""
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert (child.returncode, child.stderr.split("\n")[0]) == (130, INTERRUPTED)
