"""Layout `dedup`: exact round trips of ids and their order, despite ties in float16."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.errors import StoreError
from logitcask.engine.store.format import checks, codecs
from logitcask.engine.store.format import layouts as layout
from logitcask.engine.store.format.ragged import starts
from logitcask.engine.types import CachedScores, IdLists, Scores
from tests.engine.store.made import ragged

PROFILES = list(codecs.PROFILES.values())
HALF = codecs.profile("default")


def rows_of(seed: int, rows: int, vocab: int, levels: int, dead: float) -> tuple[Scores, IdLists]:
    """Make scores of a teacher over `rows` rows, and the student's lists."""
    rng = np.random.default_rng(seed)
    pool = min(vocab, 40)
    listed = rng.integers(0, pool + 1, rows)
    kept = np.minimum(rng.integers(0, pool + 1, rows), rng.integers(0, pool + 1, rows))
    ids, values, lists, at = [], [], [], []
    for k, s in zip(kept, listed, strict=True):
        row, lp = ragged(rng, np.asarray([pool]), vocab, levels)
        lp[rng.random(pool) < dead] = -np.inf
        lp[rng.random(pool) < dead] = -70000.0 - rng.integers(0, 2)
        order = np.lexsort((row, -lp))
        row, lp = row[order], lp[order]
        ids.append(row[:k])
        values.append(lp[:k])
        mine = rng.permutation(pool)[:s]
        lists.append(row[mine])
        at.append(lp[mine])
    none = np.zeros(0, np.float32)
    scalars = -np.abs(rng.normal(-2, 1, (3, rows))).astype(np.float32)
    scores = Scores(
        lp=scalars[0],
        entropy=-scalars[1],
        log_tail=scalars[2],
        cnt=kept.astype(np.uint16),
        ids=np.concatenate([none.astype(np.uint32), *ids]),
        entry_lp=np.concatenate([none, *values]),
        at_lp=np.concatenate([none, *at]),
    )
    s_ids = np.concatenate([none.astype(np.uint32), *lists])
    return scores, IdLists(cnt=listed.astype(np.uint16), ids=s_ids)


def same(got: CachedScores, expected: Scores, student: IdLists, profile: codecs.Profile) -> None:
    """Compare ids, order and scalars exactly, entry values after rounding."""

    def stored(values: object) -> object:
        return codecs.from_entry(codecs.to_entry(values, profile), profile)

    for name in ("lp", "entropy", "log_tail"):
        assert np.array_equal(getattr(got, name), getattr(expected, name)), name
    assert np.array_equal(got.kept, expected.cnt)
    ids, log_probs = layout.kept_lists(got)
    assert (ids.dtype, log_probs.dtype) == (np.uint32, np.float32)
    assert np.array_equal(ids, expected.ids)
    assert np.array_equal(log_probs, stored(expected.entry_lp))
    assert np.array_equal(got.s_ids, student.ids)
    assert np.array_equal(got.s_lp, stored(expected.at_lp))
    # Every id and every rank once.
    cached = layout.ranked(got)
    assert len(cached.ids) == len(got.s_ids) + len(got.ids)
    for a, b in zip(starts(cached.cnt)[:-1], starts(cached.cnt)[1:], strict=True):
        assert len(set(cached.ids[a:b].tolist())) == b - a


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 12),
    vocab=st.sampled_from([1, 2, 5, 40, 1000, 2**18, 2**20]),
    levels=st.sampled_from([1, 4, 1000]),
    dead=st.sampled_from([0.0, 0.2, 1.0]),
    profile=st.sampled_from(PROFILES),
)
def test_round_trip_keeps_ids_and_order(
    seed: int, rows: int, vocab: int, levels: int, dead: float, profile: codecs.Profile
) -> None:
    scores, student = rows_of(seed, rows, vocab, levels, dead)
    checks.check_scores(scores, rows, student)
    arrays = layout.encode(scores, profile, student)
    same(layout.decode(arrays, profile, student), scores, student, profile)
    # No id is stored twice, and in descending lists the correction is small and does not wrap.
    assert len(arrays["topk_ids"]) <= len(scores.ids)
    assert arrays["at_student_rank_fix"].max(initial=0) <= 80


