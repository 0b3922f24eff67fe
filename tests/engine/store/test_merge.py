"""Transfer of segments: packed and unpacked, or merged, a store reads the same."""

import random
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import zarr
from obstore.store import MemoryStore

from logitcask.engine.errors import IdentityError, IntegrityError, StoreError
from logitcask.engine.store import Store, extend, open_store
from logitcask.engine.store.format.layouts import ranked
from logitcask.engine.store.log.lines import encode_sealed
from logitcask.engine.store.merge import MergeReport, merge, pack, unpack
from logitcask.engine.store.retention import delete, gc
from logitcask.engine.store.storage.object_store import ObjectStorage
from logitcask.engine.store.store import open_on
from logitcask.engine.store.verify import verify
from tests.engine.store.made import ROLLOUT_PROVENANCE, bounded, commit_rollouts, commit_scores, key
from tests.engine.store.test_extend import teacher_of


def filled(store: Store) -> Store:
    """Add rollouts and two teachers, one of them with an extension."""
    teacher, base, student = teacher_of(store, 3)
    first = commit_scores(store, base, 0, scores=teacher.score(4, student))
    at = extend.request_ids(store.read_scores((first,)))
    commit_scores(store, base, 1, scores=teacher.score(20, at), at=at)
    other = bounded(2, teacher.score(9, student))
    commit_scores(store, base, 2, scores=other, name="other", seconds=2.5)
    commit_rollouts(store, 5, reward=True)
    return store


def same(ours: Store, theirs: Store) -> None:
    """Compare units, contents and the order of reading."""
    a, b = ours.head(), theirs.head()
    fields, expected = (
        {s.unit_key: (s.seg_id, s.seconds) for s in snapshot.segments} for snapshot in (a, b)
    )
    assert fields == expected
    for x, y in zip(a.rollouts("main"), b.rollouts("main"), strict=True):
        mine, other = ours.read_rollouts(x).reward, theirs.read_rollouts(y).reward
        assert np.array_equal(np.asarray(mine), np.asarray(other))
    for name in b.names("score"):
        for base, score_segments in b.scores(name).items():
            mine, other = ours.read_scores(a.scores(name)[base]), theirs.read_scores(score_segments)
            assert (mine.entropy_hi is None) == (other.entropy_hi is None) == (name != "other")
            assert np.array_equal(np.asarray(mine.entropy_hi), np.asarray(other.entropy_hi))
            x, y = ranked(mine), ranked(other)
            assert np.array_equal(x.ids, y.ids)
            assert np.array_equal(x.lp, y.lp)
    verify(ours, deep=True)


def test_packed_and_unpacked_in_any_order(store: Store, tmp_path: Path) -> None:
    filled(store)
    files = pack(store, tmp_path / "packed")
    assert len(files) == 5
    random.Random(0).shuffle(files)
    other = open_store(tmp_path / "other", create=True)
    assert unpack(other, files) == MergeReport(added=5, there=0, left_out=0)
    same(other, store)
    assert unpack(other, files) == MergeReport(added=0, there=5, left_out=0)
    again = pack(other, tmp_path / "again")
    assert {f.name: f.read_bytes() for f in again} == {f.name: f.read_bytes() for f in files}


