"""Terms of the sampled token: their formulas, their means over draws, and what is rejected.

The expected results are in float64 over the whole vocabulary, by autograd; the means are over every
sequence that a small student can draw. They share no code with the engine.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives import (
    PRESETS,
    Bounds,
    CacheInfo,
    check_exactness,
    current_topk,
    parse_objective,
    row_objective,
    served,
    warnings,
)
from logitcask.engine.objectives.bounds import bounded_metric
from logitcask.engine.objectives.evaluate import is_renormalised, part_names
from logitcask.engine.objectives.modifiers import EXCLUDES, MODIFIERS
from logitcask.engine.objectives.modifiers.terms import later_advantage
from logitcask.engine.training.pack_loss import pack_loss
from logitcask.kernels.sparse_kl import sparse_kl_reference
from tests.engine.objectives.full_rows import Full, make_full, run, truth

P, V = 6, 9
LENGTHS = [4, 1, 1]
"""Sequences of the six rows."""


def logits(seed: int, rows: int = P, vocab: int = V) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


def rows(seed: int = 0, **options: object) -> Full:
    """Make three responses with rewards, whose student has moved since it sampled."""
    live = logits(seed)
    defaults: dict[str, object] = {
        "old": live + 0.4 * logits(seed + 2),
        "student_k": 4,
        "kept": 6,
        "token": [3, 1, 4, 1, 5, 8],
    }
    full = make_full(live, logits(seed + 1), **(defaults | options))  # type: ignore[arg-type]
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    return replace(
        full,
        targets=replace(
            full.targets,
            sequence=sequence,
            position=torch.cat([torch.arange(n) for n in LENGTHS]),
            reward=torch.tensor([1.0, 0.25, 0.0]).double()[sequence],
            reward_mean=torch.tensor([0.5, 0.5, 0.0]).double()[sequence],
            reward_std=torch.tensor([0.7, 0.3, 0.0]).double()[sequence],
        ),
    )


def at_token(x: Tensor, full: Full) -> Tensor:
    """Return x [P] at the sampled token."""
    return x.gather(1, full.targets.token[:, None])[:, 0]


def advantages(name: str, full: Full) -> Tensor:
    """Return [P], the factor of -log p(y) in the term's gradient, from its formula."""
    t, log_old = full.targets, full.old.log_softmax(-1)
    if name.startswith("ce"):
        return torch.ones(P, dtype=torch.float64)
    if name.startswith("reward"):
        a = t.reward - t.reward_mean  # type: ignore[operator]
        a = a / (t.reward_std + 1e-6) if "std" in name else a  # type: ignore[operator]
        ratio = (at_token(full.live.log_softmax(-1) - log_old, full)).exp()
        return a * ratio if "importance" in name else a
    discount = 0.5 if "discount" in name else 1.0
    single = at_token(full.teacher.log_softmax(-1) - log_old, full)
    out = []
    for r in range(P):
        later = [s for s in range(r + 1, P) if t.sequence[s] == t.sequence[r] and t.weight[s] > 0]
        factors = [discount ** (s - r - 1) for s in later]
        total = sum(f * float(single[s]) for f, s in zip(factors, later, strict=True))
        out.append(total if "normalise=false" in name else total / (sum(factors) or 1.0))
    return torch.tensor(out, dtype=torch.float64)


TERMS = [
    *("ce(weight=0.3)", "reward(weight=0.3)", "reward(weight=0.3,std=true)"),
    *("reward(weight=0.3,importance=true)", "return_to_go(weight=0.3)"),
    *("return_to_go(weight=0.3,discount=0.5)", "return_to_go(weight=0.3,normalise=false)"),
]


