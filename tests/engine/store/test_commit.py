"""Commits, on each kind of storage: round trips, races and the identity of names."""

import json
import math
import pickle
import warnings
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from logitcask.engine.errors import IdentityError, IntegrityError, StoreError
from logitcask.engine.store import Store, extend, open_store
from logitcask.engine.store.format import segment as segments
from logitcask.engine.store.format.codecs import PROFILES, Profile, from_entry, profile, to_entry
from logitcask.engine.store.format.layouts import kept_lists
from logitcask.engine.store.format.rollouts import EXTENT
from logitcask.engine.store.format.schema import file_names, specs
from logitcask.engine.store.format.segment import split
from logitcask.engine.store.log import record
from logitcask.engine.store.retention import delete
from logitcask.engine.store.storage.base import Storage
from logitcask.engine.store.store import open_on
from logitcask.engine.store.verify import verify
from logitcask.engine.types import CachedScores, Draws, Prompt, Rollouts, Scores
from tests.engine.store.made import (
    ROLLOUT_PROVENANCE,
    SCORE_PROVENANCE,
    bounded,
    commit_rollouts,
    commit_scores,
    key,
    make_rollouts,
    make_scores,
)
from tests.engine.store.test_extend import teacher_of


def again(store: Store) -> Store:
    """Open the same store again."""
    return open_on(store.storage)


def rounded(values: np.ndarray, how: Profile) -> np.ndarray:
    return from_entry(to_entry(values, how), how)


def same_rollouts(got: Rollouts, expected: Rollouts, how: Profile) -> None:
    assert got.prompts == expected.prompts
    for field in fields(Rollouts):
        if field.name not in ("prompts", "student", "draws", "segment"):
            # No reward is an array of None.
            ours, theirs = (np.asarray(getattr(each, field.name)) for each in (got, expected))
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs), field.name
    assert (got.draws is None) == (expected.draws is None)
    if got.draws is not None and expected.draws is not None:
        for field in fields(Draws):
            assert np.array_equal(
                getattr(got.draws, field.name), getattr(expected.draws, field.name)
            )
    assert (got.student is None) == (expected.student is None)
    if got.student is None or expected.student is None:
        return
    for field in fields(Scores):
        ours, theirs = getattr(got.student, field.name), getattr(expected.student, field.name)
        if field.name == "entry_lp":
            theirs = rounded(theirs, how)
        assert np.array_equal(ours, theirs), field.name


def same_scores(got: CachedScores, expected: Scores, how: Profile, lists: Scores | None) -> None:
    """Compare all scores; `lists` are the student's."""
    assert np.array_equal(got.lp, expected.lp)
    assert np.array_equal(got.entropy, expected.entropy)
    assert np.array_equal(got.log_tail, expected.log_tail)
    assert np.array_equal(got.kept, expected.cnt)
    ids, log_probs = kept_lists(got)
    assert np.array_equal(ids, expected.ids)
    assert np.array_equal(log_probs, rounded(expected.entry_lp, how))
    if expected.at_lp is not None and lists is not None:
        assert np.array_equal(got.s_cnt, lists.cnt)
        assert np.array_equal(got.s_ids, lists.ids)
        assert np.array_equal(got.s_lp, rounded(expected.at_lp, how))


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("student", [True, False])
@pytest.mark.parametrize(("sequences", "reward"), [(0, True), (1, False), (7, True), (7, False)])
def test_round_trip(store: Store, name: str, student: bool, sequences: int, reward: bool) -> None:
    draws = student and sequences != 1
    rollouts = make_rollouts(3, sequences=sequences, student=student, draws=draws, reward=reward)
    base = store.commit_rollouts(
        rollouts,
        name="main",
        unit_key=key(1),
        unit={"version": 0, "first": 0},
        provenance=ROLLOUT_PROVENANCE,
        profile=name,
    )
    layout = "mc" if draws else "student" if student else "plain"
    assert base.layout == layout + ("+reward" if reward else "")
    same_rollouts(store.read_rollouts(base), rollouts, profile(name))
    scores = make_scores(4, rollouts)
    segment = commit_scores(store, base, 4, profile=name)
    assert segment.layout == ("dedup" if student else "full")
    same_scores(store.read_scores((segment,)), scores, profile(name), rollouts.student)
    # Another reader, and a reader that has the rollouts already, read the same.
    other = again(store)
    snapshot = other.head()
    assert snapshot.scores("teacher") == {base.seg_id: (segment,)}
    assert snapshot.rollouts("main") == (base,)
    read = other.read_scores((segment,), base=other.read_rollouts(base))
    same_scores(read, scores, profile(name), rollouts.student)
    assert base.counts["P"] == rollouts.positions
    assert base.counts["N"] == sequences


