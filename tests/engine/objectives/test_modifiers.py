"""Every modifier equals its formula, in float64 over the whole vocabulary, and has its properties.

The expected results use log_softmax of whole rows and autograd; constants of the papers are
detached. They share no code with the engine.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives import (
    PRESETS,
    Bounds,
    Objective,
    current_topk,
    parse_objective,
    row_objective,
)
from logitcask.engine.objectives.evaluate import is_renormalised
from logitcask.engine.objectives.presets import ROW_PRESETS
from logitcask.kernels.sparse_kl import sparse_kl_reference
from tests.engine.objectives.full_rows import Full, entropy, make_full, run

P, V = 6, 24


def logits(seed: int, scale: float = 1.5, rows: int = P) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, V, generator=generator, dtype=torch.float64) * scale


def rows(seed: int = 0, **options: object) -> Full:
    """Make rows whose student differs a little from the one that sampled."""
    live = logits(seed)
    defaults: dict[str, object] = {
        "old": live + 0.4 * logits(seed + 2),
        "student_k": 16,
        "kept": 20,
        "token": [3, 1, 4, 1, 5, 9],
        "base": logits(seed + 3),
    }
    return make_full(live, logits(seed + 1), **(defaults | options))  # type: ignore[arg-type]


def objective(name: str) -> Objective:
    return parse_objective(name).objective


def close(a: Tensor, b: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=atol)


def check(what: Objective, full: Full, loss: Tensor, surrogate: Tensor, leaf: Tensor) -> None:
    """Compare with a loss [P], and with the gradient of a surrogate [P] by the leaf."""
    ours, dz = run(what, full)
    (grad,) = torch.autograd.grad(surrogate.sum(), leaf)
    close(ours.row_loss, loss.detach())
    close(dz, grad)


def sides(full: Full) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the leaf, log p, log q, and log p of the student that sampled, each [P, V]."""
    leaf = full.live.clone().requires_grad_()
    return leaf, *(z.log_softmax(-1) for z in (leaf, full.teacher, full.old))


def at(x: Tensor, full: Full) -> Tensor:
    """Return x [P] at the sampled token."""
    return x.gather(1, full.targets.token[:, None])[:, 0]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_extrapolate(factor: float) -> None:
    full = rows()
    leaf, log_p, log_q, _ = sides(full)
    base = full.targets.base_token_lp
    assert base is not None
    a = (factor * at(log_q, full) + (1 - factor) * base - at(log_p, full)).detach()
    what = objective(f"exopd+extrapolate(factor={factor})")
    check(what, full, -a, -a * at(log_p, full), leaf)
    if factor == 1.0:  # oracle 7
        for ours, plain in zip(
            run(what, full)[0][:2], run(objective("sampled_token"), full)[0][:2], strict=True
        ):
            close(ours, plain, atol=0)


def test_extrapolate_in_a_divergence_has_no_gradient_at_the_papers_optimum() -> None:
    """Take p proportional to q^1.25 b^-0.25; any support would do."""
    teacher, base = logits(1), logits(2)
    live = 1.25 * teacher.log_softmax(-1) - 0.25 * base.log_softmax(-1)
    full = make_full(live, teacher, base=base, student_k=8, kept=10)
    loss, dz = run(objective("opd(k=8)+extrapolate"), full)
    close(loss.row_loss, torch.zeros(P, dtype=torch.float64))
    close(dz, torch.zeros_like(dz))
    assert run(objective("opd(k=8)"), full)[1].abs().max() > 1e-2


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_adaptive_target(beta: float, tail: str, divergence: str) -> None:
    full = rows()
    what = replace(
        objective(f"veto(k=6)+adaptive_target(beta={beta})"), tail=tail, divergence=divergence
    )
    leaf, log_p, log_q, _ = sides(full)
    top = log_q.topk(6).indices
    p, q = log_p.gather(1, top), log_q.gather(1, top)
    if tail == "renormalize":
        p, target = p.log_softmax(-1), (q + beta * p.detach()).log_softmax(-1)
    else:
        p = torch.cat([p, torch.log1p(-p.exp().sum(-1, keepdim=True))], -1)
        q = torch.cat([q, torch.log1p(-q.exp().sum(-1, keepdim=True))], -1)
        target = (q + beta * p.detach()).log_softmax(-1)
    a, b = (p, target) if divergence == "reverse_kl" else (target, p)
    loss = (a.exp() * (a - b)).sum(-1)
    check(what, full, loss, loss, leaf)
    if beta == 0.0:  # oracle 8
        close(loss, run(replace(what, modifiers=()), full)[0].row_loss)


