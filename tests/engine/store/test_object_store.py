"""A store in an object store: the same guarantees, against a real S3 server on loopback."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store import open_store
from logitcask.engine.store.merge import merge
from logitcask.engine.store.retention import delete, gc
from logitcask.engine.store.storage.base import open_storage
from logitcask.engine.store.storage.object_store import ObjectStorage
from logitcask.engine.store.store import open_on
from logitcask.engine.store.transfer.copy import copy_store
from logitcask.engine.store.upgrade.upgrade import upgrade
from logitcask.engine.store.verify import verify
from tests.engine.store import worker
from tests.engine.store.golden import digests
from tests.engine.store.made import commit_rollouts, commit_scores, key
from tests.engine.store.server import BUCKET, Losing, s3_server
from tests.engine.store.test_processes import ROOT
from tests.engine.store.test_upgrade import unpacked


@pytest.fixture(scope="module")
def server() -> Iterator[Losing]:
    with s3_server() as (_, app):
        yield app


@pytest.fixture
def url(server: Losing) -> Iterator[str]:
    """Yield a new prefix."""
    yield f"s3://{BUCKET}/{uuid.uuid4().hex}/cask"
    server.every = 0


def test_a_store_of_format_1_is_upgraded_to_s3(url: str, tmp_path: Path) -> None:
    upgrade(unpacked(tmp_path, "_mc"), url)
    upgrade(tmp_path / "cask", tmp_path / "here")
    there, here = open_store(url), open_store(tmp_path / "here")
    assert (there.head(), digests(there)) == (here.head(), digests(here))


def test_a_store_on_s3_and_a_copy_on_a_disk(url: str, tmp_path: Path) -> None:
    store = open_store(url, create=True)
    base = commit_rollouts(store, 1, student=True)
    commit_scores(store, base, 1)
    commit_rollouts(store, 2)
    again = open_store(url)
    assert again.head() == store.head()
    report = verify(again, deep=True)
    assert (report.segments, report.orphans) == (3, ())
    local = open_store(tmp_path / "cask", create=True)
    assert merge(local, again).added == 3
    assert [s.seg_id for s in local.head().segments] == [s.seg_id for s in again.head().segments]
    copied = copy_store(again, open_storage(tmp_path / "copy"), snapshot=again.head())
    assert (copied.segments, copied.sha256) == (3, again.head().sha256)
    back = open_storage(f"{url}-back")
    assert copy_store(open_store(tmp_path / "copy"), back, snapshot=again.head()).records == 3
    assert verify(open_on(back)).segments == 3
    assert open_on(back).head() == again.head()
    delete(store, rollouts="main")
    assert gc(store, keep_days=0, lease_hours=0).segments == 3
    assert merge(store, local).added == 3
    assert verify(store, deep=True).orphans == ()


@pytest.mark.timeout(900)
def test_writers_on_s3_lose_no_commit(url: str, server: Losing, counts: Any) -> None:
    """Lose every seventh response, so that a retried put finds its own object."""
    open_store(url, create=True)
    server.every, lost = 7, server.lost
    writers, each = counts(3, 4), counts(6, 200)
    processes = [
        subprocess.Popen(
            [sys.executable, worker.__file__, "write", url, str(n), str(each)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/.src"},
        )
        for n in range(writers)
    ]
    fields: list[str] = []
    for process in processes:
        out, _ = process.communicate(timeout=800)
        assert process.returncode == 0
        fields += [line.split()[0] for line in out.splitlines() if line != "ready"]
    server.every = 0
    assert server.lost - lost > writers
    every = {key(n, i) for n in range(writers) for i in range(each)}
    assert len(fields) == len(every)
    assert set(fields) == every
    store = open_store(url)
    assert store.head().unit_keys() == every
    assert len(store.head().segments) == len(every), "none doubled"
    assert verify(store).orphans == ()


def test_a_lost_response_is_recognised_by_the_object(url: str, server: Losing) -> None:
    server.every = 1
    store = open_store(url, create=True)
    segment = commit_rollouts(store, 1)
    assert store.head().segments == (segment,)
    assert store.head().number == 0
    assert server.lost > 3, "of every put"


def test_damage_in_an_object_store_is_found(url: str) -> None:
    import obstore
    from obstore.store import from_url

    store = open_store(url, create=True)
    segment = commit_rollouts(store, 1)
    name = segment.path
    data = bytearray(store.storage.read(name, 1 << 20) or b"")
    data[0] ^= 1
    obstore.put(from_url(url), name, bytes(data))
    with pytest.raises(IntegrityError, match=f"{url}/{name}: other bytes"):
        verify(open_store(url))
    obstore.delete(from_url(url), name)
    with pytest.raises(IntegrityError, match=f"{url}/{name}: a committed file is missing"):
        verify(open_store(url))
    obstore.put(from_url(url), name, bytes(1 << 20))
    with pytest.raises(IntegrityError, match="bytes where at most"):
        verify(open_store(url))


def test_a_prefix_that_holds_other_things_is_refused(url: str) -> None:
    storage = open_storage(url)
    storage.create("notes.txt", b"x")
    with pytest.raises(StoreError, match=r"not empty: it holds 'notes\.txt'"):
        open_store(url, create=True)
    with pytest.raises(StoreError, match="is not a logitcask store"):
        open_store(url)


def test_no_secret_is_repeated(url: str) -> None:
    texts = []
    for bad in (
        "s3://key:canary-secret@bucket/x",
        "s3://canary-secret:x/y",
        "s3:///x",
        "s3a://key:canary-secret@bucket/x",
        "https://host/x?sig=canary-secret",
        "S3://key:canary-secret@bucket/x",
        f"{url}?token=canary-secret",
        f"s3://no-such-bucket-{uuid.uuid4().hex}/x",
    ):
        with pytest.raises(StoreError) as caught:
            open_store(bad, create=True)
        texts.append(str(caught.value))
    assert not [text for text in texts if "canary-secret" in text]
    assert "cannot list" in texts[-1]


def test_an_endpoint_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from obstore.store import S3Store

    nowhere = S3Store(
        "bucket",
        endpoint="http://127.0.0.1:1",
        access_key_id="x",
        secret_access_key="y",
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    with pytest.raises(StoreError, match=r"cannot read s3://bucket/format\.json") as caught:
        open_on(ObjectStorage("s3://bucket", nowhere))
    assert "endpoint" in caught.value.hint
    assert "Debug source" not in caught.value.cause


def test_without_obstore_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(StoreError, match="need the package obstore") as caught:
        open_store("gs://bucket/cask")
    assert caught.value.hint == 'pip install -e ".[s3]"'


def test_objects_are_listed_in_order_and_from_a_name_on() -> None:
    bucket = ObjectStorage("memory://x", MemoryStore())
    for name in ("log/3", "log/1", "log/2", "seg/a/b", "seg/a/c", "seg/d"):
        assert bucket.create(name, b"x")
    assert bucket.names("log") == ["1", "2", "3"]
    assert bucket.names("log", after="1") == ["2", "3"]
    assert bucket.names("") == ["log", "seg"]
    assert bucket.names("seg") == ["a", "d"]
    assert [each.name for each in bucket.files("seg")] == ["seg/a/b", "seg/a/c", "seg/d"]
    assert bucket.touched_s("seg/d") > 0
    assert bucket.touched_s("seg") == bucket.touched_s("nothing") == 0
    bucket.remove("seg/a/b")
    bucket.remove("seg/a/c")
    bucket.remove("log/1")
    bucket.remove("nothing")
    assert [each.name for each in bucket.files("")] == ["log/2", "log/3", "seg/d"]


def test_a_part_at_and_beyond_the_end(url: str, tmp_path: Path) -> None:
    """Answer alike on a disk, in memory and on S3, which refuses a range that is not there."""
    kinds = [open_storage(url), ObjectStorage("memory://x", MemoryStore())]
    for storage in (*kinds, open_storage(tmp_path)):
        storage.create("log/ten", b"0123456789")
        storage.create("log/empty", b"")
        for start, size in ((0, 10), (3, 4), (8, 4), (9, 1), (10, 1), (12, 4), (3, 0), (0, 99)):
            assert storage.read_part("log/ten", start, size) == b"0123456789"[start:][:size]
            assert storage.read_part("log/empty", start, size) == b""
            assert storage.read_part("log/none", start, size) is None