def test_drawn_ids_keep_their_multiplicities(store: Store) -> None:
    rollouts = make_rollouts(3)
    base = commit_rollouts(store, 3, student=True)
    scores = make_scores(4, make_rollouts(3, student=False))
    drawn = replace(scores, mult=np.arange(1, 1 + len(scores.ids)).astype(np.uint16))
    segment = commit_scores(store, base, 4, scores=drawn)
    assert segment.layout == "sampled"
    read = store.read_scores((segment,))
    assert np.array_equal(read.mult, drawn.mult)
    assert np.array_equal(read.ids, drawn.ids)
    assert np.array_equal(read.cnt, drawn.cnt)
    # Drawn ids do not determine the best ones.
    assert not read.kept.any()
    assert len(read.s_ids) == 0
    assert rollouts.student is not None
    with pytest.raises(IdentityError, match="stands for drawn ids, not a teacher's best ids"):
        commit_scores(store, commit_rollouts(store, 5, student=True), 6)


def test_a_list_without_extra_ids_is_split_at_the_students_ids(
    store: Store,
) -> None:
    base = commit_rollouts(store, 3, student=True)
    rollouts = store.read_rollouts(base)
    assert rollouts.student is not None
    scores = replace(make_scores(4, rollouts), at_lp=None)
    segment = commit_scores(store, base, 4, scores=scores)
    assert segment.layout == "full"
    read = store.read_scores((segment,))
    same_scores(read, scores, profile("default"), None)
    split = [np.cumsum(x)[:-1] for x in (rollouts.student.cnt, scores.cnt, read.s_cnt)]
    mine, theirs = np.split(rollouts.student.ids, split[0]), np.split(scores.ids, split[1])
    expected = [[i for i in ours if i in kept] for ours, kept in zip(mine, theirs, strict=True)]
    assert [x.tolist() for x in np.split(read.s_ids, split[2])] == expected
    assert sum(map(len, expected)) > 0


@pytest.mark.parametrize("at_student", [True, False])
@pytest.mark.parametrize("student", [True, False])
def test_an_interval_comes_back(store: Store, student: bool, at_student: bool) -> None:
    base = commit_rollouts(store, 3, student=student)
    exact = make_scores(4, store.read_rollouts(base))
    exact = exact if at_student else replace(exact, at_lp=None)
    plain = commit_scores(store, base, 4, name="exact", scores=exact)
    fields = bounded(4, exact)
    segment = commit_scores(store, base, 4, name="told", unit_key=key("told"), scores=fields)
    layout = "dedup" if student and at_student else "full"
    assert (plain.layout, segment.layout) == (layout, f"{layout}+bounds")
    read = again(store).read_scores((segment,))
    assert np.array_equal(read.entropy_hi, fields.entropy_hi)
    assert store.read_scores((plain,)).entropy_hi is None
    same_scores(read, fields, profile("default"), store.read_rollouts(base).student)
    # One array more, and the others to the byte as they are without it.
    ours, theirs = (split("", store.read_object(each), each) for each in (segment, plain))
    assert {name for name in ours if not name.startswith("entropy_upper/")} == set(theirs)
    assert {name for name in theirs if theirs[name] != ours[name]} <= {"zarr.json"}


