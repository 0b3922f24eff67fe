"""The supervisor of processes: starts, restarts, ends, and leaves none behind."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.errors import (
    ConfigError,
    IncompleteError,
    IntegrityError,
    LogitcaskError,
    ProcessError,
)
from logitcask.engine.workers import processes
from logitcask.engine.workers.processes import Command, supervise

linux = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is of Linux")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "POLL_S", 0.005)
    monkeypatch.setattr(processes, "BACKOFF_S", 0.01)


def shell(role: str, script: str, **options: Any) -> Command:
    return Command(role=role, index=0, argv=["sh", "-c", script], **options)


def run(
    logs: Path, *commands: Command, restarts: int = 0, quiet: bool = False
) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Return the output of the leading command, (name, line) of all, and the events."""
    lines: list[tuple[str, str]] = []
    events: list[str] = []
    on_line = None if quiet else lambda *each: lines.append(each)
    output = supervise(commands, logs, restarts=restarts, on_event=events.append, on_line=on_line)
    return output, lines, events


def is_alive(pid: int) -> bool:
    """Return True for a process that runs, and is not a zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 600
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_leading_process_ends_the_others(tmp_path: Path) -> None:
    ready, forever = tmp_path / "ready", "while :; do sleep 0.01; done"
    wait = f"until test -e {ready}; do sleep 0.01; done; sleep 0.05"
    output, lines, events = run(
        tmp_path / "logs",
        shell("train", f"{wait}; echo begun >&2; printf 'a\rb\n' >&2; echo '{{}}'", leads=True),
        shell("rollout", f"trap 'echo last; exit 0' TERM; echo one; : > {ready}; {forever}"),
        shell("score", "echo its work is done"),
    )
    assert (output, events) == ("{}\n", [])
    assert sorted(lines) == [
        *(("rollout-0", "last"), ("rollout-0", "one"), ("score-0", "its work is done")),
        *(("train-0", "b"), ("train-0", "begun")),
    ]
    log = (tmp_path / "logs" / "rollout-0.log").read_text()
    assert re.fullmatch(r"--- [0-9T:-]+ sh -c trap.*\none\nlast\n", log)


def test_a_process_that_dies_is_started_again_within_a_bound(tmp_path: Path) -> None:
    count = f"echo >> {tmp_path}/n; test $(wc -l < {tmp_path}/n) = 3 || kill -9 $$; echo done"
    output, lines, events = run(tmp_path, shell("train", count, leads=True), restarts=2)
    assert (output, lines) == ("done\n", [])
    assert events == [
        "train-0 ended by SIGKILL: restart 1 of 2 in 0.01 s",
        "train-0 ended by SIGKILL: restart 2 of 2 in 0.02 s",
    ]
    (tmp_path / "n").unlink()
    with pytest.raises(ProcessError) as caught:
        run(tmp_path, shell("train", f"echo lost >&2; {count}", leads=True), restarts=1)
    assert caught.value.cause == (
        "train-0 died 2 times in 10 minutes, the last time by SIGKILL: lost"
    )
    assert f"read {tmp_path}/train-0.log" in caught.value.hint


def test_old_deaths_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "WINDOW_S", 0.0)
    count = f"echo >> {tmp_path}/n; test $(wc -l < {tmp_path}/n) = 4 || exit 9"
    _, _, events = run(tmp_path, shell("train", count, leads=True), restarts=1)
    assert events == ["train-0 ended with exit code 9: restart 1 of 1 in 0.01 s"] * 3


@pytest.mark.parametrize(
    ("code", "kind"),
    [(1, ProcessError), (2, ConfigError), (3, IncompleteError), (4, IntegrityError)],
)
def test_an_error_that_would_come_again_ends_all(
    tmp_path: Path, code: int, kind: type[LogitcaskError]
) -> None:
    script = f"echo before; echo error: no such teacher; echo hint: give --teacher; exit {code}"
    pid = tmp_path / "pid"
    commands = (
        shell("score", f"until test -s {pid}; do sleep 0.01; done; {script}"),
        shell("train", f"echo $$ > {pid}; sleep 60", leads=True),
    )
    with pytest.raises(kind) as caught:
        run(tmp_path, *commands, restarts=9)
    assert caught.value.exit_code == code
    assert (caught.value.cause, caught.value.hint) == ("score-0: no such teacher", "give --teacher")
    assert not is_alive(int(pid.read_text()))


def test_an_error_without_lines_on_the_terminal_shows_the_end_of_the_log(tmp_path: Path) -> None:
    events: list[str] = []
    with pytest.raises(ProcessError, match=r"train-0 ended with exit code 1: 29\nread .*\.log"):
        supervise(
            [shell("train", "seq 0 29 >&2; exit 1", leads=True)],
            tmp_path,
            restarts=1,
            on_event=events.append,
        )
    assert events == [f"train-0  {i}" for i in range(10, 30)]


def test_what_ignores_sigterm_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.05)
    pids = tmp_path / "pids"
    stubborn = f"trap '' TERM; sleep 60 & echo $$ $! > {pids}; wait; sleep 60"
    leading = f"until test -s {pids}; do sleep 0.01; done"
    run(tmp_path, shell("rollout", stubborn), shell("train", leading, leads=True))
    until(lambda: not any(is_alive(int(pid)) for pid in pids.read_text().split()))


def test_a_group_starts_and_dies_together(tmp_path: Path) -> None:
    """Kill the second of two, whose death makes the first end with an error, as gloo's does."""
    script = f"""
        echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR >> {tmp_path}/env
        echo $MASTER_PORT >> {tmp_path}/ports
        # Each start has two lines: wait for that of the other.
        until test $(($(wc -l < {tmp_path}/env) % 2)) = 0; do sleep 0.01; done
        if test $(wc -l < {tmp_path}/env) -ge 4; then echo report of $RANK; exit 0; fi
        if test $RANK = 1; then kill -9 $$; else sleep 0.1; exit 1; fi
    """
    output, lines, events = run(tmp_path, shell("train", script, leads=True, ranks=2), restarts=1)
    assert (output, lines) == ("report of 0\n", [("train-0", "report of 1")])
    assert events == ["train-0 ended by SIGKILL: restart 1 of 1 in 0.01 s"]
    seen = sorted((tmp_path / "env").read_text().splitlines())
    assert seen == ["0 0 2 2 127.0.0.1"] * 2 + ["1 1 2 2 127.0.0.1"] * 2
    assert len(set((tmp_path / "ports").read_text().split())) == 2, "a new port each time"


MAIN = """
import sys
from pathlib import Path
from logitcask.engine.workers.processes import Command, supervise
script = "echo $$ >> {0}/pids; trap 'exit 0' TERM INT; while :; do sleep 0.01; done"
each = lambda role, **more: Command(
    role=role, index=0, argv=["sh", "-c", script.format(sys.argv[1])], **more)
supervise([each("train", leads=True), each("rollout")], Path(sys.argv[1]), restarts=0)
"""


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_the_supervisor(tmp_path: Path, number: signal.Signals) -> None:
    pids = tmp_path / "pids"
    main = subprocess.Popen([sys.executable, "-c", MAIN, tmp_path], stderr=subprocess.PIPE)
    until(lambda: pids.exists() and len(pids.read_text().splitlines()) == 2)
    main.send_signal(number)
    error = main.communicate()[1].decode().splitlines()
    last = {signal.SIGKILL: [], signal.SIGINT: ["KeyboardInterrupt"]}.get(
        number,
        [
            "logitcask.engine.errors.IncompleteError: SIGTERM came before the end",
            "run the same command again: it resumes",
        ],
    )
    assert error[len(error) - len(last) :] == last
    until(lambda: not any(is_alive(int(pid)) for pid in pids.read_text().split()))
