"""Logs of many records: opened in few reads, whatever is missing or damaged among the bundles."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

import logitcask.engine.store.storage.local as local
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.log import bundles, record
from logitcask.engine.store.log.body import Bodies, RecordBody
from logitcask.engine.store.log.usual_heads import HeadParser
from logitcask.engine.store.retention import tag
from logitcask.engine.store.storage.base import Storage
from logitcask.engine.store.storage.object_store import ObjectStorage
from logitcask.engine.store.store import open_on
from logitcask.engine.store.transfer.copy import log_objects
from logitcask.engine.store.verify import verify
from tests.engine.store.faulty import CRASHES, Crash, FaultyOS
from tests.engine.store.made import commit_rollouts, commit_scores, forged, long_log


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
    storage: Any = Counting(long)
    reader = open_on(storage)
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
    assert reader.head() == snapshot
    assert storage.calls == [("names", "log")], "nothing new, one request"
    # Any position, any number of new records: 15 of each level and 15 + 15 records at most.
    for start in (0, 1, 15, 255, 257, 4095, 4097):
        plan = list(bundles.pieces(start, 4661))
        assert len(plan) <= 64
        assert [first for _, first in plan] == [plan[0][1], *(a + b for a, b in plan)][:-1]
        assert plan[0][1] == start - start % 16


def parsed(line: bytes, number: int, prev: str) -> Any:
    bodies: Any = None
    try:
        return record.parse_head(line, "", number=number, prev=prev, bodies=bodies, name="x")
    except IntegrityError:
        return None


def shown(new: Any) -> Any:
    body = [getattr(new.body, name) for name in ("number", "name", "size", "sha256", "count")]
    return [getattr(new, name) for name in record.Record.__slots__ if name != "body"] + body


def test_the_quick_parser_of_usual_heads_accepts_no_more_and_reads_the_same(
    store: Store, counts: Callable[[int, int], int]
) -> None:
    base = commit_rollouts(store, 50, student=True)
    commit_scores(store, base, 50)
    commit_rollouts(store, 51, reward=True)
    rng, quick, slow = random.Random(0), 0, 0
    none: Any = None
    parser = HeadParser(none)
    for number in range(49, 52):
        sound, _ = record.split(store.log.read_record(number), "")
        prev = json.loads(sound)["prev"]
        found = parser._parse_usual(sound, number, prev, "x")
        assert found is None, "it learns the form of a head from the first one"
        for _ in range(2):
            found = parser.parse(sound, "", number=number, prev=prev, name="x")
            assert shown(found) == shown(parsed(sound, number, prev))
        found = parser._parse_usual(sound, number, prev, "x")
        assert shown(found) == shown(parsed(sound, number, prev))
        tokens = re.findall(rb'"[^"]*"|[0-9]+|[^"0-9]', sound)
        for _ in range(counts(1500, 50_000)):
            bad = [*tokens]
            at = rng.randrange(len(bad))
            odd = [b"", b"0", b"00", b"-1", b"1e3", b"true", b'""', b"[]", bad[at] * 2]
            odd += [rng.choice(tokens), bytes([rng.randrange(256)]), b"9" * rng.randrange(1, 19)]
            bad[at] = rng.choice(odd)
            line = b"".join(bad)
            ours = parser._parse_usual(line, number, prev, "x")
            if ours is not None:
                theirs = parsed(line, number, prev)
                assert theirs is not None, line
                assert shown(ours) == shown(theirs), line
                quick += 1
            slow += ours is None
    assert slow > quick > 50


def test_equal_provenance_is_decoded_once_and_no_other_value_is_taken_for_it() -> None:
    provenance = {"a": {"unit": 1}, "z": '","provenance":{'}
    lines = [
        {"adds": [{"entries": {}, "provenance": provenance, "unit": {"n": n}}]} for n in range(3)
    ]
    nested = {"entries": {"x": 1, "provenance": provenance}, "provenance": None, "unit": {}}
    two = [{"entries": {}, "provenance": provenance, "unit": {"n": n}} for n in range(2)]
    lines += [{"adds": two}, {"adds": [nested]}, {"adds": [nested, {"provenance": provenance}]}]
    lines += [{"adds": 3, "b": [{"a": 1, "provenance": provenance}]}]
    lines += [{"adds": [{"entries": {}, "provenance": {**provenance, "zz": 1}, "unit": {}}]}]
    bodies = Bodies(bucket(), bundles.body_line)
    for line in lines * 2:
        assert bodies._decode(canonical(line), "") == line
    first, second = (bodies._decode(canonical(line), "") for line in lines[:2])
    assert first["adds"][0]["provenance"] is second["adds"][0]["provenance"]


def test_bodies_of_neighbours_are_read_at_once(long: ObjectStorage) -> None:
    storage: Any = Counting(long)
    segments = open_on(storage).head().segments
    storage.calls.clear()
    for number, segment in enumerate(segments):
        assert segment.unit["first"] == segment.first == number
    size = sum(each.size for each in long.files("bundles"))
    assert len(storage.reads()) < 16 + 2 * size / 2**20


def test_segments_share_a_provenance_that_is_read_once(long: ObjectStorage) -> None:
    storage: Any = Counting(long)
    segments = open_on(storage).head().segments
    storage.calls.clear()
    found = [each.provenance for each in segments]
    assert len(storage.reads()) == 1
    assert all(each == found[0] for each in found)
    for each in (segments[0], segments[-1]):
        with pytest.raises(StoreError, match=each.seg_id):
            _ = each.provenance["lacking"]


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
    with pytest.raises(IntegrityError, match=r"0000004640\.json: this published log record is"):
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


def damaged(sound: bytes) -> list[bytes]:
    last = sound.rindex(b'"commit_id"')
    found = [
        b"",
        sound[:-1],
        sound + b"\n",
        sound[: len(sound) // 2],
        sound.replace(b"2", b"3", 1),
        sound.replace(b'"tags":{"t', b'"tags":{"u', 1),
        sound[:last] + sound[last:].replace(b"a", b"b"),
        b"[" * 500 + b"\n",
    ]
    assert sound not in found
    return found


def test_a_damaged_bundle_is_found_and_used_only_where_it_is_sound(store: Store) -> None:
    storage, head = store.storage, store.head()
    names = [each.name for each in storage.files("bundles")]
    assert names == [bundles.name_of(16, first) for first in (0, 16, 32)]
    assert [record.number_of(name) for name in storage.names("log")] == list(range(32, 49))
    for name in names:
        sound = storage.read(name, 1 << 20) or b""
        for bad in damaged(sound):
            replaced(storage, name, bad)
            reader, cause = open_on(storage), ""
            try:
                assert reader.head() == head
            except IntegrityError as error:
                cause = error.cause
            # log/ has the records of the last one.
            assert not cause or name != names[-1]
            assert not cause or f"{name}: damaged" in cause
            with pytest.raises(IntegrityError, match=name):
                verify(reader)
        replaced(storage, name, sound)
    assert verify(open_on(storage)).orphans == ()
    storage.create("bundles/16/0000000001.jsonl", b"")
    storage.create("bundles/17/0000000000.jsonl", b"")
    unknown = ("bundles/16/0000000001.jsonl", "bundles/17/0000000000.jsonl")
    assert verify(open_on(storage)).orphans == unknown


def test_a_larger_bundle_and_those_below_it_stand_in_for_each_other(store: Store) -> None:
    storage = store.storage
    for n in range(48, 299):
        tag(store, f"t{n}", 0)
    head = store.head()
    assert len(storage.names("log")) < 32
    for name in (bundles.name_of(16, 64), bundles.name_of(256, 0)):
        sound = storage.read(name, 1 << 20) or b""
        for bad in damaged(sound):
            replaced(storage, name, bad)
            reader = open_on(storage)
            assert reader.head() == head
            assert reader.log.read_record(70) == store.log.read_record(70)
            with pytest.raises(IntegrityError, match=name):
                verify(reader)
        replaced(storage, name, sound)


def test_a_reader_follows_where_the_next_records_have_left_the_log(store: Store) -> None:
    readers = [(open_on(store.storage), count) for count in range(20)]
    for reader, count in readers:
        reader.log.refresh()
        for n in range(count):
            tag(store, f"r{count}.{n}", 0)
    for reader, _ in readers:
        assert reader.head() == store.head()
        assert [reader.log.sha256(n) for n in (0, 47, 100)] == [
            store.log.sha256(n) for n in (0, 47, 100)
        ]


@pytest.mark.parametrize("behind", [1, 15, 16, 17, 32, 33, 48])
def test_a_writer_that_paused_does_not_take_a_number_that_was_free_again(
    store: Store, behind: int
) -> None:
    slow, create = open_on(store.storage), store.storage.create

    def paused(name: str, data: bytes) -> bool:
        if name.startswith("log/"):
            slow.storage.create = create  # type: ignore[method-assign]
            for n in range(behind):
                tag(store, f"fast{n}", 0)
        return create(name, data)

    slow.storage.create = paused  # type: ignore[method-assign]
    tag(slow, "slow", 0)
    found = open_on(store.storage)
    found.head()
    assert set(found.log.tags()) >= {"slow", *(f"fast{n}" for n in range(behind))}
    assert len(found.log) == 50 + behind
    numbers = [record.number_of(name) for name in store.storage.names("log")]
    assert len(numbers) < 32, "no record that was made too late"
    assert numbers == list(range(len(found.log)))[-len(numbers) :]
    verify(found)


def test_a_crash_at_every_call_of_the_commit_that_removes_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: Callable[[int, int], int]
) -> None:
    """Crash at every fifth call, the ways in turn; `make soak`: at each."""
    sound = tmp_path / "sound"
    store = open_store(sound, create=True)
    commit_rollouts(store, 0)
    for n in range(30):
        tag(store, f"t{n}", 0)

    def run(path: Path, disk: FaultyOS) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(local, "os", disk)
            tag(open_store(path), "last", 0)

    counted = FaultyOS(0, Crash())
    run(Path(shutil.copytree(sound, tmp_path / "counted")), counted)
    for at in range(1, counted.count + 1, counts(5, 1)):
        how = CRASHES[at % len(CRASHES)]
        path, graves = Path(shutil.copytree(sound, tmp_path / "cask")), tmp_path / "graves"
        graves.mkdir()
        disk = FaultyOS(at, Crash(), graves)
        with pytest.raises(Crash):
            run(path, disk)
        disk.crash(how)
        found = open_store(path)
        verify(found)
        if "last" not in found.log.tags():
            tag(found, "last", 0)
        tag(found, "more", 0)
        verify(open_store(path))
        assert len(open_store(path).head().segments) == 1
        assert len(found.log.tags()) == 32
        shutil.rmtree(path)
        shutil.rmtree(graves)


def test_a_record_that_differs_from_its_bundle_is_found(store: Store) -> None:
    storage, name = store.storage, "log/0000000041.json"
    data = storage.read(name, 1 << 20) or b""
    for bad in (data.replace(b'"t40"', b'"t7"'), data.replace(b'"pid"', b'"Pid"'), data[:-5]):
        assert bad != data
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


def test_a_body_is_read_from_its_record_where_the_bundle_is_damaged(storage: Storage) -> None:
    name = bundles.name_of(16, 0)
    long_log(open_on(storage, create=True), 17)
    reader = open_on(storage)
    segment = reader.head().segments[0]
    assert isinstance(segment.source, RecordBody)
    assert segment.source.name == name
    sound = storage.read(name, 1 << 20) or b""
    replaced(storage, name, sound.replace(b'"commit_id"', b'"Commit_id"'))
    assert segment.unit == {"version": 0, "first": 0}

    def change(head: dict[str, Any], body: dict[str, Any]) -> None:
        body["x"] = 1

    first = "log/0000000000.json"
    replaced(storage, first, forged(storage.read(first, 1 << 20) or b"", change))
    segment = open_on(storage).head().segments[0]
    with pytest.raises(IntegrityError, match="the body of record 0 is missing, or not the one"):
        _ = segment.unit


def test_a_commit_counts_where_its_bundle_finds_no_room(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(storage: Storage, end: int) -> None:
        raise StoreError("no space left", hint="make room")

    monkeypatch.setattr(bundles, "write", full)
    before = store.head().number
    for number in range(100, 117):
        assert commit_rollouts(store, number).number == before + number - 99
    assert open_on(store.storage).head().number == before + 17