def test_an_extension_keeps_the_interval(store: Store) -> None:
    teacher, base, student = teacher_of(store, 13)
    first = bounded(13, teacher.score(4, student))
    segment = commit_scores(store, base, 13, scores=first)
    at = extend.request_ids(store.read_scores((segment,)), teacher.lists(5))
    wider = commit_scores(store, base, 14, scores=bounded(14, teacher.score(20, at)), at=at)
    assert wider.layout == "extension"
    read = store.read_scores((segment, wider))
    assert np.array_equal(read.entropy, first.entropy)
    assert np.array_equal(read.entropy_hi, first.entropy_hi)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: replace(s, entropy_hi=s.entropy - 1e-3), "an entropy between"),
        (lambda s: replace(s, entropy_hi=s.entropy * np.nan), "and nan"),
        (lambda s: replace(s, entropy_hi=s.entropy + np.inf), "and inf"),
        (lambda s: replace(s, entropy_hi=s.entropy[1:]), "has shape"),
        (
            lambda s: replace(s, entropy_hi=s.entropy, mult=np.ones(len(s.ids), np.uint16)),
            "drawing needs the whole distribution",
        ),
    ],
)
def test_an_invalid_interval_is_refused(store: Store, change: Any, words: str) -> None:
    base = commit_rollouts(store, 3)
    with pytest.raises(StoreError, match=words):
        commit_scores(store, base, 4, scores=change(make_scores(4, store.read_rollouts(base))))
    assert store.head().names("score") == []


