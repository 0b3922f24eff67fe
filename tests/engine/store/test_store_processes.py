"""Writers in processes of their own: one wins a unit, and no acknowledged commit is ever lost."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from logitcask.engine.store import open_store
from logitcask.engine.store.verify import verify
from tests.engine.store import made
from tests.engine.store.made import key


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, made.__file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> list[list[str]]:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return [line.split() for line in out.splitlines() if line != "ready"]


def test_processes_that_race_for_units_agree_on_the_winner(tmp_path: Path) -> None:
    path, go = tmp_path / "cask", tmp_path / "go"
    writers = [start(path, -1, 6, go) for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    go.touch()
    told = [dict(finish(writer)) for writer in writers]
    held = {s.unit_key: s.seg_id for s in open_store(path).head().segments}
    assert sorted(held) == sorted(key("race", n) for n in range(6))
    # Whoever committed or lost was told the segment that readers see.
    for each in told:
        assert all(held[unit_key] == seg_id for unit_key, seg_id in each.items())


def test_four_writers_lose_no_commit(tmp_path: Path) -> None:
    path = tmp_path / "cask"
    told = [dict(finish(writer)) for writer in [start(path, n, 15) for n in range(4)]]
    assert set().union(*told) == {key(n, i) for n in range(4) for i in range(15)}
    store = open_store(path)
    assert store.head().unit_keys() == set().union(*told)
    assert store.head().number == 59
    assert verify(store).strays == ()


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path, endless = tmp_path / "cask", 1000
    rng = random.Random(0)
    acknowledged: set[str] = set()
    for _ in range(8):
        writer = start(path, 1, endless)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        # The first commit of a process loads Zarr; kill in the middle of those that follow it too.
        out = "".join(writer.stdout.readline() for _ in range(rng.randrange(4)))
        time.sleep(rng.random() * 0.2)
        writer.send_signal(signal.SIGKILL)
        out += writer.communicate(timeout=60)[0]
        # A line that the kill cut short has not been told to anybody.
        lines = out[: out.rfind("\n") + 1].splitlines()
        acknowledged |= {line.split()[0] for line in lines}
        seen = open_store(path).head().unit_keys()
        assert acknowledged <= seen
        verify(open_store(path))
    assert acknowledged
    count = len(acknowledged) + 3
    finish(start(path, 1, count))
    assert open_store(path).head().unit_keys() == {key(1, n) for n in range(count)}
    verify(open_store(path))
