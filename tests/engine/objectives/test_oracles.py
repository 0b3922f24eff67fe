"""Properties of on-policy distillation losses (arXiv 2604.13016 and others), without a model.

They are numbered. 6, 7, 9 and 10 (ratios at 1, ExOPD's lambda, draws of the teacher and of the
student) are in test_modifiers, 14 (aggregation) in test_loss_weights.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives import PRESETS, Objective, parse_objective, row_objective
from logitcask.engine.objectives.presets import ROW_PRESETS
from logitcask.kernels.sparse_kl import sparse_kl
from tests.engine.objectives.full_rows import Full, make_full, run

V = 12
DRAWS: dict[str, Any] = {
    "async_mc": {"mc": [{1: 3, 2: 1}] * 5},
    "rs_kd": {"q_draws": [{1: 3, 2: 1}] * 5},
}
"""Draws of five rows, for the presets on draws."""


def logits(seed: int, rows: int = 5, vocab: int = V) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 2


def full_kl(z: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reverse KL over the vocabulary [P], and its gradient [P, V]."""
    leaf = z.clone().requires_grad_()
    log_p, log_q = leaf.log_softmax(-1), teacher.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    (grad,) = torch.autograd.grad(kl.sum(), leaf)
    return kl.detach(), grad


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ROW_PRESETS)
def test_oracle_01_nothing_to_learn_from_an_equal_teacher(name: str) -> None:
    z = logits(0, vocab=40)
    full = make_full(z, z.clone(), student_k=16, kept=20, token=3, base=z, **DRAWS.get(name, {}))
    ours, dz = run(PRESETS[name].objective, full)
    if name == "veto":  # its stationary point is elsewhere, see test_modifiers
        assert dz.abs().max() > 1e-3
        return
    if name in ("fixed_advantage", "sft"):  # it does not know the teacher, see test_terms
        assert dz.abs().max() > 1e-3
        return
    if name == "forward_kl_topk":  # it pulls to the teacher renormalised on S, see test_peers
        close(ours.row_loss, torch.zeros_like(ours.row_loss))
        assert dz.abs().max() > 1e-3
        return
    if name == "rs_kd":  # a draw's gradient is not zero, only their mean
        close(ours.row_loss, torch.zeros_like(ours.row_loss))
        return
    close(ours.row_loss, torch.zeros_like(ours.row_loss))
    close(dz, torch.zeros_like(dz))
    close(ours.metrics["overlap/advantage"], torch.zeros_like(ours.row_loss))
    close(ours.metrics["overlap/ratio"], torch.ones_like(ours.row_loss))
    close(ours.metrics["entropy/gap"], torch.zeros_like(ours.row_loss))


@pytest.mark.parametrize(
    "name", ["opd", "opd_released", "teacher_topk", "overlap", "union", "full_vocab"]
)
def test_oracle_02_at_k_equal_to_the_vocabulary_supports_coincide(name: str) -> None:
    z, teacher = logits(1), logits(2)
    full = make_full(z, teacher, old=logits(3), student_k=V, kept=V)
    ours, dz = run(parse_objective(name, k=V).objective, full)
    kl, grad = full_kl(z, teacher)
    close(ours.row_loss, kl)
    close(dz, grad)  # of opd_released too: grad log m_p = 0
    empty, none = run(parse_objective("non_overlap", k=V).objective, full)
    assert empty.row_loss.abs().max() == none.abs().max() == 0.0


