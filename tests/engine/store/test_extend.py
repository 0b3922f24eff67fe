"""Extensions: several scorings of one teacher read like one large scoring."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.errors import IdentityError, StoreError
from logitcask.engine.store import Store, extend
from logitcask.engine.store.format import codecs
from logitcask.engine.store.format import layouts as layout
from logitcask.engine.store.format.ragged import starts
from logitcask.engine.store.retention import delete
from logitcask.engine.store.verify import verify
from logitcask.engine.types import Array, CachedScores, IdLists, Scores
from tests.engine.store.made import SCORE_PROVENANCE, commit_rollouts, commit_scores, key

VOCAB = 60


class Teacher:
    """Full distributions of P rows, scored exactly."""

    def __init__(self, seed: int, rows: int, levels: int) -> None:
        rng = np.random.default_rng(seed)
        # Few levels make ties, and differences that float32 keeps and float16 does not.
        values = -np.round(rng.exponential(3.0, (rows, VOCAB)) * levels) / levels - 5
        self.lp = (values - rng.integers(0, 3, values.shape) * 1e-5).astype(np.float32)
        self.rng = rng
        ids = np.broadcast_to(np.arange(VOCAB), self.lp.shape)
        self.order = np.lexsort((ids, -self.lp), axis=1)

    def lists(self, most: int) -> IdLists:
        """Return random ids of every row, up to so many."""
        rows = [self.rng.permutation(VOCAB)[: self.rng.integers(0, most + 1)] for _ in self.lp]
        return IdLists(
            cnt=np.asarray([len(r) for r in rows], np.uint16),
            ids=np.concatenate([np.zeros(0, np.uint32), *rows]).astype(np.uint32),
        )

    def score(self, kept: int, at: IdLists | None) -> Scores:
        """Return its best ids, up to `kept` of a row (fewer in some), and its log-probs at `at`."""
        rows = len(self.lp)
        cnt = np.asarray([min(kept, 1 + (r * 7) % (kept + 1)) for r in range(rows)], np.int64)
        cnt = np.minimum(cnt, kept)
        chosen = [self.order[r, : cnt[r]] for r in range(rows)]
        requested = [] if at is None else np.split(at.ids, np.cumsum(at.cnt)[:-1])
        tail = []
        for r in range(rows):
            outside = np.ones(VOCAB, bool)
            outside[chosen[r]] = False
            if at is not None:
                outside[requested[r]] = False
            with np.errstate(divide="ignore"):
                tail.append(np.logaddexp.reduce(self.lp[r, outside]) if outside.any() else -np.inf)
        none = np.zeros(0, np.float32)
        return Scores(
            lp=self.lp[:, 0],
            entropy=-self.lp[:, 1],
            log_tail=np.asarray(tail, np.float32),
            cnt=cnt.astype(np.uint16),
            ids=np.concatenate([none, *chosen]).astype(np.uint32),
            entry_lp=np.concatenate([none, *(self.lp[r, c] for r, c in enumerate(chosen))]),
            at_lp=None
            if at is None
            else np.concatenate([none, *(self.lp[r, requested[r]] for r in range(rows))]),
        )


def check(cached: CachedScores, teacher: Teacher, expected: list[set[int]], kept: Array) -> None:
    """Check that all expected ids are there once, in the teacher's exact order, rounded."""
    ranked = layout.ranked(cached)
    assert np.array_equal(cached.kept, kept)
    offset = starts(ranked.cnt)
    for r, reference in enumerate(expected):
        row = slice(offset[r], offset[r + 1])
        ids = ranked.ids[row].tolist()
        assert sorted(ids) == sorted(reference)
        # The kept ones are the teacher's own top; the rest follow in order.
        assert ids[: kept[r]] == teacher.order[r, : kept[r]].tolist()
        rest = [i for i in teacher.order[r].tolist() if i in reference - set(ids[: kept[r]])]
        assert ids[kept[r] :] == rest
        exact = teacher.lp[r, ids]
        np.testing.assert_allclose(ranked.lp[row], exact, rtol=2**-8)
        outside = np.ones(VOCAB, bool)
        outside[ids] = False
        tail = np.logaddexp.reduce(teacher.lp[r, outside]) if outside.any() else -np.inf
        np.testing.assert_allclose(cached.log_tail[r], tail, rtol=1e-5)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 9),
    levels=st.sampled_from([1, 4, 1000]),
    first=st.integers(0, 12),
    requested=st.booleans(),
    steps=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=3),
    names=st.lists(st.sampled_from(list(codecs.PROFILES)), min_size=4, max_size=4),
)
def test_several_scorings_read_as_one(
    seed: int,
    rows: int,
    levels: int,
    first: int,
    requested: bool,
    steps: list[tuple[int, bool]],
    names: list[str],
) -> None:
    teacher = Teacher(seed, rows, levels)
    student = teacher.lists(10)
    profiles = [codecs.profile(name) for name in names]
    scores = teacher.score(first, student if requested else None)
    cached = layout.decode(layout.encode(scores, profiles[0], student), profiles[0], student)
    lists = [set(x.tolist()) for x in np.split(scores.ids, np.cumsum(scores.cnt)[:-1])]
    if requested:
        theirs = np.split(student.ids, np.cumsum(student.cnt)[:-1])
        lists = [a | set(b.tolist()) for a, b in zip(lists, theirs, strict=True)]
    kept = scores.cnt.astype(np.int64)
    lists = lists[:rows]
    for (more, other_ids), profile in zip(steps, profiles[1:], strict=False):
        extra = teacher.lists(8) if other_ids else None
        at = extend.request_ids(cached, extra)
        scores = teacher.score(more, at)
        arrays = extend.encode(cached, scores, at, profile, noise=1e-3, rounding=2**-8)
        # No entry is stored twice.
        new = np.split(arrays["topk_ids"], np.cumsum(arrays["topk_counts"])[:-1])
        assert all(not set(a.tolist()) & b for a, b in zip(new, lists, strict=False))
        cached = extend.decode(cached, arrays, profile)
        every = (scores.ids, scores.cnt), (at.ids, at.cnt)
        for ids, cnt in every:
            split = np.split(ids, np.cumsum(cnt)[:-1])
            lists = [a | set(b.tolist()) for a, b in zip(lists, split, strict=False)]
        kept = np.maximum(kept, scores.cnt)
        check(cached, teacher, lists, kept)
    if not requested:
        split_known = layout.split_by_student(cached, student)
        check(split_known, teacher, lists, kept)
        assert set(split_known.s_ids.tolist()) <= set(student.ids.tolist())


