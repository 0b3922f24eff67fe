"""Group commit: writers that meet at a number are named by one record, each once."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from obstore.store import MemoryStore

from logitcask.engine.errors import IdentityError
from logitcask.engine.store import Store
from logitcask.engine.store.format.schema import MAX_RECORD_BYTES
from logitcask.engine.store.log import pending
from logitcask.engine.store.log.lines import decode_sealed, encode_sealed
from logitcask.engine.store.retention import delete, gc, tag
from logitcask.engine.store.storage.base import Storage
from logitcask.engine.store.storage.object_store import ObjectStorage
from logitcask.engine.store.store import open_on
from logitcask.engine.store.verify import verify
from tests.engine.store.made import (
    ROLLOUT_PROVENANCE,
    commit_rollouts,
    commit_scores,
    encode_once,
    key,
    leave_pending,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    encode_once(monkeypatch)
    monkeypatch.setattr(pending, "PATIENCE_S", 0.0)
    monkeypatch.setattr(pending, "_RANK_S", 0.0)
    monkeypatch.setattr(pending, "_POLL_S", 0.01)


def again(store: Store) -> Store:
    return open_on(store.storage)


def firsts(store: Store) -> list[int]:
    return [s.first for s in again(store).head().segments]


def waiting(store: Store) -> list[str]:
    return [name for name in store.storage.names("log") if name.startswith("pending-")]


def test_writers_that_meet_are_named_by_few_records_each_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pending, "PATIENCE_S", 10.0)
    storage = ObjectStorage("memory://cask", MemoryStore())
    commit_rollouts(open_on(storage, create=True), 0)
    writers = 12
    other = open_on(ObjectStorage("memory://other", MemoryStore()), create=True)
    for seed in range(1 + 4 * writers):
        commit_rollouts(other, seed)  # encoded here: zarr's warnings are not safe in threads
    barrier = threading.Barrier(writers)

    def write(writer: int) -> list[str]:
        store = open_on(storage)
        barrier.wait()
        return [commit_rollouts(store, 1 + 4 * writer + i).unit_key for i in range(4)]

    with ThreadPoolExecutor(writers) as pool:
        written = [unit for units in pool.map(write, range(writers)) for unit in units]
    store = open_on(storage)
    assert sorted(firsts(store)) == list(range(1 + 4 * writers))
    assert store.head().unit_keys() == {key("rollout", 0), *written}
    assert store.head().number < 3 * writers, "several in a record"
    assert waiting(store) == []
    assert verify(store, deep=True).orphans == ()


def test_a_writer_that_stopped_is_committed_by_the_next(store: Store) -> None:
    commit_rollouts(store, 0)
    names = [leave_pending(again(store), seed) for seed in (1, 2)]
    assert firsts(store) == [0], "not data before a record names it"
    assert {f"log/{name}" for name in names} < set(verify(again(store)).orphans)
    commit_rollouts(again(store), 3)
    assert sorted(firsts(store)) == [0, 1, 2, 3]
    assert store.head().number == 1, "one record names all three"
    assert waiting(store) == sorted(names), "their own writers remove them, or gc"
    # The writer wakes up, or its command runs again.
    assert commit_rollouts(store, 1).number == 1
    commit_rollouts(store, 4)
    assert len(store.head().segments) == 5
    assert gc(store, keep_days=0, lease_hours=1).orphans == 2
    assert verify(again(store), deep=True).orphans == ()


class Clock:
    """A clock that only sleep moves."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_the_oldest_publishes_and_patience_ends(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_rollouts(store, 0)
    other = ROLLOUT_PROVENANCE | {"set": {"digest": "sha256:other"}}
    unfit = leave_pending(again(store), 9, name="second", provenance=other)
    commit_rollouts(again(store), 10, name="second")
    for seed, name in enumerate(["main", "a", "b", "c", "d"]):
        leave_pending(again(store), 1 + seed, name=name)
    tag(store, "later")
    clock = Clock()
    monkeypatch.setattr(pending, "time", clock)

    def commit(seed: int) -> float:
        start = clock.now_s
        commit_rollouts(store, seed)
        return clock.now_s - start

    most_s = pending.PATIENCE_S + 5 * pending._RANK_S
    assert most_s <= commit(20) < most_s + 1, "six are older"
    assert set(firsts(store)) == {0, 1, 2, 3, 4, 5, 10, 20}
    # Units that are committed, and adds that do not fit, delay this process no more.
    assert len(waiting(store)) == 6
    assert commit(21) == 0
    assert store.log.unfit == {unfit}
    assert gc(store, keep_days=0, lease_hours=0).orphans == 6
    store.head()
    assert store.log.unfit == store.log.pending == set()


