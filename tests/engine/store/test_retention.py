"""Tags, deletion and gc, on each kind of storage: only reachable segments stay."""

import time
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.errors import ConfigError, IntegrityError, StoreError
from logitcask.engine.store import Store, extend, open_store, retention
from logitcask.engine.store.format.entry import path_of
from logitcask.engine.store.log import publish
from logitcask.engine.store.log.publish import append
from logitcask.engine.store.retention import delete, delete_rollouts, gc, tag, untag
from logitcask.engine.store.storage.local import LocalStorage
from logitcask.engine.store.store import open_on
from logitcask.engine.store.verify import verify
from tests.engine.store.made import commit_rollouts, commit_scores, key
from tests.engine.store.test_extend import teacher_of


def sweep(store: Store, **options: Any) -> int:
    """Count the segments that gc removes without snapshots and writers to spare."""
    return gc(store, **({"keep_days": 0, "lease_hours": 0} | options)).segments


def readable(store: Store) -> None:
    for segment in store.head().segments:
        if segment.kind == "rollout":
            store.read_rollouts(segment)
    verify(store, deep=True)


def test_a_tag_names_a_number(store: Store) -> None:
    with pytest.raises(StoreError, match="no log record yet"):
        tag(store, "early")
    commit_rollouts(store, 1)
    assert tag(store, "first") == 0
    commit_rollouts(store, 2)
    assert tag(store, "first", 0) == 0, "the same again"
    assert store.snapshot("first").number == 0
    assert len(store.snapshot("first").segments) == 1
    with pytest.raises(StoreError, match="tag 'first' names log number 0 already"):
        tag(store, "first", 1)
    with pytest.raises(StoreError, match=r"no tag 'second'; it has: first"):
        store.snapshot("second")
    for name in ("", "../x", "A", "12"):
        with pytest.raises(ConfigError, match="is not allowed"):
            tag(store, name)
    # Another reader sees it.
    assert open_on(store.storage).snapshot("first").number == 0
    untag(store, "first")
    with pytest.raises(StoreError, match="no tag 'first'"):
        open_on(store.storage).snapshot("first")
    with pytest.raises(StoreError, match="no tag 'first'"):
        untag(store, "first")


def test_deleted_units_are_invisible_and_can_be_made_again(store: Store) -> None:
    base = commit_rollouts(store, 1, student=True)
    segment = commit_scores(store, base, 1)
    before = store.head()
    assert delete(store, teacher="teacher") == [segment]
    assert store.head().segments == (base,)
    assert store.snapshot(before.number).segments == before.segments, "an old snapshot reads on"
    again = commit_scores(store, base, 1)
    assert again.seg_id == segment.seg_id
    assert again.number > before.number
    assert store.head().scores("teacher") == {base.seg_id: (again,)}
    readable(store)


def test_segments_of_rollouts_are_deleted_by_one_record(store: Store) -> None:
    bases = [commit_rollouts(store, n, student=True) for n in range(3)]
    twin = commit_rollouts(store, 1, key("twin"), name="twin", student=True)
    assert twin.seg_id == bases[1].seg_id
    scores = [commit_scores(store, base, 1) for base in bases]
    number = store.head().number
    for _ in range(2):
        delete_rollouts(store, bases[:2])
        # Rollouts with the same content elsewhere keep their scores.
        assert store.head().segments == (bases[2], twin, *scores[1:])
        assert store.head().number == number + 1
    again = commit_rollouts(store, 0, student=True)
    delete_rollouts(store, [twin])
    assert store.head().segments == (bases[2], scores[2], again)
    readable(store)


def test_rollouts_delete_with_their_scores(store: Store) -> None:
    bases = [
        commit_rollouts(store, n, student=True, unit={"version": n, "first": 0}) for n in range(4)
    ]
    for base in bases:
        commit_scores(store, base, 1)
    deleted = delete(store, rollouts="main", before_version=2)
    assert {s.seg_id for s in deleted if s.kind == "rollout"} == {b.seg_id for b in bases[:2]}
    assert len(deleted) == 4
    assert [s.unit["version"] for s in store.head().rollouts("main")] == [2, 3]
    assert set(store.head().scores("teacher")) == {b.seg_id for b in bases[2:]}
    with pytest.raises(StoreError, match="no rollout segment"):
        commit_scores(store, bases[0], 9)
    readable(store)


def test_scores_are_deleted_with_their_extensions(store: Store) -> None:
    teacher, base, student = teacher_of(store, 3)
    first = commit_scores(store, base, 0, scores=teacher.score(4, student))
    at = extend.request_ids(store.read_scores((first,)))
    commit_scores(store, base, 1, scores=teacher.score(20, at), at=at)
    assert len(delete(store, teacher="teacher")) == 2
    assert sweep(store) == 2
    commit_scores(store, base, 2, scores=teacher.score(9, student))
    readable(store)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "give --rollouts, --teacher or --segment"),
        ({"rollouts": "main", "teacher": "teacher"}, "give --rollouts, --teacher or --segment"),
        ({"teacher": "teacher", "before_version": 1}, "goes with --rollouts"),
        ({"teacher": "nobody"}, "it has rollouts: main; scores: none"),
    ],
)
def test_invalid_deletions_are_refused(store: Store, wrong: dict[str, Any], words: str) -> None:
    commit_rollouts(store, 1)
    with pytest.raises(ConfigError) as caught:
        delete(store, **wrong)
    assert words in caught.value.hint


