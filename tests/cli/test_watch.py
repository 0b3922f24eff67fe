"""Workers on the command line: their exit codes and the state that they leave."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from logitcask.engine.store import open_store
from tests.cli.conftest import KEPT, ROLL, SCORE, TRAIN, UNITS, World
from tests.engine.backends.server.fake_server import FakeServer
from tests.engine.tiny import make_model, make_tokenizer

RUN = "from logitcask.cli.main import main; main()"
TIMEOUT_S = 600.0
FAILS = "LOGITCASK_TEST_GRADER_FAILS"


def failing_grader(prompt: Any, response: str) -> float:
    """Grade 1, or raise for one prompt while the environment variable is set."""
    if os.environ.get(FAILS) and prompt.id == "p3":
        raise ZeroDivisionError("no reward for p3")
    return 1.0


def segments(call: Any, store: str) -> set[str]:
    return {row["segment"] for row in call(f"store ls {store} --format json").json}


def test_an_idle_teacher_worker_ends_with_the_segments_of_a_plain_score(
    world: World, call: Any
) -> None:
    store, plain = world.store(UNITS), world.store(UNITS)
    result = call(f"{SCORE} {store} --worker --idle-exit 0.01 --poll 0.01 --format json")
    assert result.code == 0
    report = result.json
    assert (report["units"], report["failed"]) == (UNITS, 0)
    assert report["positions"] == call(f"store info {store} --format json").json["positions"]
    assert report["positions_per_second"] > 0
    assert f"score: {UNITS}/{UNITS}" in result.err
    assert call(f"{SCORE} {plain}").code == 0
    assert segments(call, store) == segments(call, plain)
    assert call(f"store verify {store} --format json").json["orphans"] == []


def test_a_failed_unit_exits_with_3_and_runs_again_after_retry_failed(
    world: World, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = world.new("store")
    command = (
        f"{ROLL} {store} --grader tests.cli.test_watch:failing_grader --worker --idle-exit 0.01 "
        "--poll 0.01 --max-attempts 2 --format json"
    )
    monkeypatch.setenv(FAILS, "1")
    result = call(command)
    assert (result.code, result.json["units"], result.json["failed"]) == (3, UNITS - 1, 1)
    assert "GraderError" in result.err.splitlines()[-2]
    assert f"logitcask store retry-failed {world.at(store)}" in result.err.splitlines()[-1]
    assert call(f"store info {store} --format json").json["failed_units"] == 1
    # A later worker skips the failed unit and reports it as well.
    again = call(command)
    assert (again.code, again.json["units"], again.json["failed"]) == (3, 0, 1)

    monkeypatch.delenv(FAILS)
    (removed,) = call(f"store retry-failed {store} --format json").json
    assert (removed["failures"], removed["error"]) == (2, "GraderError")
    assert call(f"store retry-failed {store}").out == "nothing\n"
    done = call(command)
    assert (done.code, done.json["units"], done.json["failed"]) == (0, 1, 0)
    assert call(f"store info {store} --format json").json["failed_units"] == 0


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stopped_worker_leaves_no_claim(
    world: World, call: Any, sent: signal.Signals, code: int
) -> None:
    store = world.new("store")
    words = f"{ROLL} {store} --worker --format json".replace("@", f"{world.path}/").split()
    ended, out, err = stopped(
        words, sent, lambda: len(list((world.at(store) / "log").glob("*.json"))) == UNITS
    )
    assert ended == code, err
    assert [p for p in (world.at(store) / "claims").rglob("*") if p.is_file()] == []
    if code:
        assert out == ""
        assert err.splitlines()[-1].startswith("interrupted: committed units stay")
    else:
        assert json.loads(out)["units"] == UNITS
    assert call(f"store verify {store} --format json").json["segments"] == UNITS


def stopped(
    words: list[str], sent: signal.Signals, begun: Callable[[], bool]
) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of a command that gets a signal once `begun` is true."""
    with process(words) as child:
        wait(child, begun)
        child.send_signal(sent)
        out, err = child.communicate(timeout=TIMEOUT_S)
    return child.returncode, out, err


