"""Every loss over spans against its formula on full logits, and against its same-tokenizer form."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitcask.engine.objectives import Bounds, Objective, parse_objective
from logitcask.engine.objectives.presets import SPAN_PRESETS
from logitcask.engine.packing.targets import Targets
from logitcask.engine.training.pack_loss import pack_loss
from tests.engine.objectives.full_rows import make_full
from tests.engine.objectives.full_rows import run as run_rows
from tests.engine.objectives.spans.formulas import (
    FORMULAS,
    Case,
    gold_released,
    sorted_l1,
    targets_of,
)

V, W = 9, 11
VARIANTS = [
    *SPAN_PRESETS,
    "span_advantage(parameter=1)",
    "span_advantage(parameter=0.5)",
    "alm(parameter=1)",
    "alm(parameter=inf)",
    "uld(k=4)",
    "gold(parameter=0.1)",
    "x_token(parameter=2)",
]
SHAPES = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=6)
"""(tokens of the student, of the teacher) of each span; without one of the teacher, a gap."""


def make_case(shapes: list[tuple[int, int]], seed: int, **more: Any) -> Case:
    """Make a response of these spans with random models; the student moved since it sampled."""
    torch.manual_seed(seed)
    random.seed(seed)
    twin = dict(zip(random.sample(range(W), 6), random.sample(range(V), 6), strict=True))
    token: list[int] = []
    of_teacher: list[int] = []
    spans = []
    for n, m in shapes:
        rows = range(len(token), len(token) + n)
        others = range(len(of_teacher), len(of_teacher) + m)
        token += [random.randrange(V) for _ in rows]
        of_teacher += [random.randrange(W) for _ in others]
        if n == m == 1:  # one token of equal bytes
            of_teacher[-1], token[-1] = random.choice(list(twin.items()))
        if m:
            spans.append((list(rows), list(others)))
    live = 2 * torch.randn(len(token), V, dtype=torch.float64)
    given: dict[str, Any] = {
        "live": live,
        "old": live + 0.3 * torch.randn_like(live),
        "teacher": 2 * torch.randn(max(1, len(of_teacher)), W, dtype=torch.float64),
        "kept": [random.randint(1, W) for _ in spans],
    }
    return Case(
        token=token, teacher_token=of_teacher or [0], spans=spans, twin=twin, **(given | more)
    )


def ours(
    objective: Objective, z: Tensor, targets: Targets, **options: Any
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return the engine's loss, metrics and gradient by the logits z [P, V]."""
    z = z.clone().requires_grad_()
    head = torch.eye(z.shape[1], dtype=z.dtype)
    options = {"row_weight": targets.weight, "n_vocab": z.shape[1]} | options
    result = pack_loss(objective, z, head, targets, **options)
    (grad,) = torch.autograd.grad(result.loss, z)
    return result.loss.detach(), result.metrics, grad


def expected(objective: Objective, case: Case) -> tuple[Tensor, Tensor]:
    """Return the loss of the formula and its gradient by the logits."""
    loss, surrogate = torch.zeros(()).double(), case.log_p.sum() * 0
    for g, (rows, _) in enumerate(case.spans):
        weight = case.weight[rows[0]] if case.weight else 1.0
        if case.weight and not all(case.weight[r] for r in rows):
            continue
        formula = FORMULAS[objective.divergence]
        value, moved = formula(case, g, objective.k, objective.parameter or 0.0)
        loss, surrogate = loss + weight * value.detach(), surrogate + weight * moved
    (grad,) = torch.autograd.grad(surrogate, case.leaf)
    return loss, grad


@settings(max_examples=6, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 2**16), masked=st.booleans())
def test_every_loss_is_its_formula(shapes: list[tuple[int, int]], seed: int, masked: bool) -> None:
    for name in VARIANTS:
        objective = parse_objective(name).objective
        case = make_case(shapes, seed, ends=objective.divergence == "gold_bayesian")
        if masked:
            case = replace(case, weight=[float(random.random() > 0.2) for _ in case.token])
        loss, _, grad = ours(objective, case.live, targets_of(case))
        value, truth = expected(objective, case)
        torch.testing.assert_close(loss, value, rtol=1e-9, atol=1e-11, msg=name)
        torch.testing.assert_close(grad, truth, rtol=1e-8, atol=1e-11, msg=name)