def teacher_of(store: Store, seed: int) -> tuple[Teacher, object, IdLists]:
    base = commit_rollouts(store, seed, student=True)
    rollouts = store.read_rollouts(base)
    assert rollouts.student is not None
    student = IdLists(cnt=rollouts.student.cnt, ids=rollouts.student.ids)
    return Teacher(seed, rollouts.positions, 4), base, student


def test_the_store_extends_and_reads_scores(store: Store) -> None:
    teacher, base, student = teacher_of(store, 3)
    commit_scores(store, base, 0, scores=teacher.score(4, student))
    at = extend.request_ids(store.read_scores(store.head().scores("teacher")[base.seg_id]))
    wide = commit_scores(store, base, 1, scores=teacher.score(20, at), at=at)
    assert wide.layout == "extension"
    later = teacher.lists(6)
    score_segments = store.head().scores("teacher")[base.seg_id]
    at = extend.request_ids(store.read_scores(score_segments), later)
    commit_scores(store, base, 2, scores=teacher.score(4, at), at=at, profile="raw32")
    score_segments = store.head().scores("teacher")[base.seg_id]
    assert [each.layout for each in score_segments] == ["dedup", "extension", "extension"]
    assert [each.extends for each in score_segments] == [
        "",
        score_segments[0].seg_id,
        score_segments[1].seg_id,
    ]
    cached = store.read_scores(score_segments)
    longest = np.maximum(teacher.score(20, None).cnt, teacher.score(4, None).cnt)
    assert np.array_equal(cached.kept, longest)
    ids = layout.ranked(cached)
    rows = np.split(ids.ids, np.cumsum(ids.cnt)[:-1])
    requested = np.split(later.ids, np.cumsum(later.cnt)[:-1])
    assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(requested, rows, strict=True))
    # An earlier snapshot reads the earlier scores.
    assert np.array_equal(store.read_scores(score_segments[:1]).kept, teacher.score(4, None).cnt)
    assert verify(store, deep=True).segments == 4


def test_a_second_scoring_without_the_stored_ids_is_refused(store: Store) -> None:
    teacher, base, student = teacher_of(store, 3)
    commit_scores(store, base, 0, scores=teacher.score(4, student))
    with pytest.raises(StoreError, match="has scores of rollouts .* already"):
        commit_scores(store, base, 1, scores=teacher.score(20, student))
    with pytest.raises(StoreError, match="lacks scores at some stored ids"):
        commit_scores(store, base, 1, scores=teacher.score(20, student), at=student)