def test_an_extent_is_read_without_tokens_and_scores(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, parts = make_rollouts(3), []
    segment = commit_rollouts(store, 3, student=True)
    read_part = store.storage.read_part

    def part(name: str, start: int, size: int) -> bytes | None:
        parts.append((name, start, size))
        return read_part(name, start, size)

    monkeypatch.setattr(store.storage, "read_part", part)
    monkeypatch.setattr(store.storage, "read", None)
    extent = store.read_extent(segment)
    assert [name for name, _, _ in parts] == [segment.path], "neighbours are read by one call"
    monkeypatch.setattr(segments, "_GAP", 0)
    assert store.read_extent(segment).prompt_ids == extent.prompt_ids
    places = [segment.entries[name][:2] for name in EXTENT]
    assert sorted(part[1:] for part in parts[1:]) == sorted(places)
    assert extent.prompt_ids == tuple(p.id for p in rollouts.prompts)
    assert extent.prompt.tolist() == [len(p.token_ids) for p in rollouts.prompts]
    np.testing.assert_array_equal(extent.seq_prompt, rollouts.seq_prompt)
    np.testing.assert_array_equal(extent.response, rollouts.lengths())


@pytest.mark.parametrize("name", PROFILES)
def test_a_segment_is_a_plain_zarr_group(tmp_path: Path, name: str) -> None:
    store = open_store(tmp_path / "cask", create=True)
    base = commit_rollouts(store, 3, student=True, profile=name)
    path = Path(store.url) / base.path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")
        expected = make_rollouts(3)
        assert expected.student is not None
        assert group.attrs["counts"]["P"] == expected.positions
        assert np.array_equal(group["response_tokens"][:], expected.tokens)
        assert np.array_equal(group["behavior_logprobs"][:], expected.b_lp)
        assert np.array_equal(group["student_topk_ids"][:], expected.student.ids)
        entries = to_entry(expected.student.entry_lp, profile(name))
        assert np.array_equal(group["student_topk_logprobs"][:], entries)
        fields = json.loads(group["prompt_json"][:].tobytes())
        assert [each["id"] for each in fields] == [p.id for p in expected.prompts]
        assert sorted(group.array_keys()) == sorted(specs("student"))
        for array, values in store.read_arrays(base).items():
            assert np.array_equal(store.open_zarr(base)[array][:], values)
    assert zipfile.ZipFile(path).namelist() == sorted(file_names("student", base.counts))
    assert zipfile.ZipFile(path).testzip() is None
    assert [each.name for each in store.storage.files("seg")] == [base.path]


def test_same_bytes_same_name(tmp_path: Path) -> None:
    ids = [
        commit_rollouts(open_store(tmp_path / name, create=True), 5, student=True).seg_id
        for name in ("a", "b")
    ]
    assert ids[0] == ids[1]


def test_a_snapshot_reads_the_same_after_later_commits(store: Store) -> None:
    base = commit_rollouts(store, 1, student=True)
    commit_scores(store, base, 1)
    snapshot = store.head()
    for seed in range(2, 5):
        commit_rollouts(store, seed)
    fresh = again(store)
    assert fresh.snapshot(snapshot.number, snapshot.sha256) == snapshot
    assert fresh.snapshot(snapshot.number).segments == snapshot.segments
    assert len(fresh.head().segments) == 5
    assert [s.unit["first"] for s in fresh.head().rollouts("main")] == [1, 2, 3, 4]
    assert fresh.snapshot(-1).segments == ()
    with pytest.raises(StoreError, match="no log record 5"):
        fresh.snapshot(5)
    with pytest.raises(IntegrityError, match="but the snapshot has"):
        fresh.snapshot(0, snapshot.sha256)


def test_segments_come_in_the_order_of_version_and_prompt(store: Store) -> None:
    for at, (version, first) in enumerate([(1, 0), (0, 8), (0, 0), (1, 8)]):
        commit_rollouts(store, at, unit={"version": version, "first": first})
    order = [(s.unit["version"], s.unit["first"]) for s in store.head().rollouts("main")]
    assert order == [(0, 0), (0, 8), (1, 0), (1, 8)]


def test_a_unit_is_stored_once(store: Store) -> None:
    first = commit_rollouts(store, 1)
    second = commit_rollouts(again(store), 2, unit_key=first.unit_key)
    assert second == first
    assert store.head().number == 0
    assert verify(store).orphans == ()


def test_a_name_has_one_identity(store: Store) -> None:
    base = commit_rollouts(store, 1, student=True)
    commit_scores(store, base, 1)
    other_set = ROLLOUT_PROVENANCE | {"set": {"digest": "sha256:other"}}
    other_root = ROLLOUT_PROVENANCE | {"student": {"base_weights": "sha256:other"}}
    for provenance in (other_set, other_root):
        with pytest.raises(IdentityError, match="'main' stands for"):
            commit_rollouts(store, 2, provenance=provenance)
        assert commit_rollouts(store, 2, key(str(provenance)), name="second", provenance=other_set)
    more = commit_rollouts(store, 3, student=True)
    for change in (
        {"teacher": {"weights": "sha256:other"}},
        {"teacher_kind": "base"},
        {"context": "sha256:c"},
    ):
        with pytest.raises(IdentityError, match="'teacher' stands for"):
            commit_scores(store, more, 2, provenance=SCORE_PROVENANCE | change)
    with pytest.raises(StoreError, match=r"provenance lacks set\.digest"):
        commit_rollouts(store, 3, key("lacks"), provenance={})


def overtake(
    store: Store, monkeypatch: pytest.MonkeyPatch, rival: object, *, mute: bool = False
) -> None:
    """Let `rival()` run before the first record of `store`; mute: lose our response."""
    create = store.storage.create

    def overtaken(name: str, data: bytes) -> bool:
        if not name.startswith("log/"):
            return create(name, data)
        monkeypatch.setattr(store.storage, "create", create)
        if callable(rival):
            rival()
        return create(name, data) and not mute

    monkeypatch.setattr(store.storage, "create", overtaken)


def test_the_loser_of_a_race_for_a_name_gets_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raise IdentityError in the second of two writers that saw a free name."""
    other = ROLLOUT_PROVENANCE | {"set": {"digest": "sha256:other"}}
    overtake(store, monkeypatch, lambda: commit_rollouts(again(store), 2, provenance=other))
    with pytest.raises(IdentityError, match="sha256:other"):
        commit_rollouts(store, 1)
    assert len(store.head().segments) == 1
    assert len(verify(store).orphans) == 1  # The loser's object, which no record names.


@pytest.mark.parametrize("same_unit", [True, False])
def test_losing_the_race_for_a_number(
    store: Store, monkeypatch: pytest.MonkeyPatch, same_unit: bool
) -> None:
    theirs: list[object] = []
    unit = key("unit") if same_unit else key("other")
    overtake(store, monkeypatch, lambda: theirs.append(commit_rollouts(again(store), 2, unit)))
    ours = commit_rollouts(store, 1, key("unit"))
    assert (ours == theirs[0]) == same_unit
    assert len(store.head().segments) == (1 if same_unit else 2)
    verify(store, deep=True)


def test_a_commit_with_a_lost_response_is_not_doubled(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    overtake(store, monkeypatch, None, mute=True)
    segment = commit_rollouts(store, 1)
    assert store.head().segments == (segment,)
    assert store.head().number == 0


def test_a_unit_that_is_deleted_at_once_is_not_published_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acknowledge a commit that is deleted before the writer reads the log again."""
    create = store.storage.create

    def then_deleted(name: str, data: bytes) -> bool:
        created = create(name, data)
        if name.startswith("log/"):
            monkeypatch.setattr(store.storage, "create", create)
            delete(again(store), rollouts="main")
        return created

    monkeypatch.setattr(store.storage, "create", then_deleted)
    segment = commit_rollouts(store, 1)
    assert segment.number == 0
    assert store.head().number == 1
    assert store.head().segments == ()


def test_two_creators_at_once_get_one_store(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, theirs = storage.prepare, []

    def overtaken(folders: object, file: str) -> None:
        monkeypatch.setattr(storage, "prepare", prepare)
        theirs.append(open_on(storage, create=True))
        prepare(folders, file)

    monkeypatch.setattr(storage, "prepare", overtaken)
    assert open_on(storage, create=True).uuid == theirs[0].uuid


def test_a_storage_that_always_refuses_is_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.storage, "create", lambda name, data: False)
    monkeypatch.setattr(store.storage, "put", lambda name, data: None)
    with pytest.raises(
        StoreError, match=r"0000000000\.json is refused as existing, but does not exist"
    ):
        commit_rollouts(store, 1)


def test_scores_need_rollouts_of_this_store(store: Store, tmp_path: Path) -> None:
    base = commit_rollouts(store, 1, student=True)
    elsewhere = open_store(tmp_path / "other", create=True)
    scores = make_scores(1, make_rollouts(1))
    arguments = {"name": "t", "unit_key": key(9), "unit": {}, "provenance": SCORE_PROVENANCE}
    with pytest.raises(StoreError, match="no rollout segment"):
        elsewhere.commit_scores(scores, base=base, **arguments)
    short = replace(scores, lp=scores.lp[:-1])
    with pytest.raises(StoreError, match=r"scores\.lp has shape"):
        store.commit_scores(short, base=base, **arguments)
    plain = commit_rollouts(store, 2, student=False)
    with pytest.raises(StoreError, match="no list of the student"):
        store.commit_scores(scores, base=plain, **arguments)
    with pytest.raises(StoreError, match="scores of rollouts"):
        store.read_scores((commit_scores(store, base, 1),), base=make_rollouts(2))


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
        {"b_lp": np.full(18, np.nan, np.float32)},
        {"b_lp": np.full(18, 5.0, np.float32)},
        # Values that a cast would change silently.
        {"seq_prompt": np.full(6, -1)},
        {"finish": np.full(6, 70_000)},
        {"loss_mask": np.full(18, 0.5)},
        {"version_start": np.full(6, -1)},
        {"tokens": np.full(18, -1)},
        {"prompts": (Prompt(id="a", token_ids=(-1,)),) * 3},
        {"prompts": (Prompt(id="a", token_ids=(1,), answer=7),) * 3},
        {"prompts": (Prompt(id="a", token_ids=(1,), extra={"x": {1, 2}}),) * 3},
    ],
)
def test_rollouts_that_do_not_fit_are_refused(store: Store, broken: dict[str, object]) -> None:
    with pytest.raises(StoreError):
        store.commit_rollouts(
            replace(make_rollouts(3), **broken),
            name="main",
            unit_key=key(1),
            unit={"version": 0, "first": 0},
            provenance=ROLLOUT_PROVENANCE,
        )
    assert store.storage.names("staging") == []