def test_a_unit_of_a_stopped_writer_is_not_published_after_its_deletion(store: Store) -> None:
    """Leave it out: its writer began before, and would have returned the deleted commit."""
    commit_rollouts(store, 0, name="kept")
    leave_pending(again(store), 1)
    commit_rollouts(store, 1)
    delete(store, rollouts="main")
    commit_rollouts(again(store), 2, name="kept")
    assert firsts(store) == [0, 2]
    # A later request of the same unit is another one.
    delete(store, rollouts="kept")
    leave_pending(again(store), 1)
    commit_rollouts(again(store), 3)
    assert sorted(firsts(store)) == [1, 3]


def test_a_pending_add_that_does_not_fit_is_left_out(store: Store) -> None:
    base = commit_rollouts(store, 0, student=True)
    other = ROLLOUT_PROVENANCE | {"set": {"digest": "sha256:other"}}
    left = [
        leave_pending(again(store), 1, name="second", provenance=other),
        leave_pending(again(store), 3, unit_key=key("unit"), name="fourth"),
        leave_pending(again(store), 5, name="fourth"),
    ]
    commit_rollouts(store, 4, name="second")
    # A name with another identity: none. A new name: one, whose identity decides about others.
    assert len(waiting(store)) == 3
    assert len({3, 5} & set(firsts(store))) == 1
    assert {0, 4} < set(firsts(store))
    commit_rollouts(store, 6)
    assert set(firsts(store)) == {0, 3, 4, 5, 6}
    with pytest.raises(IdentityError):
        commit_rollouts(store, 1, name="second", provenance=other)
    assert waiting(store) == sorted(left), "none of them was its own"
    assert len(store.read_rollouts(base).tokens)


def test_scores_of_one_teacher_on_one_base_are_named_by_two_records(store: Store) -> None:
    """Leave out what the first of them makes unfit: the second would have to extend it."""
    bases = [commit_rollouts(store, seed) for seed in range(2)]
    commit_scores(store, commit_rollouts(store, 2), 2)
    for base in bases:
        for unit in range(2):
            unit_key = key("score", base.seg_id, unit)
            leave_pending(again(store), unit, base, unit_key=unit_key)
    before = store.head().number
    commit_rollouts(store, 3)
    scores = [s for s in store.head().segments if s.number == before + 1 and s.kind == "score"]
    assert {s.base for s in scores} == {base.seg_id for base in bases}
    commit_rollouts(store, 4)
    assert len(store.head().scores("teacher")) == len(scores) + 1 == 3
    assert all(len(each) == 1 for each in store.head().scores("teacher").values())
    verify(again(store), deep=True)


def test_gc_removes_the_object_of_a_stopped_writer_and_its_add_is_left_out(store: Store) -> None:
    commit_rollouts(store, 0)
    name = leave_pending(again(store), 1)
    data = store.storage.read(f"log/{name}", 1 << 20) or b""
    assert gc(store, keep_days=0, lease_hours=0).segments == 1
    assert waiting(store) == []
    store.storage.create(f"log/{name}", data)  # as if it had come at this moment
    commit_rollouts(store, 2)
    assert firsts(store) == [0, 2]
    assert commit_rollouts(store, 1).generation == 1
    assert verify(again(store), deep=True).segments == 3