def test_veto_has_no_gradient_at_its_papers_optimum() -> None:
    """Take p proportional to q^(1 / (1 - beta)), which is sharper than q."""
    teacher = logits(5)
    live = teacher / (1 - 0.3)
    _, dz = run(PRESETS["veto"].objective, make_full(live, teacher, kept=V))
    close(dz, torch.zeros_like(dz))
    assert (entropy(live.log_softmax(-1)) < entropy(teacher.log_softmax(-1))).all()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_baseline(side: str) -> None:
    full = rows()
    leaf, log_p, log_q, _ = sides(full)
    fixed, value = log_p.detach(), []
    for r in range(P):
        known = full.targets.ids[r][full.targets.cached[r]].tolist()
        if side == "student":
            ids = [v for v in fixed[r].topk(16).indices.tolist() if v in known]
            p, q = fixed[r, ids].log_softmax(-1), log_q[r, ids].log_softmax(-1)
        else:
            ids = log_q[r].topk(20).indices.tolist()
            rest = [v for v in range(V) if v not in ids]
            p, q = (torch.cat([x[r, ids], x[r, rest].logsumexp(-1)[None]]) for x in (fixed, log_q))
        value.append((p.exp() * (p - q)).sum())
    a = (at(log_q - log_p, full) + torch.stack(value)).detach()
    name = "vopd" if side == "student" else "vopd_cached"
    check(PRESETS[name].objective, full, -a, -a * at(log_p, full), leaf)


@pytest.mark.parametrize("name", ["vopd", "vopd_cached"])
def test_a_baseline_keeps_the_mean_and_lowers_the_variance(name: str) -> None:
    """Check oracle 5: over all draws from the live student, weighted by their probabilities."""
    live, teacher = logits(10), logits(10) + 0.7 * logits(11)
    p = live.softmax(-1)

    def moments(what: str) -> tuple[Tensor, Tensor]:
        grads = torch.stack(
            [
                run(
                    PRESETS[what].objective,
                    make_full(live, teacher, kept=20, student_k=16, token=y),
                )[1]
                for y in range(V)
            ]
        )  # [V, P, V]
        mean = torch.einsum("pv,vpu->pu", p, grads)
        square = torch.einsum("pv,vpu->p", p, (grads - mean) ** 2)
        return mean, square

    (plain, spread), (ours, less) = moments("sampled_token"), moments(name)
    close(ours, plain)
    assert (less < spread).sum() >= P - 1, "in rows whose KL is not mostly noise of the drawn ids"
    assert less.sum() < 0.85 * spread.sum()


@pytest.mark.parametrize("nats", [-1.386, -0.1])
def test_floor(nats: float) -> None:
    full = rows()
    leaf, log_p, log_q, _ = sides(full)
    raw = at(log_q - log_p, full).detach()
    assert 0 < (raw < nats).sum() < P
    a = raw.clamp(min=nats)
    check(objective(f"sampled_token+floor(nats={nats})"), full, -a, -a * at(log_p, full), leaf)


