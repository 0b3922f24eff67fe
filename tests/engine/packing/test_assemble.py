"""Columns of a row: one for every id of a list, of a draw or of the sample, with its numbers."""

from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcask.engine.errors import IncompleteError
from logitcask.engine.models.identity import digest
from logitcask.engine.packing.batches import batches, planned
from logitcask.engine.packing.plan import PlanKey, make_plan
from logitcask.engine.packing.source import PackSource
from logitcask.engine.packing.targets import NOT_IN_TOPK, Targets, empty_sequence, make_targets
from logitcask.engine.store import Store
from logitcask.engine.store.cache import UnitCache, read_unit
from logitcask.engine.store.decoded_unit import DTYPES
from logitcask.engine.types import Array
from tests.engine.cached import Unit, make_store, make_unit

VOCAB = 12
GROUPS = ("s", "t", "mc")


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, list[int]]]:
    """Draw rows: the student's list, other ids of the teacher, drawn ids and the token."""
    found = []
    for _ in range(draw(st.integers(0, 6))):
        order = draw(st.permutations(range(VOCAB)))
        a, b = sorted(draw(st.lists(st.integers(0, VOCAB), min_size=2, max_size=2)))
        mc = draw(st.lists(st.integers(0, VOCAB - 1), unique=True, max_size=6))
        found.append(
            {"s": order[:a], "t": order[a:b], "mc": mc, "token": [draw(st.integers(0, VOCAB - 1))]}
        )
    return found


def flat_of(rows: list[dict[str, list[int]]], rng: np.random.Generator) -> dict[str, Array]:
    """Return these rows in the format of `Unit.sequence`, with distinct values."""
    flat = empty_sequence(DTYPES)
    count = {"row": len(rows)} | {g: sum(len(row[g]) for row in rows) for g in GROUPS}
    for name, array in flat.items():
        group = {"s": "s", "t": "t", "mc": "mc"}.get(name.split("_")[0], "row")
        one_a_row = name.endswith("_cnt") or name in ("s_lp", "s_entropy")
        size = count["row" if one_a_row else group]
        flat[name] = rng.permutation(size).astype(array.dtype) + 1
        if array.dtype == np.float32:
            flat[name] = -flat[name]
    for group in GROUPS:
        flat[f"{group}_cnt"] = np.asarray([len(row[group]) for row in rows], np.uint16)
        ids = [i for row in rows for i in row[group]]
        flat[f"{group}_ids"] = np.asarray(ids, np.uint32)
    flat["token"] = np.asarray([row["token"][0] for row in rows], np.uint32)
    flat["sequence"] = np.zeros(len(rows), np.int64)
    return flat


@given(rows(), st.integers(0, 99))
def test_no_id_is_lost_and_each_has_its_numbers(
    rows: list[dict[str, list[int]]], seed: int
) -> None:
    flat = flat_of(rows, np.random.default_rng(seed))
    targets = make_targets(flat)
    assert len(targets) == len(rows)
    assert targets.mc_count is not None
    assert targets.mc_log_p is not None
    assert targets.student_topk_logprobs is not None
    assert targets.q_draws is not None
    assert targets.base_log_p is not None
    at = dict.fromkeys(GROUPS, 0)
    widest = 0
    for r, row in enumerate(rows):
        union = list(dict.fromkeys(row["s"] + row["t"] + row["mc"] + row["token"]))
        widest = max(widest, len(union))
        ids = targets.ids[r].tolist()
        assert ids == union + [-1] * (len(ids) - len(union)), "in the documented order"
        cached = row["s"] + row["t"]
        assert targets.cached[r].tolist() == [i in cached for i in union] + [False] * ids.count(-1)
        for c, i in enumerate(ids):
            q, base, rank = -np.inf, np.nan, NOT_IN_TOPK
            student, mc, mc_count, draws = -np.inf, -np.inf, 0, 0
            if i in row["s"]:
                e = at["s"] + row["s"].index(i)
                q, base, student = flat["s_q"][e], flat["s_base"][e], flat["s_p"][e]
                rank = flat["s_rank"][e]
            if i in row["t"]:
                e = at["t"] + row["t"].index(i)
                q, base, draws = flat["t_q"][e], flat["t_base"][e], flat["t_mult"][e]
                rank = flat["t_rank"][e]
            if i in row["mc"]:
                e = at["mc"] + row["mc"].index(i)
                mc, mc_count = flat["mc_lp"][e], flat["mc_mult"][e]
            if i == row["token"][0]:
                q, base = flat["q_token_lp"][r], flat["base_token_lp"][r]
                assert targets.token_col[r] == c
            assert targets.q_log_p[r, c] == q
            assert np.array_equal(targets.base_log_p[r, c].numpy(), base, equal_nan=True)
            assert targets.student_topk_logprobs[r, c] == student
            assert targets.mc_log_p[r, c] == mc
            assert targets.mc_count[r, c] == mc_count
            assert targets.q_draws[r, c] == draws
            assert targets.q_rank[r, c] == (rank if rank < flat["kept"][r] else NOT_IN_TOPK)
        at = {group: n + len(row[group]) for group, n in at.items()}
    assert targets.ids.shape[1] == widest


