"""Commits: what goes in comes out, the first commit of a unit wins, a name stays."""

import json
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from logitcask.engine.errors import IdentityError, IntegrityError, StoreError
from logitcask.engine.store import Store, codecs, files, open_store, schema
from logitcask.engine.store.verify import verify
from logitcask.engine.types import Rollouts, Scores
from tests.engine.store.made import (
    ROLLOUT_LINEAGE,
    SCORE_LINEAGE,
    commit_rollouts,
    commit_scores,
    key,
    make_rollouts,
    make_scores,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "cask", create=True)


def same_scores(got: Scores | None, want: Scores | None, profile: str) -> None:
    assert (got is None) == (want is None)
    if got is None or want is None:
        return
    entry = codecs.profile(profile).entry
    for field in fields(Scores):
        ours, theirs = getattr(got, field.name), getattr(want, field.name)
        if field.name in ("entry_lp", "at_student") and theirs is not None:
            theirs = codecs.to_entry(theirs, entry).astype(np.float32)
        assert np.array_equal(ours, theirs), field.name


def same_rollouts(got: Rollouts, want: Rollouts, profile: str) -> None:
    assert got.prompts == want.prompts
    for field in fields(Rollouts):
        if field.name not in ("prompts", "student"):
            ours, theirs = getattr(got, field.name), getattr(want, field.name)
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs), field.name
    same_scores(got.student, want.student, profile)


@pytest.mark.parametrize("profile", ["default", "raw32"])
@pytest.mark.parametrize("student", [True, False])
@pytest.mark.parametrize("sequences", [0, 1, 7])
def test_round_trip(store: Store, profile: str, student: bool, sequences: int) -> None:
    rollouts = make_rollouts(3, sequences=sequences, student=student)
    base = store.commit_rollouts(
        rollouts,
        name="main",
        unit_key=key(1),
        unit={"version": 0, "first": 0},
        lineage=ROLLOUT_LINEAGE,
        profile=profile,
    )
    same_rollouts(store.read_rollouts(base), rollouts, profile)
    scores = make_scores(4, rollouts)
    held = commit_scores(store, base, 4, profile=profile)
    assert held.layout == ("once" if student else "whole")
    same_scores(store.read_scores(held), scores, profile)
    # Another process, and a reader that has the rollouts already, read the same.
    again = open_store(f"file://{store.url}")
    pin = again.head()
    assert pin.scores("teacher") == {base.seg_id: held}
    assert pin.rollouts("main") == (base,)
    same_scores(again.read_scores(held, base=again.read_rollouts(base)), scores, profile)
    assert base.counts["P"] == rollouts.positions
    assert base.counts["N"] == sequences


def test_an_extent_is_read_without_tokens_and_scores(store: Store) -> None:
    rollouts = make_rollouts(3)
    held = commit_rollouts(store, 3, student=True)
    for name in ("tokens", "prompt_tokens", "s_ids", "b_lp"):
        (Path(store.url) / held.folder / name / "c" / "0").unlink()
    extent = store.read_extent(held)
    assert extent.prompt_ids == tuple(p.id for p in rollouts.prompts)
    assert extent.prompt.tolist() == [len(p.token_ids) for p in rollouts.prompts]
    np.testing.assert_array_equal(extent.seq_prompt, rollouts.seq_prompt)
    np.testing.assert_array_equal(extent.response, rollouts.lengths())
    (Path(store.url) / held.folder / "seq_off" / "c" / "0").write_bytes(b"")
    with pytest.raises(IntegrityError, match="seq_off"):
        store.read_extent(held)