def test_an_extension_of_deleted_scores_is_refused(store: Store) -> None:
    """Refuse it: its values are in the order of the request, not in that of the student."""
    teacher, base, student = teacher_of(store, 3)
    commit_scores(store, base, 0, scores=teacher.score(4, student))
    at = extend.request_ids(store.read_scores(store.head().scores("teacher")[base.seg_id]))
    delete(store, teacher="teacher")
    with pytest.raises(StoreError, match="no scores of rollouts .* to extend"):
        commit_scores(store, base, 1, scores=teacher.score(20, at), at=at)


def test_invalid_lists_do_not_extend(store: Store) -> None:
    teacher, base, student = teacher_of(store, 3)
    commit_scores(store, base, 0, scores=teacher.score(4, student))
    at = extend.request_ids(store.read_scores(store.head().scores("teacher")[base.seg_id]))
    ids = at.ids.copy()
    ids[1] = ids[0]
    for bad, words in (
        (replace(at, ids=ids), "names an id twice"),
        (replace(at, cnt=at.cnt[:-1]), "counts of shape"),
        (replace(at, cnt=at.cnt + 1), "do not add up"),
    ):
        with pytest.raises(StoreError, match=words):
            commit_scores(store, base, 1, scores=teacher.score(20, at), at=bad)


def test_an_id_that_became_impossible_does_not_extend(store: Store) -> None:
    teacher, base, student = teacher_of(store, 3)
    commit_scores(store, base, 0, scores=teacher.score(4, student))
    at = extend.request_ids(store.read_scores(store.head().scores("teacher")[base.seg_id]))
    scores = teacher.score(20, at)
    never = replace(scores, at_lp=np.full_like(scores.at_lp, -np.inf))
    with pytest.raises(IdentityError, match=r"has log-prob -inf now"):
        commit_scores(store, base, 1, scores=never, at=at)


def test_scores_of_another_teacher_do_not_extend(store: Store) -> None:
    teacher, base, student = teacher_of(store, 3)
    commit_scores(store, base, 0, scores=teacher.score(4, student))
    at = extend.request_ids(store.read_scores(store.head().scores("teacher")[base.seg_id]))
    scores = teacher.score(20, at)
    assert scores.at_lp is not None
    moved = replace(scores, at_lp=scores.at_lp - np.float32(0.1))
    with pytest.raises(IdentityError, match=r"id \d+ has log-prob .* now, .* is stored"):
        commit_scores(store, base, 1, scores=moved, at=at)
    # bfloat16 computes that coarsely.
    coarse = SCORE_PROVENANCE | {"backend": {"dtype": "bfloat16"}}
    assert commit_scores(store, base, 1, scores=moved, at=at, provenance=coarse).extends


def test_the_slower_of_two_extensions_is_refused(store: Store) -> None:
    from logitcask.engine.store.store import open_on

    teacher, base, student = teacher_of(store, 3)
    commit_scores(store, base, 0, scores=teacher.score(4, student))
    score_segments = store.head().scores("teacher")[base.seg_id]
    at = extend.request_ids(store.read_scores(score_segments))
    other = open_on(store.storage)
    commit_scores(other, base, 1, scores=teacher.score(20, at), at=at)
    with pytest.raises(StoreError, match="lacks scores at some stored ids"):
        commit_scores(store, base, 2, scores=teacher.score(30, at), at=at)
    assert len(store.head().scores("teacher")[base.seg_id]) == 2


def test_an_extension_without_its_base_is_an_invalid_log(store: Store) -> None:
    from logitcask.engine.errors import IntegrityError
    from logitcask.engine.store.log.publish import append

    teacher, base, student = teacher_of(store, 3)
    first = commit_scores(store, base, 0, scores=teacher.score(4, student))
    at = extend.request_ids(store.read_scores((first,)))
    commit_scores(store, base, 1, scores=teacher.score(20, at), at=at)
    calls: list[object] = []

    def build_record() -> dict[str, list[str]] | None:
        calls.append(1)
        return {"deletes": [key("score", base.seg_id, 0)]} if len(calls) == 1 else None

    with pytest.raises(IntegrityError, match="contradicts the records before it"):
        append(store.storage, store.log, build_record)