def test_a_packed_segment_is_a_zarr_group(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cask", create=True)
    segment = commit_rollouts(store, 5)
    (file,) = pack(store, tmp_path / "packed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = zarr.storage.ZipStore(file, mode="r")
        tokens = zarr.open_group(packed, mode="r")["response_tokens"][:]
        packed.close()
    assert np.array_equal(tokens, store.read_rollouts(segment).tokens)


def test_a_snapshot_is_packed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cask", create=True)
    commit_rollouts(store, 1)
    snapshot = store.head()
    commit_rollouts(store, 2)
    assert len(pack(store, tmp_path / "packed", snapshot=snapshot)) == 1


def test_scores_without_their_rollouts_are_left_out(tmp_path: Path) -> None:
    store = filled(open_store(tmp_path / "cask", create=True))
    files = [f for f in pack(store, tmp_path / "packed") if f.name.startswith("score")]
    other = open_store(tmp_path / "other", create=True)
    assert unpack(other, files) == MergeReport(added=0, there=0, left_out=3)
    assert other.head().segments == ()


def test_a_packed_file_that_was_touched_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cask", create=True)
    commit_rollouts(store, 5, student=True)
    (file,) = pack(store, tmp_path / "packed")
    sound, rng = file.read_bytes(), random.Random(0)
    refused = 0
    for trial in range(300):
        bad = bytearray(sound)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        other = open_store(tmp_path / f"other{trial}", create=True)
        error = refusal(other, file)
        if error is None:
            # Dates and similar fields of the zip's own directory are not part of the segment.
            same(other, store)
        else:
            refused += 1
            assert str(file) in error.cause
            assert other.head().segments == ()
    assert refused > 200


def refusal(store: Store, file: Path) -> StoreError | None:
    try:
        unpack(store, [file])
    except StoreError as error:
        return error
    return None


def rewritten(file: Path, change: dict[str, bytes | None], compress: bool = False) -> None:
    with zipfile.ZipFile(file) as packed:
        contents = {name: packed.read(name) for name in packed.namelist()}
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", kind) as packed:
        for name, data in {**contents, **change}.items():
            if data is not None:
                packed.writestr(name, data)


@pytest.mark.parametrize(
    ("change", "compress", "words"),
    [
        ({"logitcask.json": None}, False, "no item named 'logitcask.json'"),
        ({"logitcask.json": b"{}"}, False, "does not match its own sha256"),
        (
            {"logitcask.json": encode_sealed({"add": ["rollout"]})},
            False,
            "not a valid segment",
        ),
        ({"response_tokens/c/0": None}, False, "no item named 'response_tokens/c/0'"),
        ({"response_tokens/c/0": b""}, False, "its files do not match its entry"),
        ({"response_tokens/c/0": bytes(1 << 20)}, False, "compressed or too large"),
        ({}, True, "is compressed"),
    ],
)
def test_a_packed_file_of_a_stranger(
    tmp_path: Path, change: dict[str, bytes | None], compress: bool, words: str
) -> None:
    store = open_store(tmp_path / "cask", create=True)
    commit_rollouts(store, 5, student=True)
    (file,) = pack(store, tmp_path / "packed")
    rewritten(file, change, compress)
    other = open_store(tmp_path / "other", create=True)
    with pytest.raises(IntegrityError, match=words) as caught:
        unpack(other, [file])
    assert str(file) in caught.value.cause
    assert other.head().segments == ()


def test_other_files_are_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cask", create=True)
    (tmp_path / "notes.zip").write_bytes(b"not a zip")
    with pytest.raises(IntegrityError, match=r"notes\.zip: not a packed segment"):
        unpack(store, [tmp_path / "notes.zip"])
    with pytest.raises(StoreError, match="cannot read"):
        unpack(store, [tmp_path / "absent.zip"])


def test_stores_merge_both_ways(store: Store, tmp_path: Path) -> None:
    filled(store)
    other = open_store(tmp_path / "other", create=True)
    commit_rollouts(other, 77)
    assert merge(other, store) == MergeReport(added=5, there=0, left_out=0)
    assert merge(store, other) == MergeReport(added=1, there=5, left_out=0)
    same(store, other)
    number = store.head().number
    assert merge(store, open_on(store.storage)).added == 0
    assert store.head().number == number


def test_a_killed_merge_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(open_store(tmp_path / "cask", create=True))
    other = open_store(tmp_path / "other", create=True)
    put, count = other.storage.put, 0

    def dies(name: str, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        put(name, data)

    with monkeypatch.context() as patch:
        patch.setattr(other.storage, "put", dies)
        with pytest.raises(KeyboardInterrupt):
            merge(other, store)
    assert merge(other, store) == MergeReport(added=3, there=2, left_out=0)
    same(other, store)


def test_a_unit_that_was_made_twice_keeps_the_first(tmp_path: Path) -> None:
    """Merge a unit that two machines made with other last bits and scored."""
    here, there = (open_store(tmp_path / name, create=True) for name in ("here", "there"))
    for store, seed in ((here, 1), (there, 2)):
        base = commit_rollouts(store, seed, key("unit"), student=True)
        commit_scores(store, base, seed)
    before = here.head()
    assert merge(here, there) == MergeReport(added=0, there=1, left_out=1)
    assert here.head() == before


def test_a_name_with_another_identity_is_refused(tmp_path: Path) -> None:
    here, there = (open_store(tmp_path / name, create=True) for name in ("here", "there"))
    commit_rollouts(here, 1)
    other = ROLLOUT_PROVENANCE | {"set": {"digest": "sha256:other"}}
    commit_rollouts(there, 2, provenance=other)
    with pytest.raises(IdentityError, match="'main' stands for"):
        merge(here, there)
    assert len(here.head().segments) == 1


def test_damage_in_the_other_store_is_not_merged(tmp_path: Path) -> None:
    here, there = (open_store(tmp_path / name, create=True) for name in ("here", "there"))
    segment = commit_rollouts(there, 2)
    file = Path(there.url) / segment.path
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=segment.path):
        merge(here, there)
    assert here.head().segments == ()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cask", create=True)
    commit_rollouts(store, 1)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write"):
        pack(store, tmp_path / "file" / "packed")


def test_segments_that_gc_removed_are_not_damage(tmp_path: Path) -> None:
    store = filled(open_store(tmp_path / "ours", create=True))
    snapshot = store.head()
    delete(store, teacher="teacher")
    gc(store, keep_days=0, lease_hours=0)
    with pytest.raises(StoreError, match="was deleted, and gc has removed it") as caught:
        pack(store, tmp_path / "packed", snapshot=snapshot)
    assert not isinstance(caught.value, IntegrityError)


def test_verifying_while_gc_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for deep in (False, True):
        store = filled(open_store(tmp_path / f"ours-{deep}", create=True))
        read, other = store.read_object, open_store(store.url)
        before = len(store.head().segments)

        def meanwhile(which: Any, store: Any = store, read: Any = read, other: Any = other) -> Any:
            monkeypatch.setattr(store, "read_object", read)
            delete(other, teacher="teacher")
            gc(other, keep_days=0, lease_hours=0)
            return read(which)

        monkeypatch.setattr(store, "read_object", meanwhile)
        assert 0 < verify(store, deep=deep).segments < before


@pytest.mark.parametrize("way", ["merge", "unpack"])
def test_damage_is_repaired_from_a_copy(store: Store, tmp_path: Path, way: str) -> None:
    filled(store)
    copy = open_store(tmp_path / "copy", create=True)
    merge(copy, store)
    files = pack(store, tmp_path / "packed")
    for segment in copy.head().segments[:2]:
        path = Path(copy.url) / segment.path
        path.write_bytes(path.read_bytes()[:-1])
    bring = partial(merge, copy, store) if way == "merge" else partial(unpack, copy, files)
    assert bring() == MergeReport(added=0, there=5, left_out=0), "what is there is not looked at"
    with pytest.raises(IntegrityError):
        verify(copy)
    assert bring(repair=True) == MergeReport(added=0, there=5, repaired=2, left_out=0)
    same(copy, store)
    verify(copy, deep=True)


def test_an_object_store_is_repaired(tmp_path: Path) -> None:
    sound = filled(open_store(tmp_path / "sound", create=True))
    objects = MemoryStore()
    store = open_on(ObjectStorage("memory://cask", objects), create=True)
    merge(store, sound)
    name = store.head().segments[0].path
    obstore.put(objects, name, b"x" * 5000)
    with pytest.raises(IntegrityError, match=name):
        verify(store)
    assert merge(store, sound, repair=True).repaired == 1
    verify(store, deep=True)