@pytest.mark.parametrize("cap", [0.0, 1.2])
def test_importance_of_the_sampled_token_uses_its_sampling_distribution(cap: float) -> None:
    full = rows()
    # As a sampler at temperature 0.7 returns it.
    drawn = at((full.old / 0.7).log_softmax(-1), full)
    full = replace(full, targets=replace(full.targets, behavior_logprobs=drawn))
    leaf, log_p, log_q, _ = sides(full)
    ratio = (at(log_p, full) - drawn).exp().clamp(max=cap or math.inf).detach()
    a = at(log_q - log_p, full).detach()
    what = objective(f"sampled_token+importance(cap={cap})")
    check(what, full, -ratio * a, -ratio * a * at(log_p, full), leaf)


def test_importance_makes_draws_of_an_old_student_unbiased() -> None:
    """Check oracle 10: the mean over MC draws of the old student is the gradient of KL(p || q).

    Without importance it is not, and neither is that of a frozen top-k.
    """
    live, old, teacher = logits(12), logits(12) + 0.8 * logits(13), logits(14)
    leaf = live.clone().requires_grad_()
    log_p, log_q = leaf.log_softmax(-1), teacher.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    (exact,) = torch.autograd.grad(kl.sum(), leaf)

    def mean(what: Objective) -> tuple[Tensor, Tensor]:
        loss, grad = torch.zeros(P, dtype=torch.float64), torch.zeros_like(live)
        for y in range(V):
            full = make_full(live, teacher, old=old, mc=[{y: 1}] * P)
            ours, dz = run(what, full)
            weight = old.softmax(-1)[:, y]
            loss, grad = loss + weight * ours.row_loss, grad + weight[:, None] * dz
        return loss, grad

    loss, grad = mean(PRESETS["async_mc"].objective)
    close(loss, kl.detach())
    close(grad, exact)
    biased = mean(replace(PRESETS["async_mc"].objective, modifiers=()))[1]
    assert (biased - exact).abs().max() > 1e-2
    frozen = make_full(live, teacher, old=old, student_k=4)
    assert (run(objective("opd(k=4)"), frozen)[1] - exact).abs().max() > 1e-2


@pytest.mark.parametrize("m", [1, 16])
def test_mc_means_over_real_draws_lie_within_their_confidence_bound(m: int) -> None:
    """Average 6000 sets of m draws from the old student: within 5 standard errors."""
    rows_, generator = 6000, torch.Generator().manual_seed(m)
    live = logits(20, rows=1)
    old, teacher = live + 0.5 * logits(21, rows=1), logits(22, rows=1)
    draws = torch.multinomial(old.softmax(-1)[0], rows_ * m, True, generator=generator)
    counts = [
        dict(zip(*map(Tensor.tolist, d.unique(return_counts=True)), strict=True))
        for d in draws.view(rows_, m)
    ]
    many = make_full(
        live.expand(rows_, V),
        teacher.expand(rows_, V),
        old=old.expand(rows_, V),
        student_k=1,
        kept=1,
        mc=counts,
    )
    dz = run(PRESETS["async_mc"].objective, many)[1]
    leaf = live.clone().requires_grad_()
    log_p = leaf.log_softmax(-1)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - teacher.log_softmax(-1))).sum(), leaf)
    error = dz.std(0) / math.sqrt(rows_)
    assert ((dz.mean(0) - exact[0]).abs() <= 5 * error + 1e-12).all()
    assert error.max() < 0.05, "the bound is tight enough to be a test"


def test_rs_kd_is_unbiased_and_a_top_k_is_not() -> None:
    """Check oracle 9: the mean over the teacher's draws is p - q; a top-k alone pulls to t / a."""
    live, teacher = logits(15), logits(16)
    q, p = teacher.softmax(-1), live.softmax(-1)
    mean = torch.zeros_like(live)
    for y in range(V):
        full = make_full(live, teacher, q_draws=[{y: 1}] * P)
        mean += q[:, y : y + 1] * run(PRESETS["rs_kd"].objective, full)[1]
    close(mean, p - q)
    # Renormalised on its top-k the teacher is more peaked than it is: p~ - t / a on S.
    _, dz = run(
        Objective(
            support="teacher",
            divergence="forward_kl",
            tail="renormalize",
            estimator="divergence",
            k=4,
        ),
        make_full(live, teacher, kept=4),
    )
    top = teacher.topk(4).indices
    kept = q.gather(1, top)
    renormalised = p.gather(1, top) / p.gather(1, top).sum(-1, keepdim=True)
    close(dz.gather(1, top), renormalised - kept / kept.sum(-1, keepdim=True))