def test_damage_of_a_pending_add_is_left_out(store: Store) -> None:
    commit_rollouts(store, 0)
    name = f"log/{leave_pending(again(store), 1)}"
    sound = store.storage.read(name, 1 << 20) or b""
    entry, _ = decode_sealed(sound, "")
    bad: list[bytes] = [
        b"",
        sound[:-1],
        sound[: len(sound) // 2],
        sound.replace(b'"first":1', b'"first":2'),
        bytes(pending._MAX_BYTES + 1),
        encode_sealed(entry | {"add": entry["add"][:-1]}),
        encode_sealed(entry | {"add": [*entry["add"][:2], 1, *entry["add"][3:]]}),
        encode_sealed(entry | {"unit": {}}),
        encode_sealed(entry | {"add": [*entry["add"][:3], key("x"), *entry["add"][4:]]}),
        encode_sealed([entry]),  # type: ignore[arg-type]
        sealed(json.dumps(entry | {"unit": entry["unit"] | {"x": float("nan")}}).encode()),
        sealed(json.dumps(entry).encode()),
        sealed(b"[" * 50_000),
    ]
    for number, data in enumerate(bad):
        store.storage.remove(name)
        store.storage.create(name, data)
        commit_rollouts(store, 2 + number)
        assert 1 not in firsts(store), data[:200]
    store.storage.remove(name)
    store.storage.create(name, sound)
    commit_rollouts(again(store), 99)
    assert 1 in firsts(store)


def sealed(line: bytes) -> bytes:
    from logitcask.engine.store.format.entry import sha256
    from logitcask.engine.store.log.lines import trailer

    return line + b"\n" + trailer(sha256(line))


def losing(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, which: str, rival: Callable[[], Any]
) -> list[str]:
    """Lose the responses of all creations of names with `which`; a rival precedes the first."""
    created: list[str] = []
    for method in ("create", "leave"):
        real = getattr(storage, method)

        def lost(name: str, data: bytes, real: Callable[..., bool] = real) -> bool:
            if not name.startswith("log/"):
                return real(name, data)
            if not created:
                created.append(name)
                rival()
            created.append(name)
            return real(name, data) and which not in name

        monkeypatch.setattr(storage, method, lost)
    return created


@pytest.mark.parametrize("which", ["log/0", "log/pending-", "log/"])
def test_lost_responses_double_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    commit_rollouts(store, 0)
    rival = again(store)
    created = losing(store.storage, monkeypatch, which, lambda: commit_rollouts(rival, 5))
    assert commit_rollouts(store, 1).first == 1
    assert any("pending-" in name for name in created), "it lost the race for number 1"
    assert firsts(store) == [0, 5, 1]
    assert again(store).head().number == 2
    assert waiting(store) == []


def test_a_large_entry_is_published_by_its_own_writer(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_rollouts(store, 0)
    rival = again(store)
    created = losing(store.storage, monkeypatch, "none", lambda: commit_rollouts(rival, 5))
    large = ROLLOUT_PROVENANCE | {"note": "x" * pending._MAX_BYTES}
    commit_rollouts(store, 1, provenance=large)
    assert not any("pending-" in name for name in created)
    assert firsts(store) == [0, 5, 1]
    assert pending._MAX_BYTES * 8 < MAX_RECORD_BYTES


def test_a_commit_that_others_publish_and_delete_at_once_is_acknowledged(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_rollouts(store, 0, name="kept")
    rival = again(store)
    losing(store.storage, monkeypatch, "none", lambda: commit_rollouts(rival, 5, name="kept"))

    def others(_: float) -> None:
        monkeypatch.setattr(pending.time, "sleep", sleep)
        commit_rollouts(rival, 6, name="kept")
        delete(rival, rollouts="main")

    sleep = time.sleep
    monkeypatch.setattr(pending.time, "sleep", others)
    segment = commit_rollouts(store, 1)
    assert (segment.first, segment.number) == (1, 2)
    assert sorted(firsts(store)) == [0, 5, 6]
    assert waiting(store) == []
