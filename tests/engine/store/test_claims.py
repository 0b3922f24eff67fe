"""Claims of units and notes of failures, on each kind of storage."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from logitcask.engine.errors import IntegrityError
from logitcask.engine.store import Store, holds_store, open_store
from logitcask.engine.store.inspect import summary
from logitcask.engine.store.log.claims import (
    MAX_NOTE_BYTES,
    Claim,
    Claims,
    failed_units,
    failures_of,
    forget_failures,
    note_failure,
    shard_of,
)
from logitcask.engine.store.retention import gc
from logitcask.engine.store.storage.base import Storage
from logitcask.engine.store.store import open_on
from logitcask.engine.store.verify import verify
from tests.engine.store.made import commit_rollouts, key

UNIT = key("unit")
LEASE_S = 10.0


@pytest.fixture
def storage(storage: Storage) -> Storage:
    """Return a storage with a store."""
    open_on(storage, create=True)
    return storage


class Hands:
    """A clock that tests set."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def seen_by(storage: Storage, worker: str, clock: Hands) -> Claims:
    return Claims(storage, worker=worker, lease_s=LEASE_S, clock=clock)


def taken(claims: Claims) -> Claim | None:
    claims.refresh(shard_of(UNIT))
    return claims.take(UNIT)


def claims_in(storage: Storage) -> list[str]:
    return [each.name for each in storage.files("claims")]


def test_one_of_many_workers_gets_a_unit(storage: Storage) -> None:
    workers = [seen_by(storage, f"w{i}", Hands()) for i in range(8)]
    for number in range(10):
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda w, n=number: w.take(key("raced", n)), workers))
        assert sum(claim is not None for claim in got) == 1


def test_a_claim_is_dead_after_a_lease_without_a_new_fence(storage: Storage) -> None:
    clock = Hands()
    clock.now_s = 1e6  # another clock does not count
    ours = taken(seen_by(storage, "stopped", Hands()))
    other = seen_by(storage, "other", clock)
    assert ours is not None
    assert taken(other) is None
    clock.now_s += LEASE_S - 1
    assert taken(other) is None
    clock.now_s += 1
    theirs = taken(other)
    assert theirs is not None
    # A slow worker loses its claim, and does not remove the claim of another.
    assert not ours.renew()
    ours.release()
    assert len(claims_in(storage)) == 1
    assert theirs.renew()
    theirs.release()
    assert claims_in(storage) == []


def test_a_renewed_claim_is_alive(storage: Storage) -> None:
    clock = Hands()
    ours = taken(seen_by(storage, "slow", Hands()))
    other = seen_by(storage, "other", clock)
    assert ours is not None
    for _ in range(5):
        assert taken(other) is None
        clock.now_s += LEASE_S
        assert ours.renew()
    assert taken(other) is None
    (name,) = claims_in(storage)
    assert name == f"claims/{UNIT[7:9]}/{UNIT[9:]}.0000000005"
    body = storage.read(name, 1000)
    assert json.loads(body or b"") == {"worker": "slow", "beat": 5}


def test_a_claim_lists_its_shard_alone_and_removes_what_a_dead_worker_left(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        Claims(storage, worker="other", lease_s=LEASE_S).take(key("other", number))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", lambda name: None)  # killed before the removal
        dead = taken(seen_by(storage, "dead", Hands()))
        assert dead is not None
        assert dead.renew()
    assert len(claims_in(storage)) == 22
    clock, listed = Hands(), []
    names, files = storage.names, storage.files
    monkeypatch.setattr(storage, "names", lambda *each: (listed.append(each[0]), names(*each))[1])
    monkeypatch.setattr(storage, "files", lambda *each: (listed.append(each[0]), files(*each))[1])
    other = seen_by(storage, "w", clock)
    assert taken(other) is None
    clock.now_s = LEASE_S
    ours = taken(other)
    assert ours is not None
    for _ in range(3):
        assert ours.renew()
    ours.release()
    assert listed == [f"claims/{UNIT[7:9]}"] * 2, "renewed and released by name"
    monkeypatch.undo()
    assert len(claims_in(storage)) == 20


def test_failures_are_noted_read_and_forgotten_within_bounds(storage: Storage) -> None:
    for text in ("first", "\U0001f600" * 100_000):
        note_failure(storage, UNIT, ValueError(text), "w")
    assert failed_units(storage) == {UNIT: 2}
    assert all(each.size < MAX_NOTE_BYTES for each in storage.files("failed"))
    first, second = failures_of(storage, UNIT)
    assert (first.error, first.message, first.worker) == ("ValueError", "first", "w")
    assert "ValueError: first" in first.traceback
    assert len(second.message) == 1000
    forget_failures(storage, UNIT)
    assert (failed_units(storage), failures_of(storage, UNIT)) == ({}, [])


@pytest.mark.parametrize("data", [b"", b"[]", b'{"time": 1}', b"\xff"])
def test_an_invalid_note_is_an_error_that_names_it(storage: Storage, data: bytes) -> None:
    name = f"failed/{UNIT[7:9]}/{UNIT[9:]}.0000000000"
    storage.create(name, data)
    with pytest.raises(IntegrityError, match="not a note of a failure") as caught:
        failures_of(storage, UNIT)
    assert storage.where(name) in caught.value.cause


def test_verify_info_and_gc_of_claims_and_notes(store: Store) -> None:
    storage, clock = store.storage, Hands()
    done, open_, dead = key("done"), key("open"), key("dead")
    claims = seen_by(storage, "w", clock)
    for unit in (done, open_, dead):
        assert claims.take(unit) is not None
        note_failure(storage, unit, ValueError("no"), "w")
    commit_rollouts(store, 1, done)
    assert verify(store).orphans == ()
    assert summary(store)["failed_units"] == 2
    unknown = ("claims/00/notes.txt", "claims/notes.txt", f"failed/{'0' * 64}.0000000000")
    for name in unknown:
        storage.create(name, b"")
    assert verify(store).orphans == unknown
    # A committed unit needs neither; other claims stay for a lease, other notes for ever.
    assert gc(store, keep_days=0, lease_hours=1, dry_run=True).orphans == 2
    assert gc(store, keep_days=0, lease_hours=1).orphans == 2
    assert len(claims_in(storage)) == 4
    assert gc(store, keep_days=0, lease_hours=0).orphans == 2
    assert claims_in(storage) == list(unknown[:2])
    assert failed_units(storage) == {open_: 1, dead: 1}
    assert store.head().unit_keys() == {done}


def test_a_store_without_the_folders_opens_and_one_with_a_file_there_does_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "cask"
    assert not holds_store(path)
    store = open_store(path, create=True)
    assert holds_store(path)
    assert not (path / "claims").exists()
    assert taken(seen_by(store.storage, "w", Hands())) is not None
    assert (path / "claims").is_dir()
    (path / "failed").write_text("")
    with pytest.raises(IntegrityError, match="failed: file, expected a directory"):
        open_store(path)
