"""Stores of released format versions are read, to the bit."""

import json
import tarfile
from pathlib import Path

import pytest

from logitcask.engine.store import Store, open_store
from logitcask.engine.store.format import schema
from logitcask.engine.store.verify import verify
from tests.engine.store.golden import (
    FILE,
    FILE_BOUNDS,
    FILE_MC,
    FILE_REWARD,
    FILE_ROWS,
    digests,
)
from tests.engine.store.made import commit_rollouts


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return unpacked(FILE, tmp_path)


def unpacked(file: Path, folder: Path) -> Path:
    with tarfile.open(file) as packed:
        packed.extractall(folder, filter="data")
    return folder


def opened(golden: Path) -> Store:
    return open_store(golden / "cask")


@pytest.mark.parametrize(
    ("file", "segments"),
    [(FILE, 15), (FILE_MC, 4), (FILE_REWARD, 6), (FILE_BOUNDS, 13), (FILE_ROWS, 20)],
    ids=["first", "mc", "reward", "bounds", "rows"],
)
def test_everything_decodes_to_what_it_was(tmp_path: Path, file: Path, segments: int) -> None:
    golden = unpacked(file, tmp_path)
    expected = json.loads((golden / "digests.json").read_text())
    store = opened(golden)
    assert digests(store) == expected
    assert len(expected) == segments
    assert {s.seconds for s in store.head().segments} == {None}, "a note that came later"
    assert verify(store, deep=True).orphans == ()


def test_they_hold_every_layout_and_profile(golden: Path, tmp_path: Path) -> None:
    stored = opened(golden).head().segments
    later = opened(unpacked(FILE_MC, tmp_path / "later")).head().segments
    assert {s.layout for s in later} == {schema.MC}
    assert {s.profile for s in later} == {s.profile for s in stored}
    rewarded = opened(unpacked(FILE_REWARD, tmp_path / "rewarded")).head().segments
    assert {s.profile for s in rewarded} == {s.profile for s in stored}
    bounded = opened(unpacked(FILE_BOUNDS, tmp_path / "bounded")).head().segments
    assert {s.profile for s in bounded} == {s.profile for s in stored}
    partial = opened(unpacked(FILE_ROWS, tmp_path / "partial")).head().segments
    assert {s.profile for s in partial} == {s.profile for s in stored}
    stored += later + rewarded + bounded + partial
    assert {s.layout for s in stored} == {x for kind in schema.LAYOUTS.values() for x in kind}
    assert {s.profile for s in stored} == {"default", "compact", "interop", "raw32"}
    assert {s.generation for s in stored} == {0, 1}


def test_its_tag_reaches_what_was_deleted(golden: Path) -> None:
    store = opened(golden)
    tagged = store.snapshot("golden")
    (old,) = tagged.rollouts("old")
    assert store.read_rollouts(old).positions
    assert store.head().rollouts("old") == ()


def test_it_takes_new_commits(golden: Path) -> None:
    store = opened(golden)
    number = store.head().number
    commit_rollouts(store, 99)
    assert open_store(golden / "cask").head().number == number + 1


def test_it_is_small() -> None:
    assert FILE.stat().st_size < 80_000
