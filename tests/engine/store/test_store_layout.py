"""Layout `once`: ids and their order come back exactly, whatever ties float16 makes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.errors import ConfigError, StoreError
from logitcask.engine.store import codecs, layout
from logitcask.engine.types import Array, Scores
from tests.engine.store.made import ragged

HALF = codecs.profile("default")
EXACT = codecs.profile("raw32")


def rows_of(
    seed: int, rows: int, vocab: int, levels: int, dead: float
) -> tuple[Scores, Array, Array]:
    """A teacher over `rows` rows, and the student's lists (s_cnt, s_ids)."""
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
    scalars = rng.normal(-2, 1, (3, rows)).astype(np.float32)
    scores = Scores(
        lp=scalars[0],
        entropy=scalars[1],
        log_tail=scalars[2],
        cnt=kept.astype(np.uint16),
        ids=np.concatenate([none.astype(np.uint32), *ids]),
        entry_lp=np.concatenate([none, *values]),
        at_student=np.concatenate([none, *at]),
    )
    s_ids = np.concatenate([none.astype(np.uint32), *lists])
    return scores, listed.astype(np.uint16), s_ids


def same(got: Scores, want: Scores, profile: codecs.Profile) -> None:
    """Ids, order and scalars exact; entry values those that the profile stores."""
    for name in ("lp", "entropy", "log_tail", "cnt", "ids"):
        assert np.array_equal(getattr(got, name), getattr(want, name)), name
        assert getattr(got, name).dtype == getattr(want, name).dtype, name
    for name in ("entry_lp", "at_student"):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert ours.dtype == np.float32
        assert np.array_equal(ours, codecs.to_entry(theirs, profile.entry).astype(np.float32)), name


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 12),
    vocab=st.sampled_from([1, 2, 5, 40, 1000, 2**18]),
    levels=st.sampled_from([1, 4, 1000]),
    dead=st.sampled_from([0.0, 0.2, 1.0]),
    profile=st.sampled_from([HALF, EXACT]),
)
def test_round_trip_keeps_ids_and_order(
    seed: int, rows: int, vocab: int, levels: int, dead: float, profile: codecs.Profile
) -> None:
    scores, s_cnt, s_ids = rows_of(seed, rows, vocab, levels, dead)
    layout.check(scores, rows, len(s_ids))
    arrays = layout.encode(scores, profile, s_cnt, s_ids)
    same(layout.decode(arrays, s_cnt, s_ids), scores, profile)
    # No id is stored twice, and in descending lists the correction is a small number, never a wrap.
    assert len(arrays["ids"]) <= len(scores.ids)
    assert arrays["t_rank_fix"].max(initial=0) <= 80


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
        at_student=np.asarray([-1.00002, -2.00001, -1.00001], np.float32),
    )
    s_cnt, s_ids = np.asarray([3], np.uint16), np.asarray([9, 4, 3], np.uint32)
    arrays = layout.encode(scores, HALF, s_cnt, s_ids)
    assert arrays["ids"].tolist() == [7, 5]
    assert arrays["cnt"].tolist() == [2]
    assert arrays["kept"].tolist() == [4]
    assert arrays["t_rank_fix"].tolist() == [2, 1, 1]
    assert layout.decode(arrays, s_cnt, s_ids).ids.tolist() == [7, 3, 9, 5]


def test_order_survives_a_list_that_does_not_descend() -> None:
    scores, s_cnt, s_ids = rows_of(5, 8, 1000, 1000, 0.0)
    rng = np.random.default_rng(1)
    shuffle = np.concatenate(
        [
            start + rng.permutation(int(k))
            for start, k in zip(layout.starts(scores.cnt), scores.cnt, strict=False)
        ]
    )
    mixed = replace(scores, ids=scores.ids[shuffle], entry_lp=scores.entry_lp[shuffle])
    arrays = layout.encode(mixed, HALF, s_cnt, s_ids)
    same(layout.decode(arrays, s_cnt, s_ids), mixed, HALF)


def test_whole_lists_where_the_teacher_was_not_asked_at_the_students_ids() -> None:
    scores, _, _ = rows_of(3, 9, 50, 4, 0.1)
    alone = replace(scores, at_student=None)
    arrays = layout.encode(alone, HALF, None, None)
    assert "t_at_s" not in arrays
    back = layout.decode(arrays, None, None)
    assert back.at_student is None
    assert np.array_equal(back.ids, scores.ids)


def test_float16_keeps_impossible_apart_from_improbable() -> None:
    given_lp = np.asarray([0.0, -1e-9, -12.5, -65504.0, -1e6, -np.inf], np.float32)
    stored = codecs.to_entry(given_lp, "float16").astype(np.float32)
    assert np.isneginf(stored).tolist() == [False] * 5 + [True]
    assert stored[4] == stored[3] == np.float16(-65000.0)
    assert np.all(np.abs(stored[:3] - given_lp[:3]) <= 2.0**-11 * np.abs(given_lp[:3]) + 2.0**-25)


def test_float16_costs_less_than_a_millionth_nat() -> None:
    # Rows like a language model's: mean entropy near half a nat, most mass on few ids.
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (2000, 64)) - np.arange(64) * rng.exponential(0.5, (2000, 1))
    logits[:, 0] += rng.exponential(4.0, 2000)
    lp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    half = codecs.to_entry(lp.astype(np.float32), "float16").astype(np.float64)
    half -= np.logaddexp.reduce(half, axis=1, keepdims=True)
    kl = (np.exp(lp) * (lp - half)).sum(1)
    assert kl.mean() < 1e-6
    assert kl.max() < 1e-5


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
        (break_lp, "NaN"),
        (negative_ids, "no token id"),
    ],
)
def test_scores_that_do_not_fit_are_refused(broken: object, words: str) -> None:
    scores, _, s_ids = rows_of(2, 9, 50, 4, 0.0)
    with pytest.raises(StoreError, match=words):
        layout.check(broken(scores), 9, len(s_ids))


def test_two_values_of_one_id_are_refused() -> None:
    scores, s_cnt, s_ids = rows_of(2, 9, 50, 4, 0.0)
    assert scores.at_student is not None
    with pytest.raises(StoreError, match="two log-probs"):
        layout.encode(replace(scores, at_student=scores.at_student - 1), HALF, s_cnt, s_ids)


def test_ranks_that_collide_are_an_error_not_a_wrong_list() -> None:
    scores, s_cnt, s_ids = rows_of(2, 9, 50, 4, 0.0)
    arrays = layout.encode(scores, HALF, s_cnt, s_ids)
    for value in (0, 7, 65535):
        with pytest.raises(ValueError, match="rank"):
            layout.decode(
                arrays | {"t_rank_fix": arrays["t_rank_fix"] * 0 + np.uint16(value)}, s_cnt, s_ids
            )


def test_unknown_profile_lists_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        codecs.profile("tiny")
    assert "default, raw32" in caught.value.remedy