def test_a_segment_is_deleted_with_its_dependents(store: Store) -> None:
    teacher, base, student = teacher_of(store, 3)
    first = commit_scores(store, base, 0, scores=teacher.score(4, student))
    at = extend.request_ids(store.read_scores((first,)))
    wide = commit_scores(store, base, 1, scores=teacher.score(20, at), at=at)
    other = commit_scores(store, base, 2, scores=teacher.score(9, student), name="other")
    more = commit_rollouts(store, 5)
    for which, gone in ((wide, 1), (first, 2), (other, 1), (base, 4)):
        would = delete(store, segment=which.seg_id, dry_run=True)
        assert len(would) == gone
        assert set(store.head().segments) == {base, first, wide, other, more}
    assert delete(store, segment=first.seg_id) == [first, wide]
    assert delete(store, segment=base.seg_id) == [base, other]
    assert store.head().segments == (more,)
    with pytest.raises(ConfigError, match="no 'f"):
        delete(store, segment="f" * 32)


def test_gc_removes_unreachable_segments(store: Store) -> None:
    kept = commit_rollouts(store, 1)
    gone = commit_rollouts(store, 2, name="old")
    old = store.head()
    delete(store, rollouts="old")
    # A snapshot of the last 30 days may be in use somewhere.
    assert sweep(store, keep_days=30) == 0
    assert store.read_rollouts(gone).positions
    dry = gc(store, keep_days=0, lease_hours=0, dry_run=True)
    assert (dry.segments, dry.kept) == (1, 1)
    assert dry.bytes == gone.size
    assert store.read_rollouts(gone).positions, "a dry run removes nothing"
    report = gc(store, keep_days=0, lease_hours=0)
    assert (report.segments, report.bytes, report.kept) == (1, gone.size, 1)
    assert store.head().segments == (kept,)
    with pytest.raises(StoreError, match="was deleted, and gc has removed it") as caught:
        store.read_rollouts(old.segments[1])
    assert not isinstance(caught.value, IntegrityError)
    with pytest.raises(StoreError, match="has 1 segments that gc has removed"):
        tag(store, "late", old.number)
    assert sweep(store) == 0
    report = verify(open_on(store.storage), deep=True)
    assert (report.segments, report.orphans) == (1, ())


def test_gc_keeps_the_segments_of_a_tag(store: Store) -> None:
    commit_rollouts(store, 1)
    tag(store, "paper")
    segment = store.head().segments[0]
    delete(store, rollouts="main")
    assert sweep(store) == 0
    assert store.read_rollouts(store.snapshot("paper").segments[0]).positions
    untag(store, "paper")
    assert sweep(store) == 1
    with pytest.raises(StoreError, match="gc has removed"):
        store.read_rollouts(segment)


