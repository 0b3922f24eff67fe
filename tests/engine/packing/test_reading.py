"""Reading for training: the rows do not depend on windows, threads, processes and caches."""

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.packing import source as row_source
from logitcask.engine.packing.batches import PlannedPacks, Prefetcher, batches, planned
from logitcask.engine.packing.plan import windows_at_most
from logitcask.engine.packing.source import Pack
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.cache import UnitCache, read_unit
from logitcask.engine.store.decoded_unit import dtypes_of, size_of
from logitcask.engine.store.merge import pack
from tests.engine.cached import make_store, make_unit

UNITS = 6


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading") / "store"
    make_store(path, [make_unit(seed, lengths=[5, 0, 9, 2, 7, 1]) for seed in range(UNITS)])
    return path


@pytest.fixture
def store(stored: Path, tmp_path: Path) -> Store:
    return open_store(shutil.copytree(stored, tmp_path / "store"))


def small_windows(store: Store, units: int = 2, **change: object) -> PlannedPacks:
    """Plan packs in windows of this number of units."""
    snapshot = store.head()
    chains = snapshot.scores("big")
    largest = max(size_of(s, chains[s.seg_id]) for s in snapshot.rollouts("main"))
    arguments = {"pack_length": 40, "epochs": 2, "window_bytes": units * largest} | change
    return planned(store, snapshot=snapshot, rollouts="main", teacher="big", **arguments)


def same(a: Pack, b: Pack) -> None:
    for field in fields(Pack):
        if field.name not in ("targets", "lengths", "sources"):
            assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name
    assert a.sources == b.sources
    starts = (a.position_ids[0] == 0).nonzero()[:, 0]
    assert (
        a.lengths
        == b.lengths
        == tuple(starts.diff(append=starts.new_tensor([a.input_ids.shape[1]])).tolist())
    )
    for field in fields(type(a.targets)):
        x, y = getattr(a.targets, field.name), getattr(b.targets, field.name)
        assert (x is None and y is None) or torch.equal(x, y), field.name


def test_sizes_from_the_log_are_those_of_the_units(store: Store) -> None:
    snapshot = store.head()
    for segment in snapshot.rollouts("main"):
        chain = snapshot.scores("big")[segment.seg_id]
        unit = read_unit(store, segment, chain)
        assert 0.7 * size_of(segment, chain) <= unit.size_bytes <= size_of(segment, chain)


@pytest.mark.parametrize("units", [1, 2, 4])
def test_windows_are_within_their_bytes(store: Store, units: int) -> None:
    rows = small_windows(store, units)
    assert len(rows.plan.windows) <= 2 * windows_at_most(UNITS * 10**6, units * 10**6)
    for index in range(len(rows)):
        window = rows.plan.windows[rows.plan.window(index)]
        assert set(rows.plan.pack(index)[:, 0].tolist()) <= set(window.ordinals)
        assert len(window.ordinals) <= units + 1
    assert rows.plan.window(len(rows)) == len(rows.plan.windows)