@settings(max_examples=10, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 2**16))
def test_the_sorted_distance_lies_between_its_bounds(
    shapes: list[tuple[int, int]], seed: int
) -> None:
    case, uld = make_case(shapes, seed), parse_objective("uld(k=4)").objective
    p, q = case.live.softmax(-1), case.teacher.softmax(-1)
    for g in range(len(case.spans)):
        r, j = case.row(g)
        alone = torch.zeros(len(p)).double().index_fill(0, torch.tensor([r]), 1.0)
        low, metrics, _ = ours(uld, case.live, targets_of(case), row_weight=alone)
        exact = sorted_l1(p[r], q[j])
        assert low - 1e-12 <= exact <= low + metrics["span/uld_width"][r] + 1e-12


@pytest.mark.parametrize(
    ("over_spans", "of_rows"),
    [
        ("span_advantage", "sampled_token"),
        ("simct", "teacher_topk"),
        ("gold", "teacher_topk(divergence=jsd)"),
        ("gold_bayesian(parameter=0.2)", "teacher_topk(divergence=jsd,parameter=0.2)"),
        ("x_token(parameter=3)", "kd(temperature=3)"),
    ],
)
@pytest.mark.parametrize("stored", ["ordinary", "spans"])
def test_with_one_tokenizer_it_is_its_loss_of_rows(
    over_spans: str, of_rows: str, stored: str
) -> None:
    torch.manual_seed(2)
    live, teacher = 2 * torch.randn(2, 6, V, dtype=torch.float64)
    token = torch.randint(0, V, (6,)).tolist()
    full = make_full(live, teacher, kept=V, token=token)
    targets = full.targets if stored == "ordinary" else targets_of(same(live, teacher, token))
    loss, _, grad = ours(parse_objective(over_spans).objective, live, targets)
    row = parse_objective(of_rows, k=None if of_rows == "sampled_token" else V).objective
    result, truth = run_rows(row, full)
    torch.testing.assert_close(loss, result.loss)
    torch.testing.assert_close(grad, truth, rtol=1e-8, atol=1e-12)


def same(live: Tensor, teacher: Tensor, token: list[int]) -> Case:
    """Return a case of one tokenizer whose ids are all stored."""
    rows = range(len(token))
    return Case(
        live=live,
        old=live,
        teacher=teacher,
        token=token,
        teacher_token=token,
        spans=[([r], [r]) for r in rows],
        twin={v: v for v in range(V)},
        kept=[V for _ in rows],
    )


def test_with_one_tokenizer_uld_is_the_sorted_distance_and_alm_of_one_token() -> None:
    torch.manual_seed(3)
    live, teacher = 2 * torch.randn(2, 5, V, dtype=torch.float64)
    token = torch.randint(0, V, (5,)).tolist()
    full = make_full(live, teacher, kept=V, student_k=V, token=token)
    loss, metrics, _ = ours(parse_objective("uld").objective, live, full.targets)
    p, q = live.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(loss, (p.sort(-1)[0] - q.sort(-1)[0]).abs().sum())
    assert metrics["span/uld_width"].abs().max() < 1e-12
    loss, _, _ = ours(parse_objective("alm(parameter=1)").objective, live, full.targets)
    at = torch.arange(5), torch.tensor(token)
    p, q = p[at], q[at]
    binary = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    torch.testing.assert_close(loss, binary.sum())


@pytest.mark.parametrize("name", SPAN_PRESETS)
def test_a_span_that_the_teacher_excludes_has_no_loss(name: str) -> None:
    objective = parse_objective(name).objective
    case = make_case([(1, 1), (2, 1), (1, 2), (1, 0)], 5, ends=name == "gold_bayesian")
    targets = targets_of(case)
    excluded = targets.span_log_q.index_fill(0, torch.tensor([1, 2]), -math.inf)
    loss, metrics, grad = ours(objective, case.live, replace(targets, span_log_q=excluded))
    masked = targets.weight.index_fill(0, torch.tensor([1, 2]), 0.0)
    rest, _, truth = ours(objective, case.live, replace(targets, weight=masked))
    assert torch.equal(loss, rest)
    assert torch.equal(grad, truth)
    assert metrics["span/reverse_kl"].isfinite().all()
    broken = case.live.index_fill(0, torch.tensor([0]), math.nan)
    assert ours(objective, broken, targets)[0].isnan(), "a broken student shows"