def test_rank_correction_of_a_row_worked_by_hand() -> None:
    # Teacher's exact order: 7, 3, 9, 5 (kept), then 4. As float16, 7 3 9 are equal, and so are 5 4.
    # Student's list: 9, 4, 3. Extras: 7, 5. Implied ranks: 9 and 3 -> 0, 4 -> 3.
    scores = Scores(
        lp=np.zeros(1, np.float32),
        entropy=np.zeros(1, np.float32),
        log_tail=np.zeros(1, np.float32),
        cnt=np.asarray([4], np.uint16),
        ids=np.asarray([7, 3, 9, 5], np.uint32),
        entry_lp=np.asarray([-1.0, -1.00001, -1.00002, -2.0], np.float32),
        at_lp=np.asarray([-1.00002, -2.00001, -1.00001], np.float32),
    )
    student = IdLists(cnt=np.asarray([3], np.uint16), ids=np.asarray([9, 4, 3], np.uint32))
    arrays = layout.encode(scores, HALF, student)
    assert arrays["topk_ids"].tolist() == [7, 5]
    assert arrays["topk_counts"].tolist() == [2]
    assert arrays["n_kept"].tolist() == [4]
    assert arrays["at_student_rank_fix"].tolist() == [2, 1, 1]
    cached = layout.decode(arrays, HALF, student)
    assert layout.kept_lists(cached)[0].tolist() == [7, 3, 9, 5]
    assert cached.s_rank.tolist() == [2, 4, 1]
    assert cached.rank.tolist() == [0, 3]


def test_every_top_k_is_the_teachers_own_for_every_k_up_to_the_kept_count() -> None:
    """Keep the teacher's order although float16 makes ties in most of these rows."""
    scores, student = rows_of(9, 300, 1000, 4, 0.0)
    arrays = layout.encode(scores, HALF, student)
    assert (arrays["at_student_rank_fix"] > 0).mean() > 0.01
    ids, _ = layout.kept_lists(layout.decode(arrays, HALF, student))
    for a, b in zip(starts(scores.cnt)[:-1], starts(scores.cnt)[1:], strict=True):
        for k in range(b - a + 1):
            assert ids[a : a + k].tolist() == scores.ids[a : a + k].tolist()


def test_order_survives_a_list_that_does_not_descend() -> None:
    scores, student = rows_of(5, 8, 1000, 1000, 0.0)
    rng = np.random.default_rng(1)
    shuffle = np.concatenate(
        [
            start + rng.permutation(int(k))
            for start, k in zip(starts(scores.cnt), scores.cnt, strict=False)
        ]
    )
    mixed = replace(scores, ids=scores.ids[shuffle], entry_lp=scores.entry_lp[shuffle])
    arrays = layout.encode(mixed, HALF, student)
    same(layout.decode(arrays, HALF, student), mixed, student, HALF)


def break_cnt(scores: Scores) -> Scores:
    return replace(scores, cnt=scores.cnt + np.uint16(1))


def break_ids(scores: Scores) -> Scores:
    return replace(scores, ids=np.zeros_like(scores.ids))


def break_lp(scores: Scores) -> Scores:
    return replace(scores, lp=np.full_like(scores.lp, np.nan))


def negative_ids(scores: Scores) -> Scores:
    return replace(scores, ids=scores.ids.astype(np.int64) - 1000)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (break_cnt, "shape"),
        (break_ids, "names an id twice"),
        (break_lp, "a log-prob of nan"),
        (negative_ids, "other values than token ids"),
    ],
)
def test_scores_that_do_not_fit_are_refused(broken: object, words: str) -> None:
    scores, student = rows_of(2, 9, 50, 4, 0.0)
    with pytest.raises(StoreError, match=words):
        checks.check_scores(broken(scores), 9, student)


def test_two_values_of_one_id_are_refused() -> None:
    scores, student = rows_of(2, 9, 50, 4, 0.0)
    assert scores.at_lp is not None
    with pytest.raises(StoreError, match="two log-probs"):
        layout.encode(replace(scores, at_lp=scores.at_lp - 1), HALF, student)


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_ranks_that_collide_are_an_error_not_a_wrong_list(value: int) -> None:
    scores, student = rows_of(2, 9, 50, 4, 0.0)
    arrays = layout.encode(scores, HALF, student)
    wrong = np.full_like(arrays["at_student_rank_fix"], value)
    with pytest.raises(ValueError, match="rank"):
        layout.decode(arrays | {"at_student_rank_fix": wrong}, HALF, student)