@contextmanager
def process(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a command as a separate process and kill it at the end."""
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def wait(child: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Wait until the condition is true, and fail if the child ends before."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_student_trains_on_a_snapshot_while_a_teacher_goes_on(world: World, call: Any) -> None:
    store, concurrent, later, newest = world.store(2), *(world.new("run") for _ in range(3))
    cask = open_store(world.at(store))

    def scored(units: int) -> Callable[[], bool]:
        return lambda: len(cask.head().scores("big")) == units

    def words(command: str) -> list[str]:
        return command.replace("@", f"{world.path}/").split()

    # Record 2 is the first score: one of the two rollout units of this snapshot has no scores.
    train = (
        f"{TRAIN} {store} --snapshot 2 --partial --objective opd --num-train-epochs "
        f"16 --format json --out"
    )
    with process(words(f"{SCORE} {store} --worker --poll 0.01 --format json")) as teacher:
        wait(teacher, scored(2))
        with process(words(f"{train} {concurrent}")) as student:
            updates = world.at(concurrent) / "metrics.jsonl"
            wait(student, lambda: updates.exists() and bool(updates.read_text()))
            # The training pauses midway until the store has grown.
            student.send_signal(signal.SIGSTOP)
            assert call(f"{ROLL} {store}").code == 0
            done = updates.read_text().count("\n")
            wait(teacher, scored(UNITS))
            student.send_signal(signal.SIGCONT)
            out, err = student.communicate(timeout=TIMEOUT_S)
        assert student.returncode == 0, err
        teacher.send_signal(signal.SIGTERM)
        teacher_out, teacher_err = teacher.communicate(timeout=TIMEOUT_S)
    assert teacher.returncode == 0, teacher_err
    score_report = json.loads(teacher_out)
    assert (score_report["units"], score_report["failed"]) == (UNITS, 0)
    assert call(f"store verify {store} --deep --format json").json["segments"] == 2 * UNITS

    report, again = json.loads(out), call(f"{train} {later}").json
    assert 1 <= done < report["updates"] == again["updates"]
    assert report["positions"] == again["positions"]
    moved_on = call(f"{train.replace('--snapshot 2', '')} {newest}").json
    assert moved_on["positions"] > report["positions"]
    weights = [world.at(run) / "model.safetensors" for run in (concurrent, later, newest)]
    as_concurrent, as_later, as_newest = (file.read_bytes() for file in weights)
    assert as_concurrent == as_later != as_newest


def stderr_line(child: subprocess.Popen[str], prefix: str) -> str:
    """Return the first line on stderr with this prefix; kill the child after a timeout."""
    timer = threading.Timer(TIMEOUT_S, child.kill)
    timer.start()
    try:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith(prefix):
                return line.strip()
    finally:
        timer.cancel()
    raise AssertionError(f"no line on stderr begins with {prefix!r}")


@pytest.mark.parametrize("scored", [0, 1])
def test_sigterm_ends_a_worker_without_a_server(world: World, scored: int) -> None:
    """Stop it at the start, and within a unit, which is then not committed."""
    store = world.store(UNITS)
    cask = open_store(world.at(store))
    fake = FakeServer(make_model(seed=1), tokenizer=make_tokenizer())
    fake.__enter__()
    fake.delay_s = 0.3
    if not scored:
        fake.__exit__()
    words = (
        f"score --model {fake.url} --tokenizer @teacher --teacher served {KEPT} --store {store} "
        "--worker --server-wait 600 --format json"
    )
    with process(words.replace("@", f"{world.path}/").split()) as child:
        if scored:
            wait(child, lambda: len(cask.head().scores("served")) >= scored)
            fake.__exit__()
        assert stderr_line(child, "waiting for http") == f"waiting for {fake.url}"
        before = set(cask.head().scores("served"))
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == 0, err
    assert set(cask.head().scores("served")) == before
    assert json.loads(out)["units"] == len(before) >= scored
    assert json.loads(out)["failed"] == 0
    claims = world.at(store) / "claims"
    assert [path for path in claims.rglob("*") if path.is_file()] == []