def test_a_segment_is_a_plain_zarr_group(store: Store) -> None:
    base = commit_rollouts(store, 3, student=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(Path(store.url) / base.folder, mode="r")
        want = make_rollouts(3)
        assert group.attrs["counts"]["P"] == want.positions
        assert np.array_equal(group["tokens"][:], want.tokens)
        assert np.array_equal(group["b_lp"][:], want.b_lp)
        assert want.student is not None
        assert np.array_equal(group["s_ids"][:], want.student.ids)
        told = json.loads(group["prompt_json"][:].tobytes())
        assert [each["id"] for each in told] == [p.id for p in want.prompts]
        assert sorted(group.array_keys()) == sorted(schema.specs("student"))
    on_disk = files.walk(Path(store.url) / base.folder)
    assert set(on_disk) == set(base.files)


def test_same_bytes_same_name(tmp_path: Path) -> None:
    ids = [
        commit_rollouts(open_store(tmp_path / name, create=True), 5, student=True).seg_id
        for name in ("a", "b")
    ]
    assert ids[0] == ids[1]


def test_a_pin_reads_the_same_whatever_is_added(store: Store) -> None:
    base = commit_rollouts(store, 1, student=True)
    commit_scores(store, base, 1)
    pin = store.head()
    for seed in range(2, 5):
        commit_rollouts(store, seed)
    fresh = open_store(store.url)
    assert fresh.pin(pin.number, pin.sha256) == pin
    assert len(fresh.head().segments) == 5
    assert [s.unit["first"] for s in fresh.head().rollouts("main")] == [1, 2, 3, 4]
    assert fresh.pin(-1).segments == ()
    with pytest.raises(StoreError, match="no log record 5"):
        fresh.pin(5)
    with pytest.raises(IntegrityError, match="the pin says"):
        fresh.pin(0, pin.sha256)


def test_segments_come_in_the_order_of_version_and_prompt(store: Store) -> None:
    for at, (version, first) in enumerate([(1, 0), (0, 8), (0, 0), (1, 8)]):
        commit_rollouts(store, at, unit={"version": version, "first": first})
    order = [(s.unit["version"], s.unit["first"]) for s in store.head().rollouts("main")]
    assert order == [(0, 0), (0, 8), (1, 0), (1, 8)]


def test_a_unit_is_stored_once(store: Store) -> None:
    first = commit_rollouts(store, 1)
    again = commit_rollouts(open_store(store.url), 2, unit_key=first.unit_key)
    assert again == first
    assert store.head().number == 0
    assert verify(store).strays == ()


def test_a_name_means_one_thing(store: Store) -> None:
    base = commit_rollouts(store, 1, student=True)
    commit_scores(store, base, 1)
    other_set = ROLLOUT_LINEAGE | {"set": {"digest": "sha256:other"}}
    other_root = ROLLOUT_LINEAGE | {"student": {"root": "sha256:other"}}
    for lineage in (other_set, other_root):
        with pytest.raises(IdentityError, match="'main' stands for"):
            commit_rollouts(store, 2, lineage=lineage)
        assert commit_rollouts(store, 2, key(str(lineage)), name="second", lineage=other_set)
    for change in ({"teacher": {"weights": "sha256:other"}}, {"request": {"top_p": 0.5}}):
        with pytest.raises(IdentityError, match="'teacher' stands for"):
            commit_scores(store, base, 2, lineage=SCORE_LINEAGE | change)
    with pytest.raises(StoreError, match=r"lineage lacks set\.digest"):
        commit_rollouts(store, 3, lineage={})


def test_the_loser_of_a_name_is_told_after_the_race(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both writers saw a free name; the second to publish learns whose it is."""
    rival, link = open_store(store.url), files.link
    other = ROLLOUT_LINEAGE | {"set": {"digest": "sha256:other"}}

    def overtaken(source: Path, target: Path) -> bool:
        monkeypatch.setattr(files, "link", link)
        commit_rollouts(rival, 2, lineage=other)
        return link(source, target)

    monkeypatch.setattr(files, "link", overtaken)
    with pytest.raises(IdentityError, match="sha256:other"):
        commit_rollouts(store, 1)
    assert len(store.head().segments) == 1
    assert len(verify(store).strays) == 1  # The loser's group, which no record names.


@pytest.mark.parametrize("same_unit", [True, False])
def test_losing_the_race_for_a_number(
    store: Store, monkeypatch: pytest.MonkeyPatch, same_unit: bool
) -> None:
    rival, link = open_store(store.url), files.link
    theirs: list[object] = []

    def overtaken(source: Path, target: Path) -> bool:
        monkeypatch.setattr(files, "link", link)
        theirs.append(commit_rollouts(rival, 2, key("unit") if same_unit else key("other")))
        return link(source, target)

    monkeypatch.setattr(files, "link", overtaken)
    ours = commit_rollouts(store, 1, key("unit"))
    assert (ours == theirs[0]) == same_unit
    assert len(store.head().segments) == (1 if same_unit else 2)
    verify(store)


def test_a_link_whose_answer_was_lost_is_not_doubled(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = files.link

    def mute(source: Path, target: Path) -> bool:
        link(source, target)
        return False

    monkeypatch.setattr(files, "link", mute)
    held = commit_rollouts(store, 1)
    assert store.head().segments == (held,)
    assert store.head().number == 0


def test_scores_need_rollouts_of_this_store(store: Store, tmp_path: Path) -> None:
    base = commit_rollouts(store, 1, student=True)
    elsewhere = open_store(tmp_path / "other", create=True)
    scores = make_scores(1, make_rollouts(1))
    arguments = {"name": "t", "unit_key": key(9), "unit": {}, "lineage": SCORE_LINEAGE}
    with pytest.raises(StoreError, match="no rollout segment"):
        elsewhere.commit_scores(scores, base=base, **arguments)
    short = replace(scores, lp=scores.lp[:-1])
    with pytest.raises(StoreError, match=r"scores\.lp has shape"):
        store.commit_scores(short, base=base, **arguments)
    plain = commit_rollouts(store, 2, student=False)
    with pytest.raises(StoreError, match="no student's list"):
        store.commit_scores(scores, base=plain, **arguments)
    with pytest.raises(IntegrityError, match="other tokens"):
        store.read_scores(commit_scores(store, base, 1), base=make_rollouts(2))


@pytest.mark.parametrize("name", ["", "../up", "A", ".hidden", "a/b", "x" * 129, "ü", "a\n"])
def test_names_that_are_refused(store: Store, name: str) -> None:
    with pytest.raises(StoreError, match="is not allowed"):
        commit_rollouts(store, 1, name=name)


@pytest.mark.parametrize(
    "broken",
    [
        {"seq_off": np.asarray([0, 5, 3], np.int64)},
        {"tokens": np.zeros(3, np.uint32)},
        {"seq_prompt": np.full(6, 99, np.uint32)},
        {"b_lp": np.full(27, np.nan, np.float32)},
    ],
)
def test_rollouts_that_do_not_fit_are_refused(store: Store, broken: dict[str, object]) -> None:
    with pytest.raises(StoreError):
        store.commit_rollouts(
            replace(make_rollouts(3), **broken),
            name="main",
            unit_key=key(1),
            unit={"version": 0, "first": 0},
            lineage=ROLLOUT_LINEAGE,
        )
    assert files.list_dir(Path(store.url) / "staging") == []


def test_reopening_reads_only_what_is_new(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        commit_rollouts(store, seed)
    reader = open_store(store.url)
    reader.head()
    opened: list[str] = []
    read = files.read

    def counted(root: Path, relative: str, limit: int) -> bytes | None:
        opened.append(relative)
        return read(root, relative, limit)

    monkeypatch.setattr(files, "read", counted)
    reader.head()
    assert opened == ["log/0000000003.json"]  # One look whether there is more.
