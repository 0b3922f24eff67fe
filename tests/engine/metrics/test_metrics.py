"""Every metric: a value worked by hand, its range, and that the order of ids does not matter."""

import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitcask.engine.metrics.metrics import (
    COMMON_METRICS,
    LOG_RATIO_BOUND,
    METRICS,
    TEACHER_WIDTH,
    Metric,
    MetricInput,
    compute_metrics,
    metric_input,
)
from logitcask.engine.packing.targets import Targets
from logitcask.kernels.fused_objective import OverlapSums
from logitcask.kernels.objective_input import ObjectiveInput
from tests.engine.objectives.full_rows import Full, make_full

# Ids 0..5. The live student's top-3 is {0, 1, 2}, the teacher's {1, 0, 3}; they share {0, 1}.
P = [0.4, 0.3, 0.15, 0.05, 0.06, 0.04]
Q = [0.2, 0.5, 0.05, 0.15, 0.06, 0.04]
OLD = [0.5, 0.1, 0.05, 0.05, 0.2, 0.1]
# Stored: the old student's top-2 {0, 4}, the teacher's top-3, and the sampled token 5.
BY_HAND = {
    "overlap/ratio": 2 / 3,
    "overlap/mass_student": 0.7,
    "overlap/mass_teacher": 0.7,
    # p- = (4/7, 3/7), q- = (2/7, 5/7): -(1/2) [4/7 log 2 + 3/7 log(3/5)]
    "overlap/advantage": -0.5 * (4 / 7 * math.log(2) + 3 / 7 * math.log(0.6)),
    "overlap/empty_share": 0.0,
    "entropy/student": -sum(p * math.log(p) for p in P),
    "entropy/teacher": -sum(q * math.log(q) for q in Q),
    "entropy/gap": abs(sum(p * math.log(p) for p in P) - sum(q * math.log(q) for q in Q)),
    # Cached {0, 4, 1, 3}: p = (0.4, 0.06, 0.3, 0.05), q = (0.2, 0.06, 0.5, 0.15), and the others
    # have p = 0.15 + 0.04, q = 0.05 + 0.04.
    "kl/reverse_bound": 0.4 * math.log(2)
    + 0.3 * math.log(0.6)
    + 0.05 * math.log(1 / 3)
    + 0.19 * math.log(0.19 / 0.09),
    "kl/forward_bound": 0.2 * math.log(0.5)
    + 0.5 * math.log(5 / 3)
    + 0.15 * math.log(3)
    + 0.09 * math.log(0.09 / 0.19),
    "top1/agreement": 0.0,
    "nll/student": -math.log(0.04),
    "cache/coverage": 0.4 + 0.06 + 0.3 + 0.05,
    "cache/uncached_mass": 0.15,
    "cache/approx_kl": 0.04 / 0.1 - 1 - math.log(0.04 / 0.1),
}
# A mixture is made, with its bounds, in packing; tests/engine/packing/test_mixture.py has them.
OF_MIXTURES = {"mixture/width": 0.25, "mixture/missing_mass": 0.125}


def row(probs: list[float]) -> Tensor:
    return torch.tensor([probs], dtype=torch.float64).log()


def view_of(full: Full, k: int) -> ObjectiveInput:
    log_p = full.live.log_softmax(-1)
    ids = full.targets.ids
    at = torch.where(ids < 0, -math.inf, log_p.gather(1, ids.clamp(min=0)))
    top, top_ids = log_p.sort(dim=-1, descending=True, stable=True)
    entropy = -torch.where(log_p == -math.inf, 0.0, log_p.exp() * log_p).sum(-1)
    return ObjectiveInput(torch.arange(len(ids)), at, top_ids[:, :k], top[:, :k], entropy)


def by_hand(kept: int = 3) -> Full:
    return make_full(row(P), row(Q), old=row(OLD), student_k=2, kept=kept, token=5)


@pytest.mark.parametrize("name", COMMON_METRICS)
def test_by_hand(name: str) -> None:
    full = by_hand()
    value = compute_metrics(view_of(full, 6), full.targets, k=3)[name]
    assert value.tolist() == pytest.approx([BY_HAND[name]], abs=1e-12)


def test_every_metric_has_a_value_by_hand() -> None:
    assert {*BY_HAND, *OF_MIXTURES, TEACHER_WIDTH} == {*METRICS}
    targets = replace(
        by_hand().targets,
        mixture_width=torch.tensor([0.25]),
        mixture_missing=torch.tensor([0.125]),
    )
    found = compute_metrics(view_of(by_hand(), 6), targets, k=3)
    assert {name: found[name].item() for name in OF_MIXTURES} == OF_MIXTURES