def test_oracle_03_at_k_1_only_the_released_form_has_a_gradient() -> None:
    with pytest.raises(ObjectiveError, match="k = 1 with tail 'renormalize'"):
        parse_objective("opd", k=1)
    # Eq.5 on one id is still possible: an overlap of exactly one.
    z = torch.tensor([[3.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[3.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
    ours, dz = run(parse_objective("overlap", k=2).objective, make_full(z, teacher, kept=2))
    assert ours.row_loss.item() == 0.0
    assert dz.abs().max() == 0.0

    z, teacher = logits(4), logits(5)
    _, dz = run(parse_objective("opd_released", k=1).objective, make_full(z, teacher, student_k=1))
    p, best = z.softmax(-1), z.argmax(-1)
    ratio = (z.log_softmax(-1) - teacher.log_softmax(-1)).gather(1, best[:, None])
    one_hot = torch.nn.functional.one_hot(best, V).double()
    close(dz, ratio * (one_hot - p))


def released_minus_paper(full: Full, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of opd_released, of opd, and of their difference by autograd.

    The difference is [KL~ + log(m_p / m_q)] grad log m_p.
    """
    _, released = run(parse_objective("opd_released", k=k).objective, full)
    ours, paper = run(parse_objective("opd", k=k).objective, full)
    top = full.old.topk(k).indices
    leaf = full.live.clone().requires_grad_()
    log_mp = leaf.log_softmax(-1).gather(1, top).logsumexp(-1)
    log_mq = full.teacher.log_softmax(-1).gather(1, top).logsumexp(-1)
    (grad,) = torch.autograd.grad(log_mp.sum(), leaf)
    factor = (ours.row_loss + log_mp - log_mq).detach()
    return released, paper, factor[:, None] * grad


def test_oracle_04_the_released_gradient_is_the_papers_and_a_mass_term() -> None:
    full = make_full(logits(6), logits(7), old=logits(6) + 0.5 * logits(8), student_k=4)
    released, paper, extra = released_minus_paper(full, 4)
    assert extra.abs().max() > 0.1, "the two forms differ here"
    close(released, paper + extra)


def test_oracle_04_by_finite_differences() -> None:
    full = make_full(logits(9), logits(10), student_k=4)
    released, _, _ = released_minus_paper(full, 4)
    top = full.old.topk(4).indices
    log_q = full.teacher.log_softmax(-1).gather(1, top)
    fixed = full.live.log_softmax(-1).gather(1, top)
    ours, _ = run(parse_objective("opd", k=4).objective, full)
    factor = ours.row_loss + fixed.logsumexp(-1) - log_q.logsumexp(-1)

    def paper_and_mass(z: Tensor) -> Tensor:
        log_p = z.log_softmax(-1).gather(1, top)
        renormalised = log_p - log_p.logsumexp(-1, keepdim=True)
        other = log_q - log_q.logsumexp(-1, keepdim=True)
        kl = (renormalised.exp() * (renormalised - other)).sum(-1)
        return kl + factor * log_p.logsumexp(-1)

    step = 1e-5
    for v in range(V):
        moved = torch.zeros(V, dtype=torch.float64)
        moved[v] = step
        slope = (paper_and_mass(full.live + moved) - paper_and_mass(full.live - moved)) / (2 * step)
        close(slope, released[:, v], atol=1e-8)


@pytest.mark.parametrize("name", ["sampled_token", "lightning"])
def test_oracle_05_the_mean_over_sampled_tokens_is_reverse_kl(name: str) -> None:
    z, teacher = logits(11), logits(12)
    loss, grad = torch.zeros(5, dtype=torch.float64), torch.zeros(5, V, dtype=torch.float64)
    for y in range(V):
        p_y = z.softmax(-1)[:, y]
        ours, dz = run(PRESETS[name].objective, make_full(z, teacher, token=y))
        loss += p_y * ours.row_loss
        grad += p_y[:, None] * dz
    kl, exact = full_kl(z, teacher)
    close(loss, kl)
    close(grad, exact)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_oracle_08_jsd_over_its_beta_tends_to_the_two_kls(tail: str) -> None:
    full = make_full(logits(22), logits(23), kept=6)

    def at(divergence: str, parameter: float | None = None) -> tuple[Tensor, Tensor]:
        objective = Objective(
            support="teacher",
            divergence=divergence,
            tail=tail,
            estimator="divergence",
            k=6,
            parameter=parameter,
        )
        ours, dz = run(objective, full)
        return ours.row_loss, dz

    tiny = 1e-7
    for near, limit in (
        ([x / tiny for x in at("jsd", tiny)], at("forward_kl")),
        ([x / tiny for x in at("jsd", 1 - tiny)], at("reverse_kl")),
        (at("skew", tiny), at("forward_kl")),
    ):
        for got, expected in zip(near, limit, strict=True):
            close(got, expected, atol=1e-4)
    assert (at("jsd", 0.5)[0] <= math.log(2)).all()
    assert (at("skew", 0.1)[0] <= -math.log(0.1)).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_oracle_11_a_tail_bucket_bounds_the_full_kl_from_below(divergence: str) -> None:
    z, teacher = logits(13, rows=50), logits(14, rows=50)
    a, b = (teacher, z) if divergence == "forward_kl" else (z, teacher)
    exact, _ = full_kl(a, b)
    before = torch.zeros_like(exact)
    for k in range(1, V + 1):
        objective = Objective(
            support="teacher", divergence=divergence, tail="bucket", estimator="divergence", k=k
        )
        ours, _ = run(objective, make_full(z, teacher, kept=V))
        assert (ours.row_loss <= exact + 1e-12).all()
        assert (ours.row_loss >= before - 1e-12).all(), "a larger k gives a tighter bound"
        before = ours.row_loss
    close(before, exact)


@pytest.mark.parametrize("pad", [-math.inf, 50.0])
@pytest.mark.parametrize("name", ROW_PRESETS)
def test_oracle_12_padded_columns_change_nothing(name: str, pad: float) -> None:
    full = make_full(
        logits(15, vocab=40),
        logits(16, vocab=40),
        student_k=16,
        kept=20,
        token=5,
        base=logits(2, vocab=40),
        **DRAWS.get(name, {}),
    )
    objective_fn = row_objective(PRESETS[name].objective, full.targets)
    padded = torch.cat([full.live, torch.full((5, 7), pad, dtype=torch.float64)], -1)
    results, grads = [], []
    for z in (full.live.clone(), padded):
        z.requires_grad_()
        results.append(sparse_kl(z, full.targets.ids, objective_fn, k=16, n_vocab=40))
        results[-1].loss.backward()
        assert z.grad is not None
        grads.append(z.grad)
    close(results[0].row_loss, results[1].row_loss, atol=1e-14)
    for metric, value in results[0].metrics.items():
        close(value, results[1].metrics[metric], atol=1e-14)
    close(grads[0], grads[1][:, :40], atol=1e-14)
    assert grads[1][:, 40:].abs().max() == 0.0


def test_oracle_13_bfloat16_logits_round_to_an_eighth_of_a_nat() -> None:
    """Show the rounding of log-probs near -20 in bfloat16: our scorers sum in float32."""
    z = logits(24, rows=1, vocab=400) * 4 + 17
    rough = (z.bfloat16() - z.bfloat16().logsumexp(-1, keepdim=True)).float()
    near = rough[(rough < -16) & (rough > -32)]
    assert len(near) > 20
    assert (near * 8 == (near * 8).round()).all(), "multiples of 0.125"
    kept = z.float().log_softmax(-1)
    assert (kept.double() - z.log_softmax(-1)).abs().max() < 1e-5


def test_oracle_15_a_gradient_per_id_not_one_advantage_per_position() -> None:
    """Show that sum_S A times grad log p(y) has zero mean over y ~ p, so it would learn nothing."""
    full = make_full(logits(17), logits(18), student_k=4)
    ours, dz = run(parse_objective("opd_released", k=4).objective, full)
    p = full.live.softmax(-1)
    eye = torch.eye(V, dtype=torch.float64)
    collapsed = sum((p[:, y] * ours.row_loss)[:, None] * (eye[y] - p) for y in range(V))
    assert isinstance(collapsed, Tensor)
    close(collapsed, torch.zeros_like(collapsed))
    assert (dz.abs().amax(-1) > 1e-2).all()


def test_oracle_16_an_empty_overlap_gives_exactly_zero() -> None:
    z = logits(19)
    full = make_full(z, -z, student_k=4, kept=4)
    ours, dz = run(parse_objective("overlap", k=4).objective, full)
    assert ours.metrics["overlap/ratio"].sum() == 0.0
    assert ours.row_loss.abs().max() == 0.0
    assert dz.abs().max() == 0.0
    assert all(value.isfinite().all() for value in ours.metrics.values())


@pytest.mark.parametrize("name", ROW_PRESETS)
def test_oracle_16_ids_that_the_teacher_excludes_give_finite_numbers(name: str) -> None:
    """Put -inf at the student's best id, which is also the sampled one."""
    z, teacher = logits(20, vocab=40), logits(21, vocab=40)
    best = z.argmax(-1)
    teacher[torch.arange(5), best] = -math.inf
    full = make_full(
        z,
        teacher,
        student_k=16,
        kept=20,
        token=best.tolist(),
        base=logits(2, vocab=40),
        **DRAWS.get(name, {}),
    )
    ours, dz = run(PRESETS[name].objective, full)
    assert ours.row_loss.isfinite().all()
    assert dz.isfinite().all()
    assert all(value.isfinite().all() for value in ours.metrics.values())
    others = ("eopd", "fixed_advantage", "sft")  # one adds a KL, two read no teacher
    if PRESETS[name].objective.support == "sampled" and name not in others:
        assert ours.row_loss.abs().max() == 0.0
        assert dz.abs().max() == 0.0