@pytest.mark.parametrize("support", ["sampled", "student"])
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 1000), epsilon=st.floats(0.05, 0.5), dual=st.floats(1.1, 4.0))
def test_clip_is_the_released_surrogate(
    support: str, seed: int, epsilon: float, dual: float
) -> None:
    full = rows(seed)
    name = "sampled_token" if support == "sampled" else "opd_released"
    leaf, log_p, log_q, log_old = sides(full)
    ids = full.targets.token[:, None] if support == "sampled" else full.old.topk(16).indices
    old, q = log_old.gather(1, ids), log_q.gather(1, ids)
    a = -old.softmax(-1) * (old - q)
    ratio = (log_p.gather(1, ids) - old).exp()
    first, second = -a * ratio, -a * ratio.clamp(1 - epsilon, 1 + epsilon)
    worst = torch.maximum(first, second)
    loss = torch.where(a < 0, torch.minimum(worst, -a * dual), worst).sum(-1)
    what = objective(f"{name}+clip(epsilon={epsilon},dual={dual})")
    check(what, full, loss, loss, leaf)


@pytest.mark.parametrize("name", ["opd_released", "sampled_token", "eopd"])
def test_on_policy_clips_and_ratios_do_nothing(name: str) -> None:
    """Check oracle 6: r = 1, so no setting has an effect."""
    full = rows(old=logits(0))
    plain = replace(
        objective(name), modifiers=tuple(m for m in objective(name).modifiers if m.name != "clip")
    )
    expected = run(plain, full)
    for setting in ("clip(epsilon=0.01)", "clip(epsilon=0.9)", "clip(dual=1.5)"):
        got = run(objective(f"{name}+{setting}"), full)
        close(got[0].row_loss, expected[0].row_loss)
        close(got[1], expected[1])
    if name == "sampled_token":
        close(run(objective("sampled_token+importance"), full)[1], expected[1])


def test_entropy_gate() -> None:
    full = rows(token=[0, 1, 2, 3, 4, 5])
    gate = full.targets.q_entropy.median().item()
    leaf, log_p, log_q, _ = sides(full)
    top = log_q.topk(8).indices
    p, q = log_p.gather(1, top), log_q.gather(1, top)
    p = torch.cat([p, torch.log1p(-p.exp().sum(-1, keepdim=True))], -1)
    q = torch.cat([q, torch.log1p(-q.exp().sum(-1, keepdim=True))], -1)
    open_ = (full.targets.q_entropy > gate).double()
    assert 0 < open_.sum() < P
    added = 0.7 * open_ * (q.exp() * (q - p)).sum(-1)
    a = at(log_q - log_p, full).detach()
    what = objective(f"sampled_token+entropy_gate(nats={gate},coefficient=0.7,k=8)")
    check(what, full, added - a, added - a * at(log_p, full), leaf)


def test_an_entropy_gate_on_an_interval_opens_where_both_ends_are_above() -> None:
    full = rows(token=[0, 1, 2, 3, 4, 5])
    what = objective("sampled_token+entropy_gate(nats=1,coefficient=0.7,k=8)")
    bare, _ = run(objective("sampled_token"), full)
    least = torch.tensor([0.5, 0.5, 0.9, 1.1, 1.1, 1.0], dtype=torch.float64)
    most = torch.tensor([0.6, 1.5, 1.0, 1.1, 3.0, 1.0], dtype=torch.float64)
    gated, _ = run(
        what, replace(full, targets=replace(full.targets, q_entropy=least, q_entropy_hi=most))
    )
    acts = (gated.row_loss != bare.row_loss).tolist()
    assert acts == [False, False, False, True, True, False]