def key(tokens: int = 48) -> PlanKey:
    return PlanKey(
        snapshot=0, snapshot_sha256="", rollouts="main", teacher="big", seed=1, epochs=1,
        pack_length=tokens,
    )  # fmt: skip


def with_base(path: Path, units: list[Unit], based: int) -> Store:
    """Score the first `based` units with a base model, whose distribution is the student's."""
    store = make_store(path, units)
    for i, segment in enumerate(store.head().rollouts("main")[:based]):
        own = units[i].rollouts.student
        assert own is not None
        store.commit_scores(
            own,
            base=segment,
            name="root",
            unit_key=digest({"base": i}),
            unit=dict(segment.unit),
            provenance={
                "teacher": {"weights": digest("base")},
                "teacher_kind": "base",
                "context": "",
            },
            profile="raw32",
        )
    return store


def batch_rows(source: PackSource) -> list[Targets]:
    plan = make_plan(key(), source.lengths())
    return [source.pack(plan.pack(i)).targets for i in range(len(plan))]


def test_batches_hold_the_contents_of_the_store(tmp_path: Path) -> None:
    units = [make_unit(seed, mc_draws=9) for seed in range(3)]
    store = with_base(tmp_path / "s", units, 3)
    source = PackSource(store, store.head(), "main", "big", base="root")
    cached = PackSource(
        store, store.head(), "main", "big", base="root", cache=UnitCache(tmp_path / "c")
    )
    drawn = 0
    for targets, again in zip(batch_rows(source), batch_rows(cached), strict=True):
        assert targets.mc_count is not None
        assert targets.mc_log_p is not None
        assert targets.base_log_p is not None
        assert targets.student_topk_logprobs is not None
        assert again.mc_log_p is not None
        assert again.base_log_p is not None
        assert torch.equal(again.mc_log_p, targets.mc_log_p)
        assert torch.equal(again.base_log_p.nan_to_num(9), targets.base_log_p.nan_to_num(9))
        assert (targets.mc_count.sum(1) == 9).all()
        assert torch.equal(targets.mc_count > 0, targets.mc_log_p > -torch.inf)
        assert targets.mc_log_p.isfinite().any(1).all()
        # The student's list, its draws and the base agree if several are stored.
        both = (targets.mc_count > 0) & targets.in_student
        torch.testing.assert_close(
            targets.mc_log_p[both], targets.student_topk_logprobs[both], rtol=1e-3, atol=1e-3
        )
        listed = targets.in_student
        torch.testing.assert_close(
            targets.base_log_p[listed], targets.student_topk_logprobs[listed], rtol=1e-3, atol=1e-3
        )
        assert torch.equal(targets.student_topk_logprobs > -torch.inf, targets.in_student)
        assert targets.base_token_lp is not None
        assert torch.equal(targets.base_token_lp, targets.student_logprobs)
        drawn += int((targets.mc_count > 0).sum())
    assert drawn == sum(len(u.rollouts.draws.ids) for u in units if u.rollouts.draws)


def test_batches_have_the_base_and_may_be_partial(tmp_path: Path) -> None:
    units = [make_unit(seed) for seed in range(3)]
    store = with_base(tmp_path / "s", units, 2)
    which = {"snapshot": store.head(), "rollouts": "main", "teacher": "big", "base": "root"}
    with pytest.raises(IncompleteError, match="have no scores of 'root'"):
        list(batches(store, **which, pack_length=64))
    rows = list(batches(store, **which, pack_length=64, partial=True))
    assert all(row.targets.base_log_p is not None for row in rows)
    assert sum(len(row.targets) for row in rows) == sum(u.rollouts.positions for u in units[:2])


def test_batches_takes_the_arguments_of_planned() -> None:
    ours, planned_ = (signature(each).parameters for each in (batches, planned))
    process = {"rank", "world"}
    assert {name: ours[name] for name in ours if name not in process} == dict(planned_)


def test_sequences_and_positions_count_from_zero(tmp_path: Path) -> None:
    lengths = [3, 1, 4, 0, 5, 2]
    store = make_store(tmp_path / "s", [make_unit(0, lengths=lengths)])
    source = PackSource(store, store.head(), "main", "big")
    members = np.asarray([[0, 4], [0, 3], [0, 0], [0, 5]])
    targets = source.pack(members).targets
    assert targets.sequence is not None
    assert targets.position is not None
    assert targets.sequence.tolist() == [0] * 5 + [2] * 3 + [3] * 2
    assert targets.position.tolist() == [*range(5), *range(3), *range(2)]
    assert targets.mc_count is None
    assert targets.base_log_p is None
    assert targets.reward is None
    part = targets.at(torch.tensor([1, 6])).to("cpu")
    assert part.position is not None
    assert part.mc_count is None
    assert part.position.tolist() == [1, 1]