def test_two_windows_are_in_memory_and_the_next_is_decoded_ahead(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    read = row_source.read_unit
    monkeypatch.setattr(
        row_source, "read_unit", lambda s, r, *c: (decoded.append(r.seg_id), read(s, r, *c))[1]
    )
    rows = small_windows(store, 1, epochs=1)
    source = rows._source
    for index in range(len(rows)):
        rows.pack(index)
        held = list(source._units) + list(source._futures)
        assert len(held) <= 2
    assert len(decoded) == UNITS, "no unit is decoded twice in an epoch"


def test_threads_and_snapshots_change_nothing(store: Store) -> None:
    alone = small_windows(store)
    expected = [alone.pack(i) for i in range(len(alone))]
    ahead = small_windows(store)
    for index in range(len(ahead)):
        row = ahead.pack(index)
        ahead.prefetch(range(index + 1, min(index + 4, len(ahead))))
        same(row, expected[index])
    # Later commits change nothing.
    snapshot = store.head()
    base = snapshot.rollouts("main")[0]
    unit = make_unit(99, lengths=[5, 0, 9, 2, 7, 1])
    store.commit_rollouts(
        unit.rollouts,
        name="main",
        unit_key="sha256:" + "9" * 64,
        unit={"version": 0, "first": 99},
        provenance=base.provenance,
    )
    again = batches(
        store,
        snapshot=open_store(store.url).snapshot(snapshot.number),
        rollouts="main",
        teacher="big",
        pack_length=40,
        epochs=2,
        window_bytes=alone.plan.key.window_bytes,
    )
    for ours, theirs in zip(again, expected, strict=True):
        same(ours, theirs)


def test_ranks_take_turns_and_are_equally_many(store: Store) -> None:
    arguments = {
        "snapshot": store.head(),
        "rollouts": "main",
        "teacher": "big",
        "pack_length": 40,
    }
    expected = list(batches(store, **arguments))
    parts = [list(batches(store, **arguments, rank=rank, world=4)) for rank in range(4)]
    assert {len(part) for part in parts} == {-(-len(expected) // 4)}
    for index in range(4 * len(parts[0])):
        row = parts[index % 4][index // 4]
        if index < len(expected):
            same(row, expected[index])
        else:
            assert len(row.targets) == 0


@pytest.mark.parametrize("cached", [False, True])
def test_workers_in_other_processes_read_the_same(
    store: Store, tmp_path: Path, cached: bool
) -> None:
    rows = small_windows(store, cache=tmp_path / "cache" if cached else None)
    expected = [rows.pack(i) for i in range(len(rows))]
    loader = DataLoader(rows, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    for ours, theirs in zip(loader, expected, strict=True):
        same(ours, theirs)


def test_an_index_after_the_last_row_ends_a_loop(store: Store) -> None:
    rows = small_windows(store)
    assert len(list(rows)) == len(rows)
    with pytest.raises(IndexError):
        rows[-1]


def test_an_error_in_the_thread_is_raised_by_the_read_of_the_row(store: Store) -> None:
    segment = store.head().rollouts("main")[0]
    file = Path(store.url) / segment.path
    rows = small_windows(store, UNITS)
    file.write_bytes(file.read_bytes()[:-1])
    rows.prefetch(range(len(rows)))
    with pytest.raises(IntegrityError, match=segment.path):
        list(rows)


def test_unused_prefetches_are_dropped() -> None:
    loaded: list[int] = []
    ahead = Prefetcher(lambda index: loaded.append(index))  # type: ignore[arg-type, return-value]
    ahead.prefetch([1, 2])
    ahead.prefetch([3])
    ahead.pack(3)
    ahead.pack(1)
    assert loaded.count(3) == 1
    assert loaded[-1] == 1


# Caches of decoded units.


def test_a_cache_holds_the_contents_of_the_store(store: Store, tmp_path: Path) -> None:
    cache = UnitCache(tmp_path / "cache")
    snapshot = store.head()
    for segment in snapshot.rollouts("main"):
        chain = snapshot.scores("big")[segment.seg_id]
        direct, kept = read_unit(store, segment, chain), cache.unit(store, segment, chain)
        for name, dtype in dtypes_of(segment, chain).items():
            assert kept.arrays[name].dtype == np.dtype(dtype)
            assert np.array_equal(kept.arrays[name], direct.arrays[name]), name
            assert isinstance(kept.arrays[name], np.memmap) or not len(kept.arrays[name])
        one, other = kept.sequence(2), direct.sequence(2)
        assert all(np.array_equal(one[name], other[name]) for name in other)
    # The store is not read again.
    shutil.rmtree(Path(store.url) / "seg")
    again = UnitCache(tmp_path / "cache").unit(store, segment, chain)
    assert np.array_equal(again.arrays["token"], direct.arrays["token"])


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[:-1])
    elif how == "pickled":
        with file.open("wb") as out:
            np.save(out, np.asarray([{"x": 1}], object), allow_pickle=True)
    else:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("how", ["gone", "cut", "pickled", "flip"])
@pytest.mark.parametrize("name", ["t_ids.npy", "sizes.json"])
def test_a_damaged_cache_is_reported(store: Store, tmp_path: Path, how: str, name: str) -> None:
    snapshot = store.head()
    segment = snapshot.rollouts("main")[0]
    pair = segment, snapshot.scores("big")[segment.seg_id]
    UnitCache(tmp_path / "cache").unit(store, *pair)
    (folder,) = (tmp_path / "cache").iterdir()
    damage(folder / name, how)
    with pytest.raises(IntegrityError, match="a damaged cache") as caught:
        UnitCache(tmp_path / "cache").unit(store, *pair)
    assert f"remove {folder}" in caught.value.hint
    shutil.rmtree(folder)
    UnitCache(tmp_path / "cache").unit(store, *pair)


def test_a_flipped_bit_of_a_cache_is_never_read(
    store: Store, tmp_path: Path, counts: Callable[[int, int], int]
) -> None:
    """Flip a bit: an error that names a file of the cache, or the same values."""
    snapshot, rng = store.head(), random.Random(0)
    segment = snapshot.rollouts("main")[0]
    pair = segment, snapshot.scores("big")[segment.seg_id]
    whole = UnitCache(tmp_path / "whole").unit(store, *pair).arrays
    (folder,) = (tmp_path / "whole").iterdir()
    files, refused = sorted(folder.iterdir()), 0
    for number in range(times := counts(100, 300)):
        file = files[number % len(files)]
        damaged = tmp_path / str(number) / folder.name / file.name
        shutil.copytree(folder, damaged.parent)
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        damaged.write_bytes(data)
        try:
            found = UnitCache(tmp_path / str(number)).unit(store, *pair).arrays
        except IntegrityError as error:
            refused += str(damaged.parent) in error.cause
        else:
            assert all(np.array_equal(found[name], whole[name]) for name in whole)
        shutil.rmtree(tmp_path / str(number))
    assert refused > times * 0.9


def test_a_cache_is_hashed_once_in_a_process(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, hashed = store.head(), list[int]()
    segment = snapshot.rollouts("main")[0]
    pair = segment, snapshot.scores("big")[segment.seg_id]
    whole = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: [hashed.append(1), whole(*args)][1])
    for _ in range(2):
        UnitCache(tmp_path / "cache").unit(store, *pair)
    assert len(hashed) == len(dtypes_of(*pair))


def test_what_a_killed_writer_left_is_removed_when_it_is_old(store: Store, tmp_path: Path) -> None:
    old, new = tmp_path / ("." + "0" * 32), tmp_path / ("." + "1" * 32)
    for place in (old, new):
        place.mkdir()
        (place / "t_ids.npy").touch()
    mine = tmp_path / ".mine"
    mine.touch()
    for place in (old, mine):
        os.utime(place, (0, 0))
    pack(store, tmp_path, snapshot=store.snapshot(0))
    assert (old.exists(), new.exists(), mine.exists()) == (False, True, True)


def test_an_unwritable_cache_is_reported(store: Store, tmp_path: Path) -> None:
    snapshot = store.head()
    segment = snapshot.rollouts("main")[0]
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write the cache"):
        UnitCache(tmp_path / "file").unit(store, segment, snapshot.scores("big")[segment.seg_id])
