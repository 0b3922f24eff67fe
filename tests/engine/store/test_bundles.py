"""Logs of many records: opened in few reads, whatever is missing or damaged among the bundles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from logitcask.engine.errors import IntegrityError
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.log import bundles
from logitcask.engine.store.retention import tag
from logitcask.engine.store.storage.base import Storage
from logitcask.engine.store.storage.object_store import ObjectStorage
from logitcask.engine.store.store import open_on
from logitcask.engine.store.transfer.copy import log_objects
from logitcask.engine.store.verify import verify
from tests.engine.store.made import commit_rollouts, forged, long_log


class Counting:
    """A storage that notes (call, name) of each request."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self.calls = storage, list[tuple[str, str]]()

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._storage, name)
        if name not in ("read", "read_part", "read_all", "names", "files", "create"):
            return real

        def call(first: Any, *others: Any, **options: Any) -> Any:
            names = first if name == "read_all" else [first]
            self.calls.extend((name.removesuffix("_all"), each) for each in names)
            return real(first, *others, **options)

        return call

    def reads(self) -> list[str]:
        return [name for call, name in self.calls if call in ("read", "read_part")]


def bucket() -> ObjectStorage:
    return ObjectStorage("memory://cask", MemoryStore())


@pytest.fixture(scope="module")
def long() -> ObjectStorage:
    """Return a store of 4096 + 2 * 256 + 3 * 16 + 5 records, each with one segment."""
    storage = bucket()
    long_log(open_on(storage, create=True), 4661)
    return storage


def test_a_log_opens_in_few_reads_and_follows_by_what_is_new(long: ObjectStorage) -> None:
    storage = Counting(long)
    reader = open_on(storage)  # type: ignore[arg-type]
    storage.calls.clear()
    snapshot = reader.head()
    assert (snapshot.number, len(snapshot.segments)) == (4660, 4661)
    names = ["bundles/4096/0000000000", "bundles/256/0000004096", "bundles/256/0000004352"]
    names += [f"bundles/16/{4608 + 16 * n:010d}" for n in range(3)]
    expected = [f"{name}.jsonl" for name in names]
    expected += [f"log/{number:010d}.json" for number in range(4656, 4661)]
    assert sorted(storage.reads()) == sorted(expected)
    assert [call for call, _ in storage.calls].count("names") == len(bundles.LEVELS) + 1
    storage.calls.clear()
    assert reader.head() is snapshot
    assert storage.calls == [("names", "log")], "nothing new, one request"
    # Any position, any number of new records: 15 of each level and 15 + 15 records at most.
    for start in (0, 1, 15, 255, 257, 4095, 4097):
        plan = list(bundles.pieces(start, 4661))
        assert len(plan) <= 64
        assert [first for _, first in plan] == [start, *(a + b for a, b in plan)][:-1]


def test_bodies_of_neighbours_are_read_at_once(long: ObjectStorage) -> None:
    storage = Counting(long)
    segments = open_on(storage).head().segments  # type: ignore[arg-type]
    storage.calls.clear()
    for number, segment in enumerate(segments):
        assert segment.unit["first"] == segment.first == number
    size = sum(each.size for each in long.files("bundles"))
    assert len(storage.reads()) < 16 + 2 * size / 2**20


def test_a_store_whose_first_records_are_in_bundles_only(long: ObjectStorage) -> None:
    """Read it, verify it and write to it: a copy may leave out records that a bundle has."""
    storage = bucket()
    reader = open_on(long)
    head = reader.head()
    for name, data in log_objects(reader, 4660):
        assert data == long.read(name, 1 << 28)
        storage.create(name, data or b"")
    assert len(storage.files("log")) == 5
    copy = open_on(storage)
    assert copy.head() == head
    assert copy.head().segments[77].provenance == head.segments[77].provenance
    assert copy.log.read_record(77) == long.read("log/0000000077.json", 1 << 20)
    for n in range(12):
        tag(copy, f"t{n}", 4000)
    assert copy.head().number == 4672
    assert bundles.name_of(16, 4656) in {each.name for each in storage.files("bundles")}
    # The newest record may be in a bundle only, too.
    for each in storage.files("log")[:-1]:
        storage.remove(each.name)
    again = open_on(storage)
    assert again.head() == copy.head()
    storage.remove(bundles.name_of(16, 4640))
    with pytest.raises(IntegrityError, match=r"0000004640\.json: this published log record is mis"):
        open_on(storage).head()