BONUSES = ("opd", "overlap", "opd_released", "sampled_token", "forward_kl", "eopd", "veto")


@pytest.mark.parametrize("name", BONUSES)
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 1000), coefficient=st.floats(1e-3, 2.0), barred=st.booleans())
def test_entropy_bonus(name: str, seed: int, coefficient: float, barred: bool) -> None:
    """Add the loss and the gradient of -coefficient H(p) to those of any objective."""
    full = rows(seed)
    if barred:  # ids that the student excludes have no entropy, and no gradient
        live = full.live.masked_fill(torch.arange(V) % 5 == 4, -math.inf)
        full = replace(full, live=live)
    plain, plain_dz = run(objective(name), full)
    leaf = full.live.clone().requires_grad_()
    log_p = leaf.log_softmax(-1)
    h = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
    (dh,) = torch.autograd.grad(h.sum(), leaf)
    ours, dz = run(objective(f"{name}+entropy_bonus(coefficient={coefficient})"), full)
    close(ours.row_loss, plain.row_loss - coefficient * h.detach())
    close(dz, plain_dz - coefficient * dh)


def test_entropy_bonus_keeps_its_gradient_next_to_other_modifiers() -> None:
    """Add nothing in rows that bounds skip."""
    full = rows()
    first, last = (
        run(objective(f"opd+{name}"), full)[1]
        for name in ("entropy_bonus+entropy_gate(nats=0)", "entropy_gate(nats=0)+entropy_bonus")
    )
    close(first, last)
    what = objective("opd(k=16)+entropy_bonus(coefficient=1)")
    metric = run(what, full)[0].metrics["cache/coverage"]
    bounds = Bounds(action="skip", min_coverage=metric.median().item())
    objective_fn = row_objective(what, full.targets, bounds=bounds)
    _, dz = sparse_kl_reference(full.live, full.targets.ids, objective_fn, k=current_topk(what, V))
    out = metric < bounds.min_coverage
    assert 0 < out.sum() < P
    assert (dz[out] == 0).all()
    close(dz[~out], run(what, full)[1][~out])


@pytest.mark.parametrize("coefficient", [0.0, -1.0, math.inf])
def test_entropy_bonus_refuses_an_invalid_coefficient(coefficient: float) -> None:
    with pytest.raises(ObjectiveError, match="coefficient = .* is not in"):
        objective(f"opd+entropy_bonus(coefficient={coefficient})")


@pytest.mark.parametrize("name", ROW_PRESETS)
def test_a_gradient_sums_to_zero_and_is_sparse_if_renormalised(name: str) -> None:
    """Check the property that lets indexed_linear skip the rest of the vocabulary."""
    full = rows(q_draws=[{1: 2, 3: 1}] * P) if name == "rs_kd" else rows(mc=[{1: 2, 3: 1}] * P)
    _, dz = run(parse_objective(name).objective, full)
    preset = PRESETS[name].objective
    assert is_renormalised(preset) == (preset.tail == "renormalize" and not preset.terms)
    # Any loss of softmax outputs has this sum; only a renormalised one is zero at other ids.
    close(dz.sum(-1), torch.zeros(P, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "field", "hint"),
    [
        ("exopd", "base_log_p", "--teacher-kind base"),
        ("async_mc", "mc_count", "--mc-draws"),
        ("rs_kd", "q_draws", "--selection sampled"),
    ],
)
def test_rows_without_a_needed_field_are_refused(name: str, field: str, hint: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        run(PRESETS[name].objective, rows(base=None))
    assert f"have no {field}" in caught.value.cause
    assert hint in caught.value.hint
