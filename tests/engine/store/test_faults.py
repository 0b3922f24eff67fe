"""Failure of every call to the disk: commits stay, and the same command resumes."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

import logitcask.engine.store.storage.local as files
from logitcask.engine.errors import StoreError
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.log import pending
from logitcask.engine.store.retention import delete, gc
from logitcask.engine.store.verify import verify
from tests.engine.store.faulty import CRASHES, Crash, FaultyOS
from tests.engine.store.made import commit_rollouts, encode_once, key, leave_pending

ERRNOS = (
    errno.ENOSPC,
    errno.EIO,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EMFILE,
)
WAYS_OUT = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "quota",
    errno.EROFS: "use a store elsewhere",
    errno.EACCES: "give this user the right",
    errno.EMFILE: "ulimit",
}


@pytest.fixture(autouse=True)
def encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encode_once(monkeypatch)
    monkeypatch.setattr(pending, "PATIENCE_S", 0.0)
    monkeypatch.setattr(pending, "_POLL_S", 0.0)


def make_store(path: Path) -> Store:
    """Make a store with a unit, a deleted unit and two orphans of a killed writer.

    One is in the place of the object of unit 3, and damaged.
    """
    store = open_store(path, create=True)
    commit_rollouts(store, 1)
    commit_rollouts(store, 2, name="old")
    delete(store, rollouts="old")
    (path / "staging" / "left").write_bytes(b"x")
    third = commit_rollouts(open_store(path.with_name("third"), create=True), 3)
    (path / third.path).parent.mkdir(exist_ok=True)
    (path / third.path).write_bytes(b"x")
    return store


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "cask"
    make_store(path)
    return path


def commit_third(path: Path) -> None:
    commit_rollouts(open_store(path), 3)


def commit_again(path: Path) -> None:
    """Commit a unit again whose content gc has removed."""
    store = open_store(path)
    gc(store, keep_days=0, lease_hours=0)
    commit_rollouts(store, 2, name="old")


def collect(path: Path) -> None:
    gc(open_store(path), keep_days=0, lease_hours=0)


def commit_where_others_wait(path: Path) -> None:
    """Commit a unit that loses its race, so that it waits, and find a dead writer's there."""
    store, rival = open_store(path), open_store(path)
    create = store.storage.create

    def overtaken(name: str, data: bytes) -> bool:
        if name.startswith("log/"):
            store.storage.create = create  # type: ignore[method-assign]
            commit_rollouts(rival, 4)
            if 5 not in visible(path):
                leave_pending(rival, 5)
        return create(name, data)

    store.storage.create = overtaken  # type: ignore[method-assign]
    commit_rollouts(store, 3)
    commit_rollouts(open_store(path), 5)  # the command of the dead writer runs again


JOBS = {
    "commit": commit_third,
    "gc": collect,
    "again": commit_again,
    "waiting": commit_where_others_wait,
}
EXPECTED = {"commit": {1, 3}, "gc": {1}, "again": {1, 2}, "waiting": {1, 3, 4, 5}}
"""Job -> the units that it leaves visible."""


