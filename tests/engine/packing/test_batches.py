"""Plans are pure, complete and within budget; rows agree with the full distributions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.errors import ConfigError, IncompleteError, StoreError
from logitcask.engine.packing.batches import batches
from logitcask.engine.packing.plan import (
    PACKS,
    Lengths,
    PackPlan,
    PlanKey,
    default_pack_length,
    make_plan,
)
from logitcask.engine.packing.source import Pack, PackSource
from logitcask.engine.packing.targets import NOT_IN_TOPK
from logitcask.engine.types import PACK_LENGTH, Array
from tests.engine.cached import Unit, make_store, make_unit


def key(**change: object) -> PlanKey:
    fields: dict[str, object] = {
        "snapshot": 3,
        "snapshot_sha256": "0" * 64,
        "rollouts": "main",
        "teacher": "big",
        "seed": 1,
        "epochs": 1,
        "pack_length": 64,
    }
    return PlanKey(**(fields | change))  # type: ignore[arg-type]


def segment(name: str, prompt: list[int], response: list[int]) -> Lengths:
    return Lengths(
        seg_id=name,
        prompt_ids=tuple(f"{name}-{i}" for i in range(len(prompt))),
        seq_prompt=np.arange(len(prompt)),
        prompt=np.array(prompt, np.int64),
        response=np.array(response, np.int64),
        size_bytes=1,
    )


SEGMENTS = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), max_size=12), min_size=1, max_size=9
)


@settings(max_examples=60, deadline=None)
@given(drawn=SEGMENTS, seed=st.integers(0, 5), epochs=st.integers(1, 3), window=st.integers(1, 4))
def test_plan_is_complete_and_within_budget(
    drawn: list[list[tuple[int, int]]], seed: int, epochs: int, window: int
) -> None:
    lengths = [
        segment(f"s{i}", [p for p, _ in rows], [r for _, r in rows]) for i, rows in enumerate(drawn)
    ]
    ours = key(seed=seed, epochs=epochs, window_bytes=window)
    plan = make_plan(ours, lengths)
    again = make_plan(ours, lengths)
    assert plan.digest == again.digest
    assert np.array_equal(plan.members, again.members)
    expected = sorted(
        (i, j) for i, rows in enumerate(drawn) for j, (_, tokens) in enumerate(rows) if tokens
    )
    assert sorted(map(tuple, plan.members.tolist())) == sorted(expected * epochs)
    per_epoch = [sorted(map(tuple, e)) for e in np.split(plan.members, epochs)]
    assert all(epoch == expected for epoch in per_epoch)
    total = [s.prompt + s.response for s in lengths]
    for i in range(len(plan)):
        assert 0 < sum(int(total[s][n]) for s, n in plan.pack(i)) <= 64
    assert len(plan.pack(len(plan))) == 0, "rows beyond the end are empty"


def test_plan_digest_is_stable_over_releases() -> None:
    lengths = [segment("a", [2, 3, 4], [5, 0, 7]), segment("b", [1, 1], [60, 3])]
    # Another digest here means that runs begun before cannot be resumed.
    assert make_plan(key(), lengths).digest == (
        "sha256:6903fdd1f51c2d806e5ffb12304bf97d19095350702781e6b6efebeedc9c8158"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"snapshot": 4},
        {"snapshot_sha256": "1" * 64},
        {"teacher": "t"},
        {"rollouts": "r"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_plan_digest_covers_every_input(change: dict[str, object]) -> None:
    lengths = [segment("a", [2, 3, 4], [5, 6, 7])]
    assert make_plan(key(**change), lengths).digest != make_plan(key(), lengths).digest


@pytest.mark.parametrize(
    ("sequences", "longest", "expected"),
    [(10, 30, 40), (10, 700, 700), (6400, 30, 4000), (64_000, 30, PACK_LENGTH)],
    ids=["few", "long", "64 packs", "many"],
)
def test_the_default_pack_length_follows_the_data(
    sequences: int, longest: int, expected: int
) -> None:
    lengths = [segment("a", [10] * sequences, [30] * sequences), segment("b", [1], [longest - 1])]
    found = default_pack_length(lengths)
    assert found == pytest.approx(expected, abs=longest / PACKS + 1)
    assert found >= longest
    assert len(make_plan(key(pack_length=found), lengths)) >= 2


def test_a_sequence_beyond_the_default_is_an_error_with_a_way_out() -> None:
    lengths = [segment("a", [1], [PACK_LENGTH])]
    with pytest.raises(ConfigError, match=f"over pack_length = {PACK_LENGTH}"):
        make_plan(key(pack_length=default_pack_length(lengths)), lengths)


def test_epochs_differ_in_order_and_stay_in_their_window() -> None:
    lengths = [segment(f"s{i}", [1] * 20, [9] * 20) for i in range(8)]
    plan = make_plan(key(epochs=2, window_bytes=2), lengths)
    first, second = np.split(plan.members, 2)
    assert not np.array_equal(first, second)
    for part in np.split(first, 4):
        assert len(np.unique(part[:, 0])) == 2, "only the window's segments are decoded at a time"


def test_packing_fills_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = [segment("a", [4] * 400, rng.integers(1, 28, 400).tolist())]
    plan = make_plan(key(), lengths)
    tokens = int((lengths[0].prompt + lengths[0].response).sum())
    assert len(plan) <= 1.03 * math.ceil(tokens / 64)


def test_a_sequence_too_long_names_prompt_length_and_flag() -> None:
    with pytest.raises(ConfigError, match=r"'a-1' has 70 tokens.*64[\s\S]*--pack-length 70"):
        make_plan(key(), [segment("a", [2, 10, 3], [5, 60, 7])])


def rows_of(plan: PackPlan, source: PackSource) -> list[tuple[Array, Pack]]:
    return [(plan.pack(i), source.pack(plan.pack(i))) for i in range(len(plan))]


@pytest.mark.parametrize("at_student", [True, False], ids=["once", "whole"])
def test_columns_against_the_full_distributions(tmp_path: Path, at_student: bool) -> None:
    units = [make_unit(seed, at_student=at_student) for seed in range(3)]
    store = make_store(tmp_path / "store", units)
    source = PackSource(store, store.head(), "main", "big")
    plan = make_plan(key(pack_length=48), source.lengths())
    seen = 0
    for members, packed in rows_of(plan, source):
        row = at = 0
        for ordinal, sequence in members:
            unit = unit_of(units, source, int(ordinal))
            a, b = unit.rollouts.seq_off[sequence : sequence + 2]
            prompt = unit.rollouts.prompts[int(unit.rollouts.seq_prompt[sequence])].token_ids
            text = [*prompt, *unit.rollouts.tokens[a:b].tolist()]
            assert packed.input_ids[0, at : at + len(text)].tolist() == text
            assert packed.position_ids[0, at : at + len(text)].tolist() == list(range(len(text)))
            for r in range(b - a):
                assert packed.predict_at[row] == at + len(prompt) + r - 1
                check_row(packed, row, unit, int(a) + r, at_student)
                row += 1
            at += len(text)
        assert at == packed.input_ids.shape[1]
        assert row == len(packed.targets)
        seen += row
    assert seen == sum(unit.rollouts.positions for unit in units)


def unit_of(units: list[Unit], source: PackSource, ordinal: int) -> Unit:
    first = source.pairs[ordinal][0].unit["first"]
    return units[first // len(units[0].rollouts.prompts)]


def check_row(packed: Pack, row: int, unit: Unit, position: int, at_student: bool) -> None:
    t = packed.targets
    log_q, log_p = unit.log_q[position], unit.log_p[position]
    token = int(unit.rollouts.tokens[position])
    assert unit.rollouts.student is not None
    by_teacher = np.argsort(-log_q, kind="stable")[: unit.scores.cnt[position]].tolist()
    by_student = np.argsort(-log_p, kind="stable")[:4].tolist()
    listed = by_student if at_student else [i for i in by_student if i in by_teacher]
    cached = listed + [i for i in by_teacher if i not in listed]
    ids = cached + [token] * (token not in cached)
    width = len(ids)
    assert t.ids[row].tolist() == ids + [-1] * (t.ids.shape[1] - width)
    assert t.cached[row].tolist() == [i in cached for i in t.ids[row].tolist()]
    assert t.in_student[row].nonzero().flatten().tolist() == list(range(len(listed)))
    ranks = [by_teacher.index(i) if i in by_teacher else NOT_IN_TOPK for i in ids]
    assert t.q_rank[row, :width].tolist() == ranks
    assert (t.q_rank[row, width:] == NOT_IN_TOPK).all()
    assert torch.isneginf(t.q_log_p[row, width:]).all()
    # float16 entries: half a unit in the last place is 2^-11 of the value.
    np.testing.assert_allclose(t.q_log_p[row, :width], log_q[ids], rtol=2**-11)
    assert int(t.token_col[row]) == ids.index(token)
    assert t.q_log_p[row, t.token_col[row]] == t.teacher_logprobs[row] == np.float32(log_q[token])
    tail = 1 - np.exp(log_q[cached]).sum()
    assert math.exp(float(t.q_log_tail[row])) == pytest.approx(tail, abs=1e-6)
    assert int(t.n_kept[row]) == len(by_teacher)
    assert int(t.token[row]) == token
    for name, theirs in (
        ("q_entropy", -(np.exp(log_q) * log_q).sum()),
        ("student_entropy", -(np.exp(log_p) * log_p).sum()),
        ("student_logprobs", log_p[token]),
        ("behavior_logprobs", log_p[token] - 0.25),
    ):
        assert float(getattr(t, name)[row]) == pytest.approx(theirs, rel=1e-5), name


def test_an_empty_row_has_a_token_and_no_targets(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [make_unit(0)])
    source = PackSource(store, store.head(), "main", "big")
    empty = source.pack(np.zeros((0, 2), np.int64))
    assert empty.input_ids.shape == (1, 1)
    assert len(empty.targets) == len(empty.predict_at) == 0


def test_the_cache_is_bounded_and_rows_do_not_depend_on_it(tmp_path: Path) -> None:
    units = [make_unit(seed) for seed in range(4)]
    store = make_store(tmp_path / "store", units)
    small = PackSource(store, store.head(), "main", "big", memory_bytes=1)
    large = PackSource(store, store.head(), "main", "big")
    plan = make_plan(key(), large.lengths())
    for i in range(len(plan)):
        a, b = small.pack(plan.pack(i)), large.pack(plan.pack(i))
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.targets.q_log_p, b.targets.q_log_p)
    assert len(small._units) == 1
    assert len(large._units) == 4


def test_missing_scores_and_units_are_counted(tmp_path: Path) -> None:
    units = [make_unit(seed, lengths=[4] * 6) for seed in range(3)]
    unscored = make_store(tmp_path / "a", units, scored=1)
    with pytest.raises(IncompleteError, match=r"2 of 3 units.*'big'[\s\S]*logitcask score"):
        PackSource(unscored, unscored.head(), "main", "big")
    partial = PackSource(unscored, unscored.head(), "main", "big", partial=True)
    assert len(partial.pairs) == 1
    unsampled = make_store(tmp_path / "b", units, planned=5)
    with pytest.raises(IncompleteError, match=r"2 of 5 units[\s\S]*logitcask rollout"):
        PackSource(unsampled, unsampled.head(), "main", "big")
    assert IncompleteError.exit_code == 3
    with pytest.raises(StoreError, match=r"'other'[\s\S]*\['main'\].*\['big'\]"):
        PackSource(unscored, unscored.head(), "other", "big")


def test_batches_is_every_position_once_per_epoch(tmp_path: Path) -> None:
    units = [make_unit(seed) for seed in range(2)]
    store = make_store(tmp_path / "store", units)
    rows = list(
        batches(
            store,
            snapshot=store.head(),
            rollouts="main",
            teacher="big",
            pack_length=32,
            epochs=2,
        )
    )
    total = sum(unit.rollouts.positions for unit in units)
    assert sum(len(row.targets) for row in rows) == 2 * total
    assert max(row.input_ids.shape[1] for row in rows) <= 32