@pytest.mark.parametrize("base", ["opd", "opd_released", "overlap", "sampled_token", "opd_bucket"])
@pytest.mark.parametrize("term", TERMS)
def test_a_term_adds_its_formula_to_any_objective(base: str, term: str) -> None:
    full = rows()
    full = replace(
        full, targets=replace(full.targets, weight=torch.tensor([1, 1, 0, 1, 1, 1]).double())
    )
    plain = parse_objective(base.removesuffix("_bucket"), k=None if "token" in base else 4)
    own = replace(plain.objective, tail="bucket") if "bucket" in base else plain.objective
    added = parse_objective(f"opd+{term}").objective.modifiers
    objective = replace(own, modifiers=added)
    ours, dz = run(objective, full)
    loss, grad = truth(own, full)
    leaf = full.live.clone().requires_grad_()
    log_p = at_token(leaf.log_softmax(-1), full)
    a = advantages(term, full).detach()
    (d_term,) = torch.autograd.grad((-0.3 * a * log_p).sum(), leaf)
    shown = -log_p.detach() if term.startswith("ce") else -a
    torch.testing.assert_close(ours.row_loss, loss + 0.3 * shown, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(dz, grad + d_term, rtol=1e-9, atol=1e-11)
    name = term.partition("(")[0]
    assert part_names(objective) == ("loss/distill", f"loss/{name}")
    torch.testing.assert_close(ours.metrics["loss/distill"], loss, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.metrics[f"loss/{name}"], shown, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["opd+ce", "overlap+reward", "minillm", "teacher_topk+ce"])
def test_the_head_gets_the_gradient_of_a_term_at_every_id(name: str) -> None:
    """Compare with logits: the op for zero sums would lose the ids outside the support."""
    objective, full = parse_objective(name, k=4).objective, rows()
    assert not is_renormalised(objective)
    states, head = full.live.clone().requires_grad_(), torch.eye(V).double().requires_grad_()
    weight = torch.arange(1, P + 1).double()
    result = pack_loss(
        objective, states, head, full.targets, row_weight=weight, n_vocab=V, metrics_fraction=0.01
    )
    d_states, d_head = torch.autograd.grad(result.loss, (states, head))
    ours, dz = run(objective, full)
    torch.testing.assert_close(result.loss.detach(), (weight * ours.row_loss).sum())
    torch.testing.assert_close(d_states, weight[:, None] * dz)
    torch.testing.assert_close(d_head, (weight[:, None] * dz).T @ full.live)
    assert len(result.measured) == P, "the parts are of every row"
    for part in part_names(objective):
        torch.testing.assert_close(result.metrics[part], ours.metrics[part])


@pytest.mark.parametrize("name", ["opd(k=4)+ce(weight=0.2)", "sampled_token+reward+return_to_go"])
def test_chunks_of_rows_see_the_whole_sequence(name: str) -> None:
    objective, full = parse_objective(name).objective, rows(3)
    fn, k = row_objective(objective, full.targets), current_topk(objective, V)
    whole, dz = sparse_kl_reference(full.live, full.targets.ids, fn, k=k)
    for r in range(P):
        view = torch.tensor([r])

        def one(x: object, view: Tensor = view) -> object:
            return fn(x._replace(index=view))  # type: ignore[attr-defined]

        part, d_part = sparse_kl_reference(full.live[view], full.targets.ids[view], one, k=k)  # type: ignore[arg-type]
        assert float(part.row_loss) == float(whole.row_loss[r])
        assert torch.equal(d_part[0], dz[r])


@pytest.mark.parametrize("name", ["ce", "reward", "return_to_go"])
def test_a_term_descends_and_its_gradient_is_that_of_finite_differences(name: str) -> None:
    """Use the loss -a log p(y) with a fixed, which for ce is the loss itself."""
    full = rows(5)
    objective = parse_objective(f"sampled_token+{name}(weight=1)").objective
    a = advantages(f"{name}(", full)
    dz = run(objective, full)[1] - run(parse_objective("sampled_token").objective, full)[1]

    def value(z: Tensor) -> Tensor:
        return -(a * at_token(z.log_softmax(-1), full))

    step = 1e-5
    for v in range(V):
        moved = torch.zeros(V, dtype=torch.float64)
        moved[v] = step
        slope = (value(full.live + moved) - value(full.live - moved)) / (2 * step)
        torch.testing.assert_close(slope, dz[:, v], rtol=1e-6, atol=1e-9)
    pulled = (dz.abs().amax(-1) > 1e-6).nonzero()[:, 0]
    fallen = value(full.live) - value(full.live - 0.01 * dz)
    assert (fallen[pulled] > 0).all()
    assert len(pulled) >= 3


# Every response of two tokens over three ids, by a student and a teacher that are tables.

TABLES = 4
"""Rows of a table: the first token, and the second after each first."""


def responses(live: Tensor, teacher: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the probabilities [9] of all responses under `live` [4, 3], and the gradient by it
    [9, 4, 3] of the loss summed over both positions.
    """
    pairs = list(product(range(3), repeat=2))
    z = torch.cat([live[[0, 1 + first]] for first, _ in pairs])
    q = torch.cat([teacher[[0, 1 + first]] for first, _ in pairs])
    full = make_full(z, q, student_k=3, kept=3, token=[y for pair in pairs for y in pair])
    sequence = torch.arange(9).repeat_interleave(2)
    position = torch.arange(2).repeat(9)
    targets = replace(full.targets, sequence=sequence, position=position)
    objective = parse_objective(name).objective
    dz = run(objective, replace(full, targets=targets))[1].view(9, 2, 3)
    grads = torch.zeros(9, TABLES, 3, dtype=torch.float64)
    for i, (first, _) in enumerate(pairs):
        grads[i, 0] += dz[i, 0]
        grads[i, 1 + first] += dz[i, 1]
    p = live.log_softmax(-1)
    log_p = torch.stack([p[0, a] + p[1 + a, b] for a, b in pairs])
    return log_p.exp(), grads


@pytest.mark.parametrize("single", ["sampled_token", "opd(k=3)", "opd_released(k=3)"])
def test_with_the_return_the_mean_is_the_kl_of_whole_responses(single: str) -> None:
    """Check Eq.2 and Eq.3 of arXiv 2306.08543: by a draw, or the exact single step; discount 1."""
    live, teacher = logits(1, TABLES, 3), logits(2, TABLES, 3)
    p, grads = responses(live, teacher, f"{single}+return_to_go(normalise=false)")
    mean = torch.einsum("i,itv->tv", p, grads)
    leaf = live.clone().requires_grad_()
    log_p, log_q = leaf.log_softmax(-1), teacher.log_softmax(-1)

    def joint(x: Tensor) -> Tensor:
        return (x[0][:, None] + x[1:]).flatten()

    kl = (joint(log_p).exp() * (joint(log_p) - joint(log_q))).sum()
    (exact,) = torch.autograd.grad(kl, leaf)
    torch.testing.assert_close(mean, exact, rtol=1e-9, atol=1e-12)
    _, without = responses(live, teacher, single)
    assert (torch.einsum("i,itv->tv", p, without) - exact).abs().max() > 1e-2


def test_the_mean_of_the_reward_term_is_the_gradient_of_the_mean_reward() -> None:
    """Draw two responses of one token: a group of n has (1 - 1 / n) times the gradient."""
    live, reward = logits(4, 1, 5), torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0]).double()
    p = live.softmax(-1)[0]
    objective = parse_objective("fixed_advantage+fixed(nats=0)+reward").objective
    mean = torch.zeros(1, 5, dtype=torch.float64)
    for a, b in product(range(5), repeat=2):
        full = make_full(live.expand(2, 5), live.expand(2, 5), student_k=2, kept=2, token=[a, b])
        drawn = reward[[a, b]]
        targets = replace(
            full.targets,
            reward=drawn,
            reward_mean=drawn.mean().expand(2),
            reward_std=drawn.std().expand(2),
        )
        mean += p[a] * p[b] * run(objective, replace(full, targets=targets))[1].mean(0)
    leaf = live.clone().requires_grad_()
    (exact,) = torch.autograd.grad(-(leaf.softmax(-1)[0] * reward).sum(), leaf)
    torch.testing.assert_close(mean, exact / 2, rtol=1e-9, atol=1e-12)


def test_ce_pulls_to_the_policy_that_sampled() -> None:
    """Average over its draws: the gradient of KL(b || p), which is zero as long as p is b."""
    live, old = logits(6, 2), logits(7, 2)
    for behavior in (old, live):
        mean = torch.zeros(2, V, dtype=torch.float64)
        for y in range(V):
            full = make_full(live, old, old=behavior, student_k=2, kept=2, token=y)
            both, alone = (
                run(parse_objective(f"opd(k=2){more}").objective, full)[1]
                for more in ("+ce(weight=1)", "")
            )
            mean += behavior.softmax(-1)[:, y : y + 1] * (both - alone)
        expected = live.softmax(-1) - behavior.softmax(-1)
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)


def test_the_control_reads_no_value_of_the_teacher() -> None:
    """Change all of its values, also to -inf at the sampled token; the mean gradient is zero."""
    objective = PRESETS["fixed_advantage"].objective
    teacher = logits(9)
    teacher[:, 3] = -torch.inf
    one, other = rows(), rows()
    other = make_full(one.live, teacher, old=one.old, student_k=4, kept=6, token=3)
    one = make_full(one.live, logits(11), old=one.old, student_k=4, kept=2, token=3)
    (first, d_first), (second, d_second) = run(objective, one), run(objective, other)
    assert first.row_loss.tolist() == second.row_loss.tolist() == [1.0] * P
    assert torch.equal(d_first, d_second)
    # -c log p(y) with c = -1: the sampled id goes down.
    p = one.live.softmax(-1)
    one_hot = torch.nn.functional.one_hot(torch.tensor([3] * P), V).double()
    torch.testing.assert_close(d_first, one_hot - p)
    mean = torch.zeros(P, V, dtype=torch.float64)
    for y in range(V):
        full = make_full(one.live, teacher, student_k=4, kept=6, token=y)
        mean += p[:, y : y + 1] * run(objective, full)[1]
    assert mean.abs().max() < 1e-15
    half = parse_objective("fixed_advantage+fixed(nats=-0.5)").objective
    torch.testing.assert_close(run(half, one)[1], d_first / 2)


def test_a_return_has_its_sum_for_a_long_response() -> None:
    """Compare 1000 positions with the backward recurrence R_t = A_(t+1) + discount R_(t+1)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1000, generator=generator)
    full = make_full(logits(0, 1000), logits(1, 1000), student_k=2, kept=2)
    targets = replace(full.targets, teacher_logprobs=a, student_logprobs=b)
    for discount in (1.0, 0.97):
        expected, value = [0.0] * 1000, 0.0
        for t in range(998, -1, -1):
            value = float(a[t + 1].double() - b[t + 1].double()) + discount * value
            expected[t] = value
        found = later_advantage(targets, discount, normalise=False)
        assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    excluded = replace(targets, teacher_logprobs=a.index_fill(0, torch.tensor([5]), -torch.inf))
    assert later_advantage(excluded, 1.0, normalise=True).isfinite().all()


def test_a_return_needs_whole_responses() -> None:
    objective = parse_objective("minillm").objective
    for index in ([1, 2, 3], [0, 2, 3], [0, 1, 3, 2]):
        with pytest.raises(ObjectiveError, match="whole responses"):
            row_objective(objective, rows().targets.at(torch.tensor(index)))
    assert row_objective(objective, rows().targets.at(torch.tensor([0, 1, 2, 5])))
    assert row_objective(objective, rows().targets.at(torch.tensor([], dtype=torch.int64)))


def test_skipped_rows_have_no_parts() -> None:
    full = rows()
    objective = parse_objective("sampled_token+ce(weight=1)").objective
    fn = row_objective(objective, full.targets, bounds=Bounds(action="skip", max_drift=0.01))
    result, dz = sparse_kl_reference(full.live, full.targets.ids, fn, k=V)
    skipped = result.metrics["cache/skipped_share"] > 0
    assert 0 < skipped.sum() < P
    total = result.metrics["loss/distill"] + result.metrics["loss/ce"]
    torch.testing.assert_close(result.row_loss, total)
    assert (total[skipped] == 0).all()
    assert (dz[skipped] == 0).all()


# Labels and rejections.

CACHE = CacheInfo(
    student_k=16,
    k_min=16,
    k_max=64,
    at_student=True,
    versions=(0,),
    student_version=0,
    same_base_weights=True,
    same_template=True,
    rewards=True,
    samples=4,
)


@pytest.mark.parametrize(
    ("name", "label", "metric", "estimator"),
    [
        ("opd+ce", "exact, S(p) frozen", "cache/coverage", "ce: of the sampled tokens, pulls back"),
        ("forward_kl+ce", "exact, coarsened", None, "deterministic; ce: "),
        (
            "forward_kl+reward",
            "unbiased on policy",
            "cache/approx_kl",
            "reward: one draw per position, unbiased for the mean reward at age 0",
        ),
        (
            "forward_kl+reward(importance=true)",
            "exact, coarsened",
            None,
            "reward: one draw per position, importance-weighted: unbiased for the mean reward",
        ),
        (
            "minillm",
            "unbiased on policy",
            "cache/coverage",
            "deterministic; return_to_go: one draw per position, unbiased for the later part of",
        ),
        (
            "fixed_advantage",
            "a control, no teacher",
            "cache/approx_kl",
            "with a fixed advantage: on policy its mean gradient is zero",
        ),
    ],
)
def test_labels(name: str, label: str, metric: str | None, estimator: str) -> None:
    preset = parse_objective(name)
    assert str(served(preset.objective)) == label
    assert bounded_metric(preset.objective) == metric
    assert estimator in check_exactness(preset, CACHE).estimator
    old = check_exactness(preset, replace(CACHE, student_version=7)).estimator
    corrected = "on policy" not in label
    assert ("biased: off policy (age 7)" in old) == (not corrected)
    other = check_exactness(preset.objective, replace(CACHE, same_base_weights=False, **OFF))
    assert ("supervised fine-tuning" in other.estimator) == ("+ce" in name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sampled_token+reward", "sample and score again, or add +importance to the objective"),
        ("forward_kl+reward", "sample and score again, or use reward(importance=true)"),
        ("teacher_topk+return_to_go", "sample and score again"),
        ("forward_kl+reward(importance=true)", ""),
        ("forward_kl+ce", ""),
    ],
)
def test_a_warning_of_drift_names_a_correction_that_the_objective_takes(
    name: str, hint: str
) -> None:
    found = warnings(parse_objective(name).objective, {"cache/approx_kl": 0.3})
    assert [line.partition("student; ")[2] for line in found] == ([hint] if hint else [])


