"""Several processes on one store: one wins a unit, and no acknowledged commit is lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.errors import StoreError
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.retention import gc
from logitcask.engine.store.verify import verify
from tests.engine.store import worker
from tests.engine.store.made import commit_rollouts, key

ROOT = Path(__file__).resolve().parents[3]


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Yield a function that starts a worker; kill all workers after the test."""
    started: list[subprocess.Popen[str]] = []

    def start_worker(*arguments: object) -> "subprocess.Popen[str]":
        started.append(
            subprocess.Popen(
                [sys.executable, worker.__file__, *map(str, arguments)],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/.src"},
            )
        )
        return started[-1]

    try:
        yield start_worker
    finally:
        for process in started:
            process.kill()
            process.wait()


def finish(process: "subprocess.Popen[str]") -> list[list[str]]:
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0
    return [line.split() for line in out.splitlines() if line != "ready"]


@pytest.mark.timeout(1200)
def test_processes_that_race_for_units_agree_on_the_winner(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "cask"
    winners = [dict(finish(writer)) for writer in [start("race", path, 10) for _ in range(3)]]
    committed = {s.unit_key: s.seg_id for s in open_store(path).head().segments}
    assert sorted(committed) == sorted(key("race", n) for n in range(10))
    # Winners and losers of a race return the segment that readers see.
    for each in winners:
        assert each == committed


@pytest.mark.timeout(1200)
def test_eight_writers_lose_no_commit(tmp_path: Path, counts: Any, start: Start) -> None:
    each = counts(6, 100)
    for run in range(counts(1, 5)):
        path = tmp_path / f"cask-{run}"
        writers = [start("write", path, n, each) for n in range(8)]
        written = [dict(finish(writer)) for writer in writers]
        every = {key(n, i) for n in range(8) for i in range(each)}
        assert set().union(*written) == every
        store = open_store(path)
        assert store.head().unit_keys() == every
        segments, records = store.head().segments, store.head().number + 1
        assert len(segments) == 8 * each > records, "several in a record, none twice"
        assert len(store.storage.names("bundles/16")) == records // 16
        assert verify(store).orphans == ()


@pytest.mark.timeout(1200)
def test_kill_9_loses_no_acknowledged_commit(disk_path: Path, counts: Any, start: Start) -> None:
    path, endless = disk_path / "cask", 1000
    rng = random.Random(0)
    acknowledged: set[str] = set()
    for _ in range(counts(5, 200)):
        writer = start("write", path, 1, endless)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        # The first commit of a process loads Zarr; kill in the middle of those that follow it too.
        out = "".join(writer.stdout.readline() for _ in range(rng.randrange(4)))
        time.sleep(rng.random() * 0.2)
        writer.send_signal(signal.SIGKILL)
        out += writer.communicate(timeout=600)[0]
        # A truncated line was not acknowledged.
        lines = out[: out.rfind("\n") + 1].splitlines()
        acknowledged |= {line.split()[0] for line in lines}
        store = open_store(path)
        assert acknowledged <= store.head().unit_keys()
        assert len(store.head().unit_keys()) == len(store.head().segments)
        verify(store)
    assert acknowledged
    # Some were committed by a writer that was killed before it could print: they are skipped.
    count = len(open_store(path).head().unit_keys()) + 3
    finish(start("write", path, 1, count))
    assert open_store(path).head().unit_keys() == {key(1, n) for n in range(count)}
    gc(open_store(path), keep_days=0, lease_hours=0)
    assert verify(open_store(path), deep=True).orphans == ()


@pytest.mark.timeout(1200)
def test_readers_see_whole_states_while_gc_removes_others(
    tmp_path: Path, counts: Any, start: Start
) -> None:
    path, snapshots = tmp_path / "cask", counts(12, 200)
    commit_rollouts(open_store(path, create=True), 0)
    churn = start("churn", path, counts(18, 100))
    readers = [start("read", path, snapshots) for _ in range(counts(2, 4))]
    for reader in readers:
        ((read, _),) = finish(reader)
        assert int(read) == snapshots
    (tmp_path / "stop").touch()
    ((written, removed),) = finish(churn)
    assert int(removed) > 5
    store = open_store(path)
    assert verify(store, deep=True).orphans == ()
    assert len(store.head().rollouts("main")) == int(written) + 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 8 MB, which only root can make."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill_up(store: Store, acknowledged: set[int]) -> None:
    for number in range(2, 200):
        commit_rollouts(store, number)
        acknowledged.add(number)


@pytest.mark.needs("soak")
def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    for left_kb in range(20, 420, 20):
        path = small_disk / "cask"
        store = open_store(path, create=True)
        commit_rollouts(store, 1)
        fill = small_disk / "fill"
        with fill.open("wb") as file:
            file.truncate(0)
            file.write(bytes(shutil.disk_usage(small_disk).free - left_kb * 1024))
        acknowledged = {1}
        with pytest.raises(StoreError, match="No space left on device") as caught:
            fill_up(store, acknowledged)
        assert "make room" in caught.value.hint
        assert {s.unit["first"] for s in open_store(path).head().segments} == acknowledged
        fill.unlink()
        verify(open_store(path))
        commit_rollouts(open_store(path), 999)
        gc(open_store(path), keep_days=0, lease_hours=0)
        assert verify(open_store(path), deep=True).orphans == ()
        shutil.rmtree(path)
