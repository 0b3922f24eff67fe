"""Stores of released format versions are read, to the bit."""

import json
import tarfile
from pathlib import Path

import pytest

from logitcask.engine.store import open_store
from logitcask.engine.store.format import schema
from logitcask.engine.store.verify import verify
from tests.engine.store.golden import FILES, digests
from tests.engine.store.made import commit_rollouts


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    for file in FILES:
        with tarfile.open(file) as packed:
            packed.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(
    ("name", "segments"),
    [("first", 15), ("mc", 4), ("reward", 6), ("bounds", 13), ("rows", 20), ("spans", 18)],
)
def test_everything_decodes_to_what_it_was(golden: Path, name: str, segments: int) -> None:
    expected = json.loads((golden / f"{name}.json").read_text())
    store = open_store(golden / name)
    assert digests(store) == expected
    assert len(expected) == segments
    assert verify(store, deep=True).orphans == ()


def test_they_hold_every_layout_and_profile(golden: Path) -> None:
    names = [name for fills in FILES.values() for name in fills]
    stored = [s for name in names for s in open_store(golden / name).head().segments]
    assert {s.layout for s in stored} == {x for kind in schema.LAYOUTS.values() for x in kind}
    assert {s.profile for s in stored} == {"default", "compact", "interop", "raw32"}
    assert {s.generation for s in stored} == {0, 1}
    assert list(golden.glob("*/bundles/16/*")), "records in a bundle"


def test_its_tag_reaches_what_was_deleted(golden: Path) -> None:
    store = open_store(golden / "first")
    tagged = store.snapshot("golden")
    (old,) = tagged.rollouts("old")
    assert store.read_rollouts(old).positions
    assert store.head().rollouts("old") == ()


def test_it_takes_new_commits(golden: Path) -> None:
    store = open_store(golden / "mc")
    number = store.head().number
    commit_rollouts(store, 99)
    assert open_store(golden / "mc").head().number == number + 1


def test_it_is_small() -> None:
    assert all(file.stat().st_size < 80_000 for file in FILES)