@contextmanager
def failing(disk: FaultyOS, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", disk)
        yield


def calls_of(job: Callable[[Path], None], path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    disk = FaultyOS(0, Crash())
    with failing(disk, monkeypatch):
        job(path)
    return disk.count


def raises_if(kind: type[BaseException], holds: bool) -> AbstractContextManager[object]:
    return pytest.raises(kind) if holds else nullcontext()


def refusal(job: Callable[[Path], None], path: Path) -> StoreError | None:
    try:
        job(path)
    except StoreError as error:
        return error
    return None


def visible(path: Path) -> set[int]:
    return {s.unit["first"] for s in open_store(path).head().segments}


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("how", CRASHES)
def test_a_crash_at_any_call_loses_nothing(
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counts: Callable[[int, int], int],
    name: str,
    how: str,
) -> None:
    """Crash at every fourth call, gc at every other, the ways in turn; `make soak`: all at each."""
    job = JOBS[name]
    total = calls_of(job, Path(shutil.copytree(sound, tmp_path / "count")), monkeypatch)
    assert total > 40
    graves = tmp_path / "graves"
    step = 2 if name == "gc" else 4
    first = step * CRASHES.index(how) + step // 2 * (name == "again")
    stride = counts(step * len(CRASHES), 1)
    for at in [*range(1 + first % stride, total + 1, stride), total + 1]:
        path = Path(shutil.copytree(sound, tmp_path / "cask"))
        graves.mkdir()
        disk = FaultyOS(at, Crash(), graves)
        with failing(disk, monkeypatch), raises_if(Crash, at <= total):
            job(path)
        disk.crash(how)
        if at > total:  # The machine stopped when the job had been acknowledged.
            assert visible(path) == EXPECTED[name]
        # Acknowledged commits are there, and all files of the log are whole.
        store = open_store(path)
        assert visible(path) >= {1}
        verify(store)
        job(path)
        assert visible(path) == EXPECTED[name]
        gc(open_store(path), keep_days=0, lease_hours=0)
        assert verify(open_store(path)).orphans == (), f"call {at} of {total}"
        shutil.rmtree(path)
        shutil.rmtree(graves)


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["commit", "gc"])
def test_an_error_at_any_call_is_raised_and_undone(
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counts: Callable[[int, int], int],
    name: str,
    number: int,
) -> None:
    """Raise one error at every other call; `make soak` raises every error at each."""
    job, words = JOBS[name], os.strerror(number)
    total = calls_of(job, Path(shutil.copytree(sound, tmp_path / "count")), monkeypatch)
    fields, stride = 0, counts(2 * len(ERRNOS), 1)
    first = 2 * ERRNOS.index(number) + (name == "gc")
    calls = range(1 + first % stride, total + 1, stride)
    for at in calls:
        path = Path(shutil.copytree(sound, tmp_path / "cask"))
        disk = FaultyOS(at, OSError(number, words))
        with failing(disk, monkeypatch):
            error = refusal(job, path)
        if error is not None:
            fields += 1
            assert words in error.cause
            assert str(path) in error.cause
            assert WAYS_OUT.get(number, "check the disk") in error.hint
        # Else it was the removal of a temporary file, whose error is ignored.
        assert visible(path) >= {1}
        job(path)
        assert visible(path) == EXPECTED[name]
        shutil.rmtree(path)
    assert len(calls) - 12 // stride - 1 <= fields <= len(calls)


def test_creation_can_fail_anywhere_and_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(path: Path) -> None:
        open_store(path, create=True)

    for how in CRASHES:
        total = calls_of(create, tmp_path / f"count-{how}", monkeypatch)
        assert total > 40
        for at in range(1, total + 1):
            path, graves = tmp_path / f"{how}-{at}", tmp_path / f"graves-{how}-{at}"
            graves.mkdir()
            disk = FaultyOS(at, Crash(), graves)
            with failing(disk, monkeypatch), pytest.raises(Crash):
                create(path)
            disk.crash(how)
            store = open_store(path, create=True)
            assert open_store(path).uuid == store.uuid
            commit_rollouts(store, 1, key(1))
            assert verify(open_store(path)).segments == 1


def test_a_new_store_below_new_folders_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make every parent folder of a commit durable."""
    (tmp_path / "graves").mkdir()
    disk = FaultyOS(0, Crash(), tmp_path / "graves")
    with failing(disk, monkeypatch):
        commit_rollouts(open_store(tmp_path / "a" / "b" / "cask", create=True), 1)
    disk.crash("lost")
    assert verify(open_store(tmp_path / "a" / "b" / "cask")).segments == 1


# Linux answers with the second.
@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EPERM])
def test_a_disk_without_hard_links_is_refused_at_creation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class NoLinks:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def link(self, *_: Any) -> None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "os", NoLinks())
    with pytest.raises(StoreError, match="cannot publish") as caught:
        open_store(tmp_path / "cask", create=True)
    assert "no hard links" in caught.value.hint


def test_a_storage_on_which_two_writers_could_both_win_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuse the behaviour of s3fs until 2025, which overwrote small objects."""

    def overwrite(self: files.LocalStorage, name: str, data: bytes) -> bool:
        Path(self.where(name)).write_bytes(data)
        return True

    monkeypatch.setattr(files.LocalStorage, "create", overwrite)
    with pytest.raises(StoreError, match="lets a writer overwrite") as caught:
        open_store(tmp_path / "cask", create=True)
    assert "conditional puts" in caught.value.hint


def test_a_disk_that_keeps_other_bytes_is_found_before_they_have_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "cask", create=True)
    write = files._write_new

    def wrong(path: Path, data: bytes, **options: Any) -> None:
        write(path, data[:-1] + b"x" if len(data) > 5000 else data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_new", wrong)
        with pytest.raises(StoreError, match="reads other bytes than were written"):
            commit_rollouts(store, 1)
    assert store.storage.files("seg") == store.storage.files("staging") == []
    assert commit_rollouts(store, 1).number == 0