def value_of(
    name: str, q: list[float], p: list[float], k: int = 1, parameter: float | None = None
) -> float:
    """Return a loss of one span of one token: q and p the stored, best probabilities."""
    z = torch.tensor([[*p, 1 - sum(p)] if sum(p) < 1 else p], dtype=torch.float64).log()
    lists = [(v, math.log(q[v]) if v < len(q) else -math.inf, v) for v in range(len(p))]
    lists += [(-1, math.log(q[v]), v) for v in range(len(p), len(q))]
    full = make_case([(1, 1)], 0)
    targets = targets_of(full).at(torch.tensor([0]))
    width = len(lists)
    at = torch.tensor([[each[i] for each in lists] for i in (0, 1, 2)], dtype=torch.float64)
    targets = replace(
        targets,
        token=torch.tensor([0]),
        token_col=torch.tensor([0]),
        ids=at[0][None].long(),
        q_log_p=at[1][None],
        q_rank=at[2][None].long(),
        cached=torch.ones(1, width, dtype=torch.bool),
        in_student=torch.ones(1, width, dtype=torch.bool),
        student_topk_logprobs=torch.zeros(1, width),
        n_kept=torch.tensor([len(q)]),
        span_log_q=torch.tensor([math.log(q[0])], dtype=torch.float64),
    )
    objective = Objective(
        support="spans",
        divergence=name,
        tail="ignore",
        estimator="spans",
        k=k,
        parameter=parameter,
    )
    return float(ours(objective, z, targets)[0])


def test_values_by_hand() -> None:
    """ALM: l_q = -0.6, l_p = -1.2."""
    assert value_of("uld", [0.5, 0.5], [0.7, 0.2, 0.1], k=3) == pytest.approx(0.6)
    assert value_of("uld", [0.7, 0.3], [0.3, 0.7], k=2) == pytest.approx(0.0)
    assert value_of("uld", [0.7], [0.5], k=1) == pytest.approx(0.4)
    p, q = [math.exp(-1.2)], [math.exp(-0.6)]
    for tau, value in ((1.0, 0.131898), (100.0, 0.183560), (math.inf, 0.184112)):
        assert value_of("alm", q, p, parameter=tau) == pytest.approx(value, abs=1e-6)


def test_spans_are_sums_of_their_tokens() -> None:
    """Text abc of the student's ab, c and the teacher's a, b, c: spans ab and c."""
    log_p, log_q = [-0.5, -0.3], [-0.2, -0.4, -0.1]
    case = make_case([(1, 2), (1, 1)], 0)
    z = torch.full((2, V), -50.0).double()
    for r, value in enumerate(log_p):
        z[r] = math.log((1 - math.exp(value)) / (V - 1))
        z[r, case.token[r]] = value
    whole = torch.tensor([sum(log_q[:2]), log_q[2]], dtype=torch.float64)
    targets = replace(targets_of(case), span_log_q=whole)
    objective = parse_objective("span_advantage").objective
    for weight, advantage in (([1.0, 0.0], -0.1), ([0.0, 1.0], 0.2)):
        loss, metrics, grad = ours(objective, z, targets, row_weight=torch.tensor(weight).double())
        assert float(loss) == pytest.approx(-advantage)
        row = weight.index(1.0)
        p = math.exp(log_p[row])
        assert float(grad[row, case.token[row]]) == pytest.approx(-advantage * (1 - p))
    assert metrics["span/reverse_kl"].tolist() == pytest.approx([0.1, -0.2])


