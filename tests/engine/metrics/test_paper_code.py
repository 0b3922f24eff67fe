"""The released code's metrics: by hand, pooled over rows, in range, for every order of ids."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitcask.engine.metrics.paper_code import METRICS_RELEASED, Pair, released_metrics
from logitcask.engine.packing.targets import Targets
from tests.engine.metrics.test_metrics import OLD, P, Q, by_hand, fulls, row, view_of
from tests.engine.objectives.full_rows import Full, make_full, ranking

# As in test_metrics: S(p) = {0, 1, 2}, S(q) = {1, 0, 3}. Of S(p), id 2 has no stored log q.
TOP = 0.4 + 0.3 + 0.15
A = [-(p / TOP) * math.log(p / q) for p, q in zip(P, Q, strict=True)]
BY_HAND = {
    "overlap/advantage_released": (A[0] + A[1], 2),
    "overlap/mass_student_released": (0.7, 1),
    "overlap/mass_teacher_released": (0.7, 1),
    "advantage/student_only_released": (0.0, 0),
    # |A| = 0.326 at id 0 and 0.180 at id 1.
    "extrema/p_minus_q": (0.4 - 0.2, 1),
}


def values(pair: Pair) -> tuple[list[float], list[float]]:
    return pair[0].tolist(), pair[1].tolist()


@pytest.mark.parametrize("name", METRICS_RELEASED)
def test_by_hand(name: str) -> None:
    full = by_hand()
    total, count = values(released_metrics(view_of(full, 6), full.targets, k=3)[name])
    assert (total, count) == (pytest.approx([BY_HAND[name][0]], abs=1e-12), [BY_HAND[name][1]])


def test_an_id_in_the_students_top_k_alone_counts_if_its_score_is_stored() -> None:
    """Score all six ids of the old student's top-k."""
    full = make_full(row(P), row(Q), old=row(OLD), student_k=6, kept=3)
    pairs = released_metrics(view_of(full, 6), full.targets, k=3)
    total, count = values(pairs["advantage/student_only_released"])
    assert (total, count) == (pytest.approx([-(0.15 / TOP) * math.log(3)]), [1.0])
    # Its |A| is 0.194: id 0 stays the extreme.
    assert values(pairs["extrema/p_minus_q"])[0] == pytest.approx([0.2])


def test_rows_without_an_overlap_do_not_count() -> None:
    """Share no id: the teacher kept {1} alone, and the student's best is 0."""
    full = by_hand(kept=1)
    pairs = released_metrics(view_of(full, 6), full.targets, k=3)
    for name in BY_HAND:
        if name.startswith("overlap/"):
            assert values(pairs[name]) == ([0.0], [0.0]), name
    # k' = 1: p~ of id 0 is 1, and its log q is stored, because it is in the old student's top-k.
    total, count = values(pairs["advantage/student_only_released"])
    assert (total, count) == (pytest.approx([-math.log(2)]), [1.0])


def by_lists(full: Full, k: int) -> dict[str, list[tuple[float, int]]]:
    """Return the same metrics from full distributions, over Python lists of ids."""
    log_p, log_q = full.live.log_softmax(-1), full.teacher.log_softmax(-1)
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in METRICS_RELEASED}
    for r in range(len(log_p)):
        p, q = log_p[r].exp().tolist(), log_q[r].exp().tolist()
        at = max(1, min(k, int(full.targets.n_kept[r])))
        ours, theirs = ranking(full.live[r])[:at], ranking(full.teacher[r])[:at]
        stored = full.targets.ids[r][full.targets.cached[r]].tolist()
        top = math.fsum(p[v] for v in ours)
        adv = {
            v: -(p[v] / top) * (math.log(p[v]) - math.log(q[v]))
            for v in ours
            if v in stored and p[v] > 0 and q[v] > 0
        }
        both = [v for v in ours if v in theirs]
        inside, alone = ([v for v in adv if (v in both) == side] for side in (True, False))
        one = int(bool(both))
        best = max(adv, key=lambda v: abs(adv[v]), default=None)
        row_of = {
            "overlap/advantage_released": (math.fsum(adv[v] for v in inside), len(inside)),
            "overlap/mass_student_released": (math.fsum(p[v] for v in both), one),
            "overlap/mass_teacher_released": (math.fsum(q[v] for v in both), one),
            "advantage/student_only_released": (math.fsum(adv[v] for v in alone), len(alone)),
            "extrema/p_minus_q": (0.0, 0) if best is None else (p[best] - q[best], 1),
        }
        for name, pair in row_of.items():
            found[name].append(pair)
    return found


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(full=fulls(), k=st.integers(1, 20))
def test_as_from_whole_distributions_and_in_range(full: Full, k: int) -> None:
    k = min(k, full.live.shape[1])
    found = released_metrics(view_of(full, k), full.targets, k=k)
    for name, pairs in by_lists(full, k).items():
        total, count = values(found[name])
        assert total == pytest.approx([t for t, _ in pairs], rel=1e-9, abs=1e-12), name
        assert count == [c for _, c in pairs], name
        mean = found[name][0] / found[name][1].clamp(min=1)
        if "mass" in name:
            assert ((mean >= 0) & (mean <= 1 + 1e-12)).all(), name
    assert (found["extrema/p_minus_q"][0].abs() <= 1).all()


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(full=fulls(), k=st.integers(1, 20), seed=st.integers(0, 1000))
def test_the_order_of_columns_does_not_matter(full: Full, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    view, targets = view_of(full, k), full.targets
    column = torch.randperm(targets.ids.shape[1], generator=generator)

    def shuffled(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dim() == 1 else x[:, column]

    changed: dict[str, Any] = {
        f.name: shuffled(getattr(targets, f.name)) for f in fields(Targets) if f.name != "token_col"
    }
    moved = replace(targets, **changed, token_col=column.argsort()[targets.token_col])
    other = view._replace(log_p=view.log_p[:, column])
    before, after = (released_metrics(*each, k=k) for each in ((view, targets), (other, moved)))
    for name in METRICS_RELEASED:
        torch.testing.assert_close(after[name], before[name], rtol=1e-12, atol=1e-14, msg=name)