def test_overlap_uses_the_kept_ids_of_a_short_row() -> None:
    """Expect a ratio of 1, not 2/3: the teacher kept {1, 0} only, and both top-2 are {0, 1}."""
    full = by_hand(kept=2)
    x = metric_input(view_of(full, 6), full.targets, 3)
    assert x.k.tolist() == [2]
    assert METRICS["overlap/ratio"].compute(x).tolist() == [1.0]
    # Kept {1} only: p's best is 0. Nothing in common.
    full = by_hand(kept=1)
    values = compute_metrics(view_of(full, 6), full.targets, k=3)
    assert values["overlap/ratio"].tolist() == [0.0]
    assert values["overlap/empty_share"].tolist() == [1.0]
    assert values["overlap/advantage"].tolist() == [0.0]


def test_a_sampled_token_in_neither_list_counts_as_not_stored() -> None:
    """Exclude the token's stored log-prob, which depends on the draw, from the coverage."""
    full = make_full(row(P), row(Q), old=row(OLD), student_k=2, kept=3, token=2)
    values = compute_metrics(view_of(full, 6), full.targets, k=3)
    assert values["cache/uncached_mass"].tolist() == pytest.approx([0.15])
    assert values["cache/coverage"].tolist() == pytest.approx([BY_HAND["cache/coverage"]])


def test_drift_is_bounded_and_its_mean_is_the_kl_of_the_two_students() -> None:
    live, old = row(P), row(OLD)
    mean = 0.0
    for y in range(6):
        full = make_full(live, row(Q), old=old, token=y)
        mean += OLD[y] * compute_metrics(view_of(full, 6), full.targets)["cache/approx_kl"].item()
    assert mean == pytest.approx(sum(o * math.log(o / p) for o, p in zip(OLD, P, strict=True)))
    full = by_hand()
    far = replace(full.targets, student_logprobs=torch.tensor([-1e4], dtype=torch.float64))
    drift = compute_metrics(view_of(full, 6), far)["cache/approx_kl"].item()
    assert drift == pytest.approx(math.exp(LOG_RATIO_BOUND) - 1 - LOG_RATIO_BOUND)


