"""Stores of format 1 become stores of format 2: the same rows to the bit, the same log."""

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.errors import IntegrityError, LogitcaskError, StoreError
from logitcask.engine.rollout.unit import prompt_set_digest
from logitcask.engine.rollout.unit import unit_key as rollout_key
from logitcask.engine.score.unit import unit_key as score_key
from logitcask.engine.store import Segment, open_store
from logitcask.engine.store.format import schema
from logitcask.engine.store.format.entry import SegmentBody, sha256
from logitcask.engine.store.format.provenance import ORIGINAL_ID
from logitcask.engine.store.log.lines import encode_sealed
from logitcask.engine.store.storage.local import LocalStorage
from logitcask.engine.store.upgrade.upgrade import UpgradeReport, upgrade, upgrade_on
from logitcask.engine.store.verify import verify
from logitcask.engine.types import ModelRef, Prompt, SamplingParams, ScoreParams
from tests.engine.store.golden import digests
from tests.engine.store.made import commit_rollouts

HERE = Path(__file__).parent
FILES = {
    name: HERE / f"golden_v1{name}.tar.xz" for name in ("", "_mc", "_reward", "_bounds", "_rows")
}


def unpacked(folder: Path, name: str = "") -> Path:
    """Return a store of format 1; digests.json is next to it."""
    with tarfile.open(FILES[name]) as packed:
        packed.extractall(folder, filter="data")
    return folder / "cask"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def bodies(old: Path) -> list[dict[str, Any]]:
    return [json.loads(f.read_bytes().split(b"\n")[0]) for f in sorted(old.glob("log/*.json"))]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return unpacked(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_equal_to_the_bit_and_the_old_store_untouched(
    tmp_path: Path, name: str
) -> None:
    old = unpacked(tmp_path, name)
    before, expected = contents(old), json.loads((tmp_path / "digests.json").read_text())
    report = upgrade(old, tmp_path / "new")
    store = open_store(tmp_path / "new")
    ids = {s.seg_id: s.key_id for s in store.head().segments}
    assert {ids[seg_id]: found for seg_id, found in digests(store).items()} == expected
    assert verify(store, deep=True).orphans == ()
    assert contents(old) == before
    assert (report.segments, report.there) == (len({s.path for s in store.log.present()}), 0)
    assert {s.seconds for s in store.head().segments} == {None}, "a note that came later"


def test_the_stores_of_the_tests_hold_every_layout_and_profile(tmp_path: Path) -> None:
    adds = [
        add
        for name in FILES
        for body in bodies(unpacked(tmp_path / f"of{name}", name))
        for add in body["adds"]
    ]
    later = set(schema.SPAN_LAYOUTS)
    of_both = {layout for layouts in schema.LAYOUTS.values() for layout in layouts} - later
    assert len({add["layout"] for add in adds}) == len(of_both)
    assert {add["profile"] for add in adds} == {"default", "compact", "interop", "raw32"}
    assert {add["generation"] for add in adds} == {0, 1}


def test_the_log_is_the_same_record_for_record(old: Path, tmp_path: Path) -> None:
    upgrade(old, tmp_path / "new")
    store, records = open_store(tmp_path / "new"), bodies(old)
    assert store.head().number == len(records) - 1
    assert len(store.log) == len(records)
    assert (
        store.uuid == json.loads((old / "format.json").read_bytes().split(b"\n")[0])["store_uuid"]
    )
    removed = [content for body in records for content in body["sweeps"]]
    assert removed, "gc removed something"
    for number, body in enumerate(records):
        assert store.log.time(number) == body["time"]
        found = {(s.unit_key, s.name, s.generation) for s in store.log.added(number)}
        assert found == {(a["unit_key"], a["name"], a["generation"]) for a in body["adds"]}
    tagged = store.snapshot("golden")
    (hidden,) = tagged.rollouts("old")
    assert store.read_rollouts(hidden).positions, "deleted, and kept by a tag"
    assert store.head().rollouts("old") == ()
    again = store.head().rollouts("older")[0]
    assert (again.generation, store.log.generation("rollout", again.seg_id)) == (1, 1)


def test_the_command_that_made_the_scores_finds_them() -> None:
    """Compare keys of units with those of its time; the id of format 1 is part of some."""
    model = ModelRef(
        name="m",
        path=Path("m"),
        revision="",
        digest="sha256:w",
        tokenizer_digest="sha256:t",
        template_digest="sha256:c",
        n_vocab=9,
        stop_ids=(1,),
        version=3,
        base_weights="sha256:b",
    )
    shape: Any = {"unit_key": "", "name": "main", "profile": "", "layout": ""}
    provenance = {"teacher_kind": "base", "context": "", "positions": "first:3"}
    for seg_id, more in (("0" * 32, {}), ("f" * 32, {ORIGINAL_ID: "0" * 32})):
        body = SegmentBody(unit={}, provenance=more)
        segment = Segment(kind="rollout", seg_id=seg_id, source=body, **shape)
        key = score_key(segment, model, ScoreParams(), provenance, ("mc",))
        assert key == "sha256:a41b28fe15445668275ef3336aa06d28d041645c54b687b2b0dd68e34603079a"
    prompts = [Prompt(id="a", token_ids=(1, 2), answer=None, extra={})]
    found = prompt_set_digest(prompts, model, SamplingParams(), seed=1, student_k=4)
    assert found == "sha256:857f17fb975b59b34ad04c8f7f284ecde83f98c1698f90d3a652ae6fd6d576cb"
    key = rollout_key(found, model, 0, 1)
    assert key == "sha256:2321eaa23eb0950af73b7a855a2dc63b877148b23a662a31d9b7ebd561230ceb"


def test_it_takes_new_commits(old: Path, tmp_path: Path) -> None:
    upgrade(old, tmp_path / "new")
    store = open_store(tmp_path / "new")
    number = store.head().number
    commit_rollouts(store, 99)
    assert open_store(tmp_path / "new").head().number == number + 1
    assert upgrade(old, tmp_path / "new").there == number + 1, "a second call finds it complete"


class Dying(LocalStorage):
    """A disk whose process is killed at its fourth write; the first two may be repeated ones."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.left = 4

    def _write(self, name: str) -> None:
        self.left -= not name.startswith("staging/")
        if not self.left:
            raise KeyboardInterrupt

    def create(self, name: str, data: bytes) -> bool:
        self._write(name)
        return super().create(name, data)

    def put(self, name: str, data: bytes) -> None:
        self._write(name)
        super().put(name, data)


def test_killed_at_every_write_it_goes_on_and_ends_the_same(old: Path, tmp_path: Path) -> None:
    upgrade(old, tmp_path / "whole")
    new, report, kills = tmp_path / "new", None, 0
    while report is None:
        try:
            report = upgrade_on(LocalStorage(str(old)), Dying(str(new)))
        except KeyboardInterrupt:
            kills += 1
            with pytest.raises(LogitcaskError):
                open_store(new)
    assert isinstance(report, UpgradeReport)
    assert kills > len(bodies(old)) // 3
    assert contents(new) == contents(tmp_path / "whole")


def test_segments_that_gc_removed_for_good_are_left_out(old: Path, tmp_path: Path) -> None:
    """Rewrite the last record, so that gc has removed a content that stays removed."""
    *_, last = sorted(old.glob("log/*.json"))
    last.unlink()
    report = upgrade(old, tmp_path / "new")
    store = open_store(tmp_path / "new")
    assert report.left_out == 1
    assert verify(store, deep=True).segments == report.segments
    assert len(store.log) == len(bodies(old))
    assert "older" not in {s.name for n in range(len(store.log)) for s in store.log.added(n)}


def test_damage_is_named_and_makes_no_store(old: Path, tmp_path: Path) -> None:
    whole = contents(old)
    kept = {f for f in whole if f.startswith(("log/", "format")) or f.endswith("/c/0")}
    kinds: Counter[str] = Counter()
    for name in sorted(kept)[::7]:
        data = bytearray(whole[name])
        data[len(data) // 2] ^= 1
        (old / name).write_bytes(data)
        new = tmp_path / f"new-{sum(kinds.values())}"
        with pytest.raises(IntegrityError) as caught:
            upgrade(old, new)
        assert name in caught.value.cause
        with pytest.raises(LogitcaskError):
            open_store(new)
        (old / name).write_bytes(whole[name])
        kinds[name.split("/")[0]] += 1
    assert set(kinds) >= {"log", "seg"}
    (old / "log/0000000003.json").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        upgrade(old, tmp_path / "gap")


@pytest.mark.parametrize(
    "change",
    [
        {"retires": ["sha256:" + "0" * 64]},
        {"sweeps": [["rollout", "0" * 32, 1]]},
        {"adds": {"generation": 1, "unit_key": "sha256:" + "1" * 64}},
        {"adds": {"kind": "score", "unit_key": "sha256:" + "1" * 64}},
        {"tags": {"none": None}},
    ],
    ids=["deletion", "removal", "generation", "kind", "tag"],
)
def test_a_log_that_contradicts_itself_makes_no_store(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    """Add a record whose digests are right and whose content is not."""
    old = unpacked(tmp_path, "_mc")
    *_, last = bodies(old)
    if isinstance(change.get("adds"), dict):
        change = {"adds": [last["adds"][0] | change["adds"]]}
    line = (old / f"log/{last['n']:010d}.json").read_bytes().split(b"\n")[0]
    body = last | {"n": last["n"] + 1, "prev": sha256(line), "adds": []} | change
    (old / f"log/{body['n']:010d}.json").write_bytes(encode_sealed(body))
    with pytest.raises(IntegrityError, match="contradicts the records before|not a valid record"):
        upgrade(old, tmp_path / "new")
    with pytest.raises(LogitcaskError):
        open_store(tmp_path / "new")


def test_stores_and_places_that_do_not_fit(old: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(old)
    assert "logitcask store upgrade OLD NEW" in caught.value.hint
    other = open_store(tmp_path / "other", create=True)
    commit_rollouts(other, 1)
    with pytest.raises(StoreError, match="another store"):
        upgrade(old, other.url)
    with pytest.raises(StoreError, match="lies in the old store"):
        upgrade(old, old)
    with pytest.raises(StoreError, match="lies in the old store"):
        upgrade(old, old / "seg" / "new")
    with pytest.raises(StoreError, match="of format version 2"):
        upgrade(other.url, tmp_path / "new")
    with pytest.raises(StoreError, match="not a logitcask store"):
        upgrade(tmp_path / "none", tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    with pytest.raises(StoreError, match="not empty"):
        upgrade(old, tmp_path / "full")
    # The log of another store, whose format.json is lost.
    (Path(other.url) / "format.json").unlink()
    with pytest.raises((StoreError, IntegrityError)):
        upgrade(old, other.url)