def test_a_row_has_the_reward_of_its_sequence(tmp_path: Path) -> None:
    unit = make_unit(0, lengths=[3, 1, 4, 0, 5, 2])
    reward = np.asarray([0, 0.25, 1, 0.5, 0.75, 0.125], np.float32)
    graded = replace(unit, rollouts=replace(unit.rollouts, reward=reward))
    store = make_store(tmp_path / "s", [graded])
    members = np.asarray([[0, 4], [0, 3], [0, 0]])
    for cache in (None, UnitCache(tmp_path / "c")):
        source = PackSource(store, store.head(), "main", "big", cache=cache)
        found = source.pack(members).targets.reward
        assert found is not None
        assert (found.dtype, found.tolist()) == (torch.float32, [0.75] * 5 + [0.0] * 3)
        empty = source.pack(members[:0]).targets.reward
        assert empty is not None
        assert empty.shape == (0,)


def test_a_row_has_the_rewards_of_all_responses_to_its_prompt(tmp_path: Path) -> None:
    """Pack one of the two responses to each prompt: the others count too."""
    unit = make_unit(0, lengths=[3, 1, 4, 0, 5, 2])
    reward = np.asarray([0, 0.25, 1, 0.5, 0.75, 0.125], np.float32)
    graded = replace(unit, rollouts=replace(unit.rollouts, reward=reward))
    single = replace(unit.rollouts, reward=reward, seq_prompt=np.asarray([0, 0, 1, 2, 2, 2], "u4"))
    store = make_store(tmp_path / "s", [graded, replace(unit, rollouts=single)])
    for cache in (None, UnitCache(tmp_path / "c")):
        source = PackSource(store, store.head(), "main", "big", cache=cache)
        targets = source.pack(np.asarray([[0, 1], [0, 2], [0, 4]])).targets
        mean, std = targets.require("reward_mean"), targets.require("reward_std")
        assert mean.tolist() == [0.125] + [0.75] * 4 + [0.4375] * 5
        expected = [0.25 / 2**0.5] + [0.5 / 2**0.5] * 4 + [0.625 / 2**0.5] * 5
        assert std.tolist() == pytest.approx(expected, rel=1e-6)
        alone = source.pack(np.asarray([[1, 2]])).targets
        assert alone.require("reward_std").tolist() == [0.0] * 4
        assert alone.require("reward").equal(alone.require("reward_mean"))
        assert source.pack(np.zeros((0, 2), int)).targets.require("reward_std").shape == (0,)


def with_bounds(unit: Unit) -> Unit:
    """Return the unit with the scores of a teacher that returns top-k log-probs only."""
    most = unit.scores.entropy + np.float32(0.25)
    return replace(unit, scores=replace(unit.scores, entropy_hi=most))


def test_an_exact_entropy_among_intervals_has_width_zero(tmp_path: Path) -> None:
    exact, other = (make_unit(seed, lengths=[3, 1, 4, 0, 5, 2]) for seed in (0, 1))
    store = make_store(tmp_path / "s", [exact, with_bounds(other)])
    members = np.asarray([[0, 0], [1, 2], [0, 4]])
    for cache in (None, UnitCache(tmp_path / "c")):
        source = PackSource(store, store.head(), "main", "big", cache=cache)
        assert source.bounded
        targets = source.pack(members).targets
        assert targets.q_entropy_hi is not None
        width = targets.q_entropy_hi - targets.q_entropy
        torch.testing.assert_close(width, torch.tensor([0.0] * 3 + [0.25] * 4 + [0.0] * 5))
        part = targets.at(torch.tensor([4])).q_entropy_hi
        assert part is not None
        assert torch.equal(part, targets.q_entropy_hi[4:5])
        empty = source.pack(members[:0]).targets.q_entropy_hi
        assert empty is not None
        assert empty.shape == (0,)
    for (segment, chain), size in zip(source.pairs, source.lengths(), strict=True):
        unit = read_unit(store, segment, chain)
        assert 0.7 * size.size_bytes <= unit.size_bytes <= size.size_bytes
    first = source.pairs[0][0]
    alone = PackSource(store, store.head(), "main", "big", only=lambda s: s == first, partial=True)
    assert not alone.bounded
    assert alone.pack(members[:1]).targets.q_entropy_hi is None


def test_a_row_without_sequences_has_the_fields_of_the_others(tmp_path: Path) -> None:
    store = with_base(tmp_path / "s", [make_unit(0, mc_draws=3)], 1)
    empty = PackSource(store, store.head(), "main", "big", base="root").pack(np.zeros((0, 2), int))
    for name in ("mc_count", "mc_log_p", "student_topk_logprobs", "base_log_p"):
        assert getattr(empty.targets, name).shape == empty.targets.ids.shape == (0, 0)


def test_a_base_without_some_units_is_refused(tmp_path: Path) -> None:
    store = with_base(tmp_path / "s", [make_unit(0), make_unit(1)], 1)
    with pytest.raises(IncompleteError, match="1 of 2 units of rollouts 'main' have no") as error:
        PackSource(store, store.head(), "main", "big", base="root")
    assert "--teacher root --teacher-kind base" in error.value.hint
    assert len(PackSource(store, store.head(), "main", "big", base="root", partial=True).pairs) == 1