def test_merged_distributions() -> None:
    """Compare both merges with the release, which has another probability of the tokens.

    The rows predict the tokens 0 and 1 of a span, and the one after it.
    """
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    observed, bayesian = probs[0] * probs[1, 1], probs[1] * probs[0, 0]
    torch.testing.assert_close(observed, torch.tensor([0.3, 0.15, 0.05]))
    torch.testing.assert_close(bayesian, torch.tensor([0.12, 0.30, 0.18]))
    assert observed[0] == bayesian[1] == probs[0, 0] * probs[1, 1]
    released = gold_released(probs, [0, 1])
    torch.testing.assert_close(released, probs[1] * probs[2, 1])
    assert (released - observed).abs().max() > 0.2


def test_equal_next_tokens_of_two_vocabularies_are_other_events() -> None:
    """Take a teacher of a .2, ab .5, b .3 and a student that writes the same texts."""
    q = {"a": 0.2, "ab": 0.5, "b": 0.3}
    first_byte = {c: sum(v for text, v in q.items() if text[0] == c) for c in "ab"}
    assert math.log(q["a"]) == pytest.approx(-1.6094, abs=1e-4)
    gap = math.log(first_byte["a"]) - math.log(q["a"])
    assert gap == pytest.approx(1.2528, abs=1e-4)
    # p = .7, .3 is that student: a loss of the shared ids is not zero there.
    assert value_of("simct", [0.2, 0.3], [0.7, 0.3], k=1) > 0.05


@pytest.mark.parametrize("name", ["uld", "span_advantage"])
def test_terms_of_the_sampled_token_are_added(name: str) -> None:
    case = make_case([(2, 1), (1, 0), (1, 1), (1, 2)], 7, weight=[1.0, 1.0, 0.5, 0.0, 1.0])
    targets = replace(
        targets_of(case), reward=torch.full((5,), 0.75), reward_mean=torch.full((5,), 0.5)
    )
    alone, _, grad = ours(parse_objective(name).objective, case.live, targets)
    objective = parse_objective(f"{name}+ce(weight=0.3)+reward(weight=2)").objective
    loss, metrics, d = ours(objective, case.live, targets)
    at = torch.arange(5), torch.tensor(case.token)
    weight = targets.weight
    nll = -case.live.log_softmax(-1)[at]
    torch.testing.assert_close(metrics["loss/ce"], nll)
    torch.testing.assert_close((weight * metrics["loss/distill"]).sum(), alone)
    torch.testing.assert_close(loss, alone + (weight * (0.3 * nll - 2 * 0.25)).sum())
    score = -case.live.softmax(-1)
    score[at] += 1
    torch.testing.assert_close(d, grad - (weight * (0.3 + 2 * 0.25))[:, None] * score)


def test_a_bound_skips_spans_of_rows_that_moved() -> None:
    case = make_case([(2, 1), (1, 1), (1, 2)], 9)
    moved = case.old.log_softmax(-1)[torch.arange(4), torch.tensor(case.token)].clone()
    live_lp = case.live.log_softmax(-1)[torch.arange(4), torch.tensor(case.token)]
    moved[:] = live_lp
    moved[1] += 2.0
    targets = replace(targets_of(case), student_logprobs=moved)
    objective = parse_objective("span_advantage").objective
    skip = Bounds(action="skip", max_drift=0.1)
    loss, metrics, grad = ours(objective, case.live, targets, bounds=skip)
    left = torch.tensor([0.0, 0.0, 1.0, 1.0]).double()
    rest, _, truth = ours(objective, case.live, targets, row_weight=left)
    assert metrics["cache/skipped_share"].tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(loss, rest)
    torch.testing.assert_close(grad, truth)


def test_importance_weighs_a_span_by_the_ratio_of_its_whole_text() -> None:
    plain = parse_objective("span_advantage").objective
    for cap in (0.0, 1.1):
        case = make_case([(3, 2)], 5)
        targets = targets_of(case)
        weighted = parse_objective(f"span_advantage+importance(cap={cap})").objective
        (loss, _, grad), (more, _, moved) = (
            ours(each, case.live, targets) for each in (plain, weighted)
        )
        token = torch.tensor(case.token)[:, None]
        now, then = (z.log_softmax(1).gather(1, token).sum() for z in (case.live, case.old))
        ratio = min(float((now - then).exp()), cap or math.inf)
        assert ratio != 1
        torch.testing.assert_close(more, ratio * loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(moved, ratio * grad, rtol=1e-6, atol=1e-9)