@pytest.fixture
def store(storage: Storage) -> Store:
    """Return a store of 49 records and three bundles."""
    store = open_on(storage, create=True)
    segment = commit_rollouts(store, 0)
    for n in range(48):
        tag(store, f"t{n}", segment.number)
    return store


def replaced(storage: Storage, name: str, data: bytes) -> None:
    storage.remove(name)
    storage.create(name, data)


def test_a_damaged_bundle_is_ignored_and_found_by_verify(store: Store) -> None:
    storage, head = store.storage, store.head()
    names = [each.name for each in storage.files("bundles")]
    assert names == [bundles.name_of(16, first) for first in (0, 16, 32)]
    for name in names:
        sound = storage.read(name, 1 << 20) or b""
        last = sound.rindex(b'"commit_id"')
        for bad in (
            b"",
            sound[:-1],
            sound + b"\n",
            sound[: len(sound) // 2],
            sound.replace(b"2", b"3", 1),
            sound.replace(b'"t5"', b'"t6"').replace(b'"t20"', b'"t21"').replace(b'"t33"', b'"t3"'),
            sound[:last] + sound[last:].replace(b"a", b"b"),
            b"[" * 500 + b"\n",
        ):
            assert bad != sound
            replaced(storage, name, bad)
            assert open_on(storage).head() == head
            with pytest.raises(IntegrityError, match=f"{name}: other records"):
                verify(open_on(storage))
        replaced(storage, name, sound)
    assert verify(open_on(storage)).orphans == ()
    storage.create("bundles/16/0000000001.jsonl", b"")
    storage.create("bundles/17/0000000000.jsonl", b"")
    unknown = ("bundles/16/0000000001.jsonl", "bundles/17/0000000000.jsonl")
    assert verify(open_on(storage)).orphans == unknown


def test_a_record_that_differs_from_its_bundle_is_found(store: Store) -> None:
    storage, name = store.storage, "log/0000000009.json"
    data = storage.read(name, 1 << 20) or b""
    for bad in (data.replace(b'"t8"', b'"t7"'), data.replace(b'"pid"', b'"Pid"'), data[:-5]):
        replaced(storage, name, bad)
        assert open_on(storage).head() == store.head()
        with pytest.raises(IntegrityError, match=name):
            verify(open_on(storage))


def test_a_larger_bundle_is_made_where_smaller_ones_are_missing(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cask", create=True)
    long_log(store, 255)
    names = [each.name for each in store.storage.files("bundles")]
    assert len(names) == 15
    store.storage.remove(names[3])
    replaced(store.storage, names[4], b"damaged")
    tag(store, "last", 0)
    name = bundles.name_of(256, 0)
    assert name in {each.name for each in store.storage.files("bundles")}
    reader = open_store(store.url)
    assert reader.head() == store.head()
    assert [each for each, _ in log_objects(reader, 255)] == [name, "format.json"]
    assert (Path(store.url) / name).read_bytes().count(b"\n") == 1 + 2 * 256
    first = json.loads((Path(store.url) / name).read_bytes().splitlines()[0])
    assert {key: first[key] for key in ("count", "first")} == {"count": 256, "first": 0}


def test_a_body_is_read_from_its_record_where_the_bundle_is_damaged(store: Store) -> None:
    storage, name = store.storage, bundles.name_of(16, 0)
    reader = open_on(storage)
    (segment,) = reader.head().segments
    assert segment.source.name == name  # type: ignore[union-attr]
    sound = storage.read(name, 1 << 20) or b""
    replaced(storage, name, sound.replace(b'"commit_id"', b'"Commit_id"'))
    assert segment.unit == {"version": 0, "first": 0}
    change: Callable[..., None] = lambda head, body: body.update(x=1)  # noqa: E731
    record = "log/0000000000.json"
    replaced(storage, record, forged(storage.read(record, 1 << 20) or b"", change))
    (segment,) = open_on(storage).head().segments
    with pytest.raises(IntegrityError, match="the body of record 0 is missing, or not the one"):
        _ = segment.unit