@st.composite
def fulls(draw: st.DrawFn) -> Full:
    rows, vocab = draw(st.integers(1, 4)), draw(st.integers(3, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    sides = []
    for _ in range(3):
        z = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 3
        if draw(st.booleans()):
            z = z.round()
        if draw(st.booleans()):
            z[:, draw(st.integers(1, vocab - 1))] = -math.inf
        sides.append(z)
    live, old, teacher = sides
    if draw(st.booleans()):
        teacher = torch.where(live == -math.inf, live, -live)
    each = {"min_size": rows, "max_size": rows}
    # A sampled token was possible for the student that sampled it.
    token = old.argmax(-1).tolist()
    kept = draw(st.lists(st.integers(1, vocab), **each))  # type: ignore[arg-type]
    return make_full(
        live, teacher, old=old, student_k=draw(st.integers(1, 18)), kept=kept, token=token
    )


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(full=fulls(), k=st.integers(1, 20))
def test_ranges(full: Full, k: int) -> None:
    v = compute_metrics(view_of(full, k), full.targets, k=k)
    excluded = full.live.gather(1, full.targets.token[:, None])[:, 0] == -math.inf
    assert (v["nll/student"].isposinf() == excluded).all()
    assert all(value.isfinite().all() for name, value in v.items() if name != "nll/student")
    assert all(value.shape == (len(full.live),) for value in v.values())
    slack = 1e-12
    for name in (
        "overlap/ratio",
        "overlap/mass_student",
        "overlap/mass_teacher",
        "overlap/empty_share",
        "cache/coverage",
        "cache/uncached_mass",
    ):
        assert ((v[name] >= 0) & (v[name] <= 1 + slack)).all(), name
    assert (v["overlap/advantage"] <= slack).all()
    assert (v["cache/approx_kl"] >= 0).all()
    assert (v["nll/student"] >= -slack).all()
    assert v["top1/agreement"].bool().logical_or(v["top1/agreement"] == 0).all()
    log_p, log_q = full.live.log_softmax(-1), full.teacher.log_softmax(-1)
    for name, a, b in (("forward", log_q, log_p), ("reverse", log_p, log_q)):
        whole = torch.where(a == -math.inf, 0.0, a.exp() * (a - b)).sum(-1)
        bound = v[f"kl/{name}_bound"]
        assert (bound >= -slack).all()
        assert (bound <= whole + 1e-11).all(), name
    top = math.log(full.live.shape[1]) + slack
    assert (v["entropy/gap"] <= top).all()
    # Ids in the overlap are stored; missing ids of the top-k are not.
    assert (v["overlap/mass_student"] <= v["cache/coverage"] + slack).all()
    assert (v["cache/uncached_mass"] + v["cache/coverage"] <= 1 + slack).all()
    empty = v["overlap/empty_share"] == 1
    assert ((v["overlap/ratio"] == 0) == empty).all()
    assert (v["overlap/advantage"][empty] == 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_bounds_of_the_kl_are_the_kl_where_every_id_is_kept(seed: int) -> None:
    live, teacher = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(seed)).double() * 3
    log_p, log_q = live.log_softmax(-1), teacher.log_softmax(-1)
    every = make_full(live, teacher, kept=9)
    v = compute_metrics(view_of(every, 9), every.targets)
    forward = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    reverse = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(v["kl/forward_bound"], forward, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(v["kl/reverse_bound"], reverse, rtol=1e-11, atol=1e-13)
    # More kept ids are a finer partition.
    few = make_full(live, teacher, kept=3)
    w = compute_metrics(view_of(few, 9), few.targets)
    for name in ("kl/forward_bound", "kl/reverse_bound"):
        assert (w[name] <= v[name] + 1e-13).all()
        assert (w[name] < v[name] - 1e-3).any()
    same = make_full(live, live, kept=3)
    same_v = compute_metrics(view_of(same, 9), same.targets)
    assert same_v["kl/forward_bound"].abs().max() < 1e-13
    assert same_v["kl/reverse_bound"].abs().max() < 1e-13
    assert same_v["top1/agreement"].tolist() == [1.0] * 5


def test_a_side_without_mass_leaves_the_bounds_finite() -> None:
    """Put ids that one side excludes into the bucket; drop a bucket that the teacher excludes."""
    live, teacher = row(P), row(Q)
    gone = teacher.clone()
    gone[0, 2:] = -math.inf
    for kept in (1, 2, 6):
        full = make_full(live, gone, student_k=1, kept=kept)
        v = compute_metrics(view_of(full, 6), full.targets)
        assert v["kl/reverse_bound"].isfinite().all()
        # KL(q || p) of q = (2/7, 5/7) is finite: p has mass there.
        whole = 2 / 7 * math.log(2 / 7 / 0.4) + 5 / 7 * math.log(5 / 7 / 0.3)
        assert 0 <= v["kl/forward_bound"].item() <= whole + 1e-12


def test_the_bounds_hold_for_the_interval_of_a_tail() -> None:
    """Take the rounded sum of returned top ids: the teacher's tail is anywhere from 0 to 1e-6."""
    live, sure = row(P), torch.tensor([[20.0, 18, 0, 0, -1, -2]], dtype=torch.float64)
    log_p, log_q = live.log_softmax(-1), sure.log_softmax(-1)
    full = make_full(live, sure, student_k=1, kept=2)
    wide = replace(full.targets, q_log_tail=torch.tensor([1e-6], dtype=torch.float64).log())
    assert full.targets.q_log_tail.exp().item() < 1e-7
    v = compute_metrics(view_of(full, 6), wide)
    exact = compute_metrics(view_of(full, 6), full.targets)
    for name, a, b in (("forward", log_q, log_p), ("reverse", log_p, log_q)):
        whole = (a.exp() * (a - b)).sum().item()
        assert 0 <= v[f"kl/{name}_bound"].item() <= whole + 1e-5
        assert v[f"kl/{name}_bound"].item() <= exact[f"kl/{name}_bound"].item() + 1e-5


def test_agreement_is_of_the_best_ids_alone() -> None:
    swapped = [Q[1], Q[0], *Q[2:]]
    for teacher, expected in ((Q, 0.0), (swapped, 1.0)):
        for kept in (1, 3):
            full = make_full(row(P), row(teacher), old=row(OLD), student_k=2, kept=kept)
            v = compute_metrics(view_of(full, 6), full.targets, k=1)
            assert v["top1/agreement"].tolist() == [expected]
    # Draws of a teacher do not say which id is its best.
    drawn = make_full(row(P), row(Q), student_k=2, q_draws=[{0: 1, 1: 2}])
    found = compute_metrics(view_of(drawn, 6), drawn.targets)
    assert "top1/agreement" not in found
    assert {"kl/forward_bound", "kl/reverse_bound", "nll/student"} <= found.keys()


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(full=fulls(), k=st.integers(1, 20), seed=st.integers(0, 1000))
def test_names_and_columns_of_ids_do_not_matter(full: Full, k: int, seed: int) -> None:
    """Keep every metric under a permutation of ids and columns."""
    generator = torch.Generator().manual_seed(seed)
    view, targets = view_of(full, k), full.targets
    vocab, width = full.live.shape[1], targets.ids.shape[1]
    renamed = torch.randperm(vocab, generator=generator)
    column = torch.randperm(width, generator=generator)

    def rename(ids: Tensor) -> Tensor:
        return torch.where(ids < 0, ids, renamed[ids.clamp(min=0)])

    changed = {
        f.name: getattr(targets, f.name)[:, column]
        for f in fields(Targets)
        if getattr(targets, f.name) is not None and getattr(targets, f.name).dim() == 2
    }
    changed["ids"] = rename(changed["ids"])
    moved = replace(targets, **changed, token_col=column.argsort()[targets.token_col])
    other = view._replace(log_p=view.log_p[:, column], top_ids=rename(view.top_ids))
    before, after = compute_metrics(view, targets, k=k), compute_metrics(other, moved, k=k)
    for name in COMMON_METRICS:
        torch.testing.assert_close(after[name], before[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize(
    ("low", "high", "gap"), [(0.1, 0.2, 0.1), (0.0, 0.3, 0.0), (-0.5, -0.2, 0.2), (-0.1, 0.1, 0.0)]
)
def test_the_gap_to_an_interval_is_the_distance_to_it(low: float, high: float, gap: float) -> None:
    """Take low and high as the bounds of H(q) minus the student's entropy."""
    full = by_hand()
    view = view_of(full, 6)
    least, most = view.entropy + low, view.entropy + high
    rows = replace(full.targets, q_entropy=least, q_entropy_hi=most)
    found = compute_metrics(view, rows, k=3)
    assert found["entropy/gap"].tolist() == pytest.approx([gap], abs=1e-12)
    assert found["entropy/teacher"].tolist() == least.tolist()
    assert found[TEACHER_WIDTH].tolist() == pytest.approx([high - low], abs=1e-12)
    one = torch.zeros(1, dtype=torch.float64)
    summed = compute_metrics(view, rows, k=3, sums=OverlapSums(*[one] * len(OverlapSums._fields)))
    for name in ("entropy/gap", "entropy/teacher", TEACHER_WIDTH):
        assert torch.equal(summed[name], found[name])
    # A lower bound for every H(q) in the interval.
    for share in (0.0, 0.5, 1.0):
        exact = replace(full.targets, q_entropy=least + share * (most - least))
        alone = compute_metrics(view, exact, k=3)
        assert TEACHER_WIDTH not in alone
        assert alone["entropy/gap"].item() >= found["entropy/gap"].item() - 1e-12


def test_swapping_student_and_teacher() -> None:
    """Keep overlap and gap, which are symmetric, and exchange the masses."""
    one = make_full(row(P), row(Q), student_k=6, kept=6)
    two = make_full(row(Q), row(P), student_k=6, kept=6)
    a = compute_metrics(view_of(one, 6), one.targets, k=3)
    b = compute_metrics(view_of(two, 6), two.targets, k=3)
    for first, second in (
        ("overlap/ratio", "overlap/ratio"),
        ("entropy/gap", "entropy/gap"),
        ("overlap/mass_student", "overlap/mass_teacher"),
        ("entropy/student", "entropy/teacher"),
        ("kl/forward_bound", "kl/reverse_bound"),
        ("kl/reverse_bound", "kl/forward_bound"),
        ("top1/agreement", "top1/agreement"),
    ):
        torch.testing.assert_close(a[first], b[second], rtol=1e-12, atol=0)
    assert a["overlap/advantage"].item() != pytest.approx(b["overlap/advantage"].item())


def test_a_new_metric_is_an_entry_of_the_table_alone() -> None:
    """Compute it from the sums of fused kernels if possible, otherwise with its function."""
    calls: list[str] = []

    def plain(name: str) -> Callable[[MetricInput], Tensor]:
        def shared(x: MetricInput) -> Tensor:
            calls.append(name)
            return x.n_shared.to(x.log_q.dtype)

        return shared

    table = {
        "scratch/summed": Metric(plain("summed"), lambda sums: sums.shared),
        "scratch/plain": Metric(plain("plain")),
        "scratch/absent": Metric(plain("absent"), needs="reward"),
    }
    full = by_hand()
    view = view_of(full, 6)
    first = compute_metrics(view, full.targets, k=3, table=table)
    assert calls == ["summed", "plain"]
    shared = torch.tensor([2.0], dtype=torch.float64)
    sums = OverlapSums(*[shared] * len(OverlapSums._fields))
    second = compute_metrics(view, full.targets, k=3, sums=sums, table=table)
    assert calls == ["summed", "plain", "plain"]
    assert list(first) == list(second) == ["scratch/summed", "scratch/plain"]
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