def test_a_recent_snapshot_was_the_newest_within_the_days(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commit a unit on each of seven days, and delete it on the day after."""
    clock = {"now": time.time() - 7 * 86400}
    stamp = lambda: time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(clock["now"]))  # noqa: E731
    monkeypatch.setattr(publish, "now", stamp)
    for day in range(7):
        commit_rollouts(store, day, name=f"day{day}")
        if day:
            delete(store, rollouts=f"day{day - 1}")
        clock["now"] += 86400
    # At the moment three and a half days ago, the unit of day 3 was visible.
    assert sweep(store, keep_days=3.5) == 3
    assert sweep(store, keep_days=1.5) == 2
    assert sweep(store, keep_days=0) == 1
    readable(store)


def test_a_clock_that_jumps_back_frees_nothing_early(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_rollouts(store, 1, name="old")
    monkeypatch.setattr(publish, "now", lambda: "1970-01-01T00:00:00+00:00")
    delete(store, rollouts="old")
    commit_rollouts(store, 2)
    # Those records count as no older than the one before them.
    assert sweep(store, keep_days=1) == 0
    readable(store)


def test_orphans_are_kept_for_a_lease(store: Store) -> None:
    segment = commit_rollouts(store, 1)
    store.storage.put(path_of("rollout", f"{'0' * 31}1", 0), store.read_object(segment))
    assert sweep(store, lease_hours=1) == 0
    assert store.head().number == 0, "nothing to say, no record"
    assert sweep(store) == 1
    assert [each.name for each in store.storage.files("seg")] == [segment.path]


def test_removed_content_returns_under_another_generation(store: Store) -> None:
    first = commit_rollouts(store, 1)
    for generation in (1, 2):
        delete(store, rollouts="main")
        assert sweep(store) == 1
        again = commit_rollouts(store, 1)
        assert again.seg_id == first.seg_id
        assert again.path == first.path.replace(".zip", f".{generation}.zip")
        readable(store)


def test_a_writer_that_gc_overtakes_puts_its_object_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Remove its object, which looks like an old orphan, before its record is published."""
    create = store.storage.create

    def overtaken(name: str, data: bytes) -> bool:
        if name.startswith("log/"):
            monkeypatch.setattr(store.storage, "create", create)
            assert sweep(open_on(store.storage)) == 1
        return create(name, data)

    monkeypatch.setattr(store.storage, "create", overtaken)
    segment = commit_rollouts(store, 1)
    assert segment.generation == 1
    readable(store)
    assert verify(store).orphans == ()


def test_a_gc_that_a_writer_overtakes_decides_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep an orphan that a record names before gc's own record is published."""
    segment = commit_rollouts(store, 1)
    delete(store, rollouts="main")
    create = store.storage.create

    def overtaken(name: str, data: bytes) -> bool:
        if name.startswith("log/"):
            monkeypatch.setattr(store.storage, "create", create)
            assert commit_rollouts(open_on(store.storage), 1).path == segment.path
        return create(name, data)

    monkeypatch.setattr(store.storage, "create", overtaken)
    assert sweep(store) == 0
    readable(store)


def test_the_next_gc_finishes_a_killed_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = commit_rollouts(store, 1)
    delete(store, rollouts="main")

    def dies(name: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.storage, "remove", dies)
        with pytest.raises(KeyboardInterrupt):
            sweep(store)
    again = commit_rollouts(store, 1)
    assert again.generation == 1
    assert verify(store).orphans == (segment.path,)
    assert sweep(store) == 1
    assert verify(store, deep=True).orphans == ()


def test_objects_put_during_gc_are_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove only objects of the record; a newer object may be named at any moment."""
    commit_rollouts(store, 1)
    delete(store, rollouts="main")
    late = path_of("rollout", "a" * 32, 0)

    def then_put(*arguments: Any) -> Any:
        number = append(*arguments)
        if number is None:
            store.storage.put(late, b"x")
        return number

    monkeypatch.setattr(retention, "append", then_put)
    assert sweep(store, lease_hours=-1) == 1
    assert store.storage.read(late, 1) == b"x"


def test_a_writer_that_pauses_beyond_the_lease_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let gc remove its staged file before it gets its name."""
    store = open_store(tmp_path / "cask", create=True)
    link = LocalStorage._link

    def paused(self: LocalStorage, temporary: Path, name: str) -> bool:
        if name.startswith("seg/"):
            assert gc(open_store(store.url), keep_days=0, lease_hours=-1).orphans == 1
        return link(self, temporary, name)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "_link", paused)
        with pytest.raises(StoreError, match=r"cannot publish .*\.zip: No such file"):
            commit_rollouts(store, 1)
    assert store.storage.files("seg") == store.storage.files("staging") == []
    assert commit_rollouts(store, 1).number == 0
    assert verify(store, deep=True).orphans == ()


def test_deletion_affects_no_later_units(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_rollouts(store, 1)
    create = store.storage.create

    def then_more(name: str, data: bytes) -> bool:
        created = create(name, data)
        if name.startswith("log/"):
            monkeypatch.setattr(store.storage, "create", create)
            commit_rollouts(open_on(store.storage), 2)
        return created

    monkeypatch.setattr(store.storage, "create", then_more)
    assert len(delete(store, rollouts="main")) == 1
    assert len(store.head().segments) == 1


def test_many_removals_are_several_records(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_MAX_REMOVALS", 2)
    for n in range(5):
        commit_rollouts(store, n)
    delete(store, rollouts="main")
    before = store.head().number
    assert sweep(store) == 5
    assert store.head().number == before + 3


def test_gc_of_a_copy_without_empty_folders(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cask", create=True)
    segment = commit_rollouts(store, 1)
    delete(store, rollouts="main")
    (tmp_path / "cask" / "staging").rmdir()
    assert sweep(store) == 1
    assert not (tmp_path / "cask" / segment.path).exists()


def test_days_without_end(store: Store) -> None:
    commit_rollouts(store, 1)
    delete(store, rollouts="main")
    assert sweep(store, keep_days=1e9) == 0


def test_unknown_names_are_kept(store: Store) -> None:
    commit_rollouts(store, 1)
    zeros = path_of("rollout", "0" * 32, 0)
    names = ("seg/notes.zip", zeros.replace("/00/", "/01/"), zeros.replace(".zip", ".0.zip"))
    for name in names:
        store.storage.put(name, b"x")
    assert sweep(store) == 0
    assert set(verify(store).orphans) == set(names)


def test_content_of_two_names_stays_while_one_is_visible(store: Store) -> None:
    one = commit_rollouts(store, 1)
    two = commit_rollouts(store, 1, key("other"), name="second")
    assert one.path == two.path
    delete(store, rollouts="main")
    assert sweep(store) == 0
    readable(store)
    delete(store, rollouts="second")
    assert sweep(store) == 1