def test_a_unit_beyond_the_bounds_is_refused_before_it_is_encoded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitcask.engine.store.format import schema

    monkeypatch.setattr(schema, "MAX_SEGMENT_BYTES", 100)
    with pytest.raises(StoreError, match=r"a unit of \d+ bytes decoded, at most 100") as caught:
        commit_rollouts(store, 1)
    assert "--unit-prompts" in caught.value.hint


def test_a_store_is_sent_to_another_process_by_its_url(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cask", create=True)
    commit_rollouts(store, 1)
    there = pickle.loads(pickle.dumps((store, store.head())))
    assert there[0].head() == there[1] == store.head()
    assert there[0].head().segments == there[1].segments == store.head().segments
    assert there[1].rollouts("main") == store.head().rollouts("main")


def test_a_refresh_reads_only_new_records(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        commit_rollouts(store, seed)
    reader = again(store)
    reader.head()
    opened: list[str] = []
    read = store.storage.read

    def counted(name: str, limit: int) -> bytes | None:
        opened.append(name)
        return read(name, limit)

    monkeypatch.setattr(store.storage, "read", counted)
    reader.head()
    assert opened == []
    commit_rollouts(store, 3)
    opened.clear()
    reader.head()
    assert opened == ["log/0000000003.json"]


def test_lists_of_a_row_are_found_whatever_their_lengths() -> None:
    from logitcask.engine.store.format import ragged

    rng = np.random.default_rng(0)
    a_cnt, b_cnt = rng.integers(0, 9, 500), rng.integers(0, 5, 500)
    a = np.concatenate([rng.permutation(20)[:n] for n in a_cnt])
    b = np.concatenate([rng.permutation(20)[:n] for n in b_cnt])
    rows_a, rows_b = np.split(a, np.cumsum(a_cnt)[:-1]), np.split(b, np.cumsum(b_cnt)[:-1])
    pairs = list(zip(rows_a, rows_b, strict=True))
    above = [int((x < each).sum()) for x, y in pairs for each in y]
    assert ragged.count_less(a, a_cnt, b, b_cnt).tolist() == above
    own = [int((y < each).sum()) for y in rows_b for each in y]
    assert ragged.rank_in_row(b.astype(np.uint32), b_cnt).tolist() == own
    place = [x.tolist().index(each) if each in x else -1 for x, y in pairs for each in y]
    assert ragged.find(a, a_cnt, b, b_cnt).tolist() == place


@pytest.mark.parametrize("seconds", [None, 0, 1.25])
def test_seconds_are_stored_in_the_record(tmp_path: Path, seconds: float | None) -> None:
    """Read older records, which have none; no digest of the segment covers the field."""
    store = open_store(tmp_path / "s", create=True)
    segment = commit_scores(store, commit_rollouts(store, 0), 0, seconds=seconds)
    plain = open_store(tmp_path / "plain", create=True)
    assert commit_scores(plain, commit_rollouts(plain, 0), 0).seg_id == segment.seg_id
    fields = record.encode_segment(segment)
    assert ("seconds" in fields) == (seconds is not None)
    assert record.decode_segment(fields, "here").seconds == seconds
    assert open_store(store.url).head().segments[-1].seconds == seconds
    for wrong in (-1.0, "1", True, math.inf):
        with pytest.raises(IntegrityError, match="seconds"):
            record.decode_segment({**fields, "seconds": wrong}, "here")