OFF = {"allow_off_lineage": True}


@pytest.mark.parametrize(
    ("change", "cause", "hint"),
    [
        ({"rewards": False}, "these rollouts have none", "--grader exact"),
        ({"samples": 1}, "1 response per prompt", "--n 4"),
    ],
)
def test_a_reward_needs_rewards_and_groups(change: dict[str, int], cause: str, hint: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        check_exactness(parse_objective("opd+reward"), replace(CACHE, **change))
    assert cause in caught.value.cause
    assert hint in caught.value.hint


def test_pairs_without_meaning_are_rejected() -> None:
    """Try every pair of modifiers on a draw: those of EXCLUDES and no other of the new ones."""
    found = set()
    for name, other in product(EXCLUDES, MODIFIERS):
        if name == other or other == "adaptive_target":  # it needs a divergence, see below
            continue
        try:
            parse_objective(f"sampled_token+{name}+{other}")
        except ObjectiveError:
            found.add((name, other))
    assert found == {
        (name, other)
        for name, (others, _) in EXCLUDES.items()
        for other in others - {"adaptive_target"}
    } | {("return_to_go", "fixed")}
    with pytest.raises(ObjectiveError, match="'adaptive_target' with 'return_to_go'"):
        parse_objective("veto+return_to_go")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("opd+ce(weight=0)", "weight = 0.0 is not in (0, inf)"),
        ("opd+ce(weight=nan)", "weight = nan is not in (0, inf)"),
        ("opd+reward(std=yes)", "std = 'yes' is not of type bool"),
        ("opd+return_to_go(discount=1.5)", "discount = 1.5 is not in (0, 1]"),
        ("forward_kl+return_to_go", "'return_to_go' with divergence 'forward_kl'"),
        ("opd+fixed", "'fixed' with estimator 'divergence'"),
        ("async_mc+fixed", "'fixed' with support 'mc'"),
        ("fixed_advantage+fixed(nats=inf)", "nats = inf is not in (-inf, inf)"),
    ],
)
def test_wrong_settings_of_a_term_are_rejected(text: str, cause: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        parse_objective(text)
    assert cause in caught.value.cause


def test_spaces_and_the_record_of_older_objectives() -> None:
    preset = parse_objective("opd + ce( weight = 0.25 )")
    assert preset.formula == f"{PRESETS['opd'].formula}  +  0.25 (-log p(y))"
    assert preset.needs.endswith("; the sampled tokens")
    spaced = parse_objective("opd + ce( weight = 0.1 ) + reward(std=true)").objective
    assert spaced == parse_objective("opd+ce+reward(std=true)").objective
    names: Sequence[dict[str, object]] = spaced.record()["modifiers"]
    assert list(names) == [
        {"name": "ce", "weight": 0.1},
        {"name": "reward", "weight": 1.0, "std": True, "importance": False},
    ]
    # A run that began before terms existed resumes.
    assert parse_objective("reopold").objective.record() == {
        "support": "sampled",
        "divergence": "reverse_kl",
        "outside": "ignore",
        "form": "advantage",
        "k": 1,
        "parameter": None,
        "weights": "student_p",
        "modifiers": [
            {"name": "floor", "nats": -1.3862943611198906},
            {"name": "keep_entropy", "share": 0.5},
        ],
    }
