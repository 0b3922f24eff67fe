"""Losses of other libraries, written from their published formulas in float64, and our objectives.

z [P, V] are the student's logits, lq [P, V] the teacher's log-probs, top [P, K] its best ids. Each
formula is the loss of a row before any mean; the gradient is autograd's.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from logitcask.engine.objectives import PRESETS, Objective, parse_objective
from logitcask.engine.objectives.divergences import OUTSIDE_COST, PARAMETERS, TRUNCATED
from tests.engine.objectives.full_rows import make_full, run
from tests.engine.objectives.test_gradients import logits

K = 6
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


def at(z: Tensor, top: Tensor, temperature: float = 1.0) -> Tensor:
    return (z / temperature).log_softmax(-1).gather(1, top)


def verl(z: Tensor, lq: Tensor, top: Tensor) -> Tensor:
    """Return verl's compute_forward_kl_topk without clamps."""
    log_q, log_p = lq.gather(1, top), at(z, top)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def distillkit_kl(z: Tensor, lq: Tensor, top: Tensor) -> Tensor:
    """Return DistillKit's sparse_kl_div with missing = zero: the teacher is renormalised."""
    log_q, log_p = lq.gather(1, top).log_softmax(-1), at(z, top)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def distillkit_kl_uniform(z: Tensor, lq: Tensor, top: Tensor) -> Tensor:
    """Return the same with missing = symmetric_uniform."""
    log_q, log_p = lq.gather(1, top), at(z, top)
    left_q, left_p = (torch.log1p(-x.exp().sum(-1)) for x in (log_q, log_p))
    return (log_q.exp() * (log_q - log_p)).sum(-1) + left_q.exp() * (left_q - left_p)


def distillkit_jsd(z: Tensor, lq: Tensor, top: Tensor) -> Tensor:
    """Return DistillKit's sparse_js_div with missing = zero."""
    log_q, log_p = lq.gather(1, top).log_softmax(-1), at(z, top)
    p, q = log_p.exp(), log_q.exp()
    log_m = (0.5 * (p + q)).log()
    left = (1 - p.sum(-1)) * math.log(2)
    return 0.5 * ((q * (log_q - log_m)).sum(-1) + (p * (log_p - log_m)).sum(-1) + left)


def nemo(kind: str, weight: float = 0.5) -> Formula:
    """Return NeMo-RL's DistillationLossFn; without zero_outside_topk but for one kind."""

    def loss(z: Tensor, lq: Tensor, top: Tensor) -> Tensor:
        outside = kind == "forward, zero outside"
        log_p = at(z, top) if outside else z.gather(1, top).log_softmax(-1)
        log_q = lq.gather(1, top).log_softmax(-1)
        forward = (log_q.exp() * (log_q - log_p)).sum(-1)
        reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
        if kind == "mixed":
            return weight * forward + (1 - weight) * reverse
        return reverse if kind == "reverse" else forward

    return loss


def modelopt(temperature: float, reverse: bool = False) -> Formula:
    """Return ModelOpt's LogitsDistillationLoss times T^2, over the whole vocabulary."""

    def loss(z: Tensor, lq: Tensor, top: Tensor) -> Tensor:
        log_p, log_q = ((x / temperature).log_softmax(-1) for x in (z, lq))
        a, b = (log_q, log_p) if reverse else (log_p, log_q)
        kl = functional.kl_div(a, b, reduction="none", log_target=True).sum(-1)
        return temperature**2 * kl

    return loss


def modelopt_ghost(z: Tensor, lq: Tensor, top: Tensor) -> Tensor:
    """Return ModelOpt's TopLogitsKLLoss in reverse, with its ghost token."""
    log_q, log_p = lq.gather(1, top), at(z, top)
    ghosts = (torch.log(-torch.expm1(x.logsumexp(-1, keepdim=True))) for x in (log_q, log_p))
    log_q, log_p = (torch.cat(pair, -1) for pair in zip((log_q, log_p), ghosts, strict=True))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def distillkit_t(temperature: float) -> Formula:
    """Return DistillKit's dense_kl_div on the teacher's ids alone, times T^2."""

    def loss(z: Tensor, lq: Tensor, top: Tensor) -> Tensor:
        log_p, log_q = ((x.gather(1, top) / temperature).log_softmax(-1) for x in (z, lq))
        return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1)

    return loss


def distillm(z: Tensor, lq: Tensor, top: Tensor) -> Tensor:
    """Return DistiLLM's skewed_forward_kl, which leaves out sum q log q, and adds it."""
    p, q = z.softmax(-1), lq.exp()
    return -(q * (0.1 * q + 0.9 * p).log()).sum(-1) + (q * lq).sum(-1)


def distillm_reverse(z: Tensor, lq: Tensor, top: Tensor) -> Tensor:
    """Return DistiLLM's skewed_reverse_kl."""
    p, q = z.softmax(-1), lq.exp()
    return -(p * (0.9 * q + 0.1 * p).log() - p * z.log_softmax(-1)).sum(-1)


V = 14
EVERY = f"k={V}"
PEERS: dict[str, tuple[str, Formula]] = {
    "verl": ("forward_kl_topk", verl),
    "DistillKit KL zero": ("forward_kl_topk(tail=zero)", distillkit_kl),
    "DistillKit KL symmetric_uniform": ("forward_kl", distillkit_kl_uniform),
    "DistillKit JSD zero": ("gkd(tail=zero)", distillkit_jsd),
    "DistillKit KL at T on S": ("kd(temperature=3)", distillkit_t(3)),
    "NeMo-RL forward": ("teacher_topk(divergence=forward_kl)", nemo("forward")),
    "NeMo-RL forward, zero outside": (
        "forward_kl_topk(tail=zero)",
        nemo("forward, zero outside"),
    ),
    "NeMo-RL reverse": ("teacher_topk", nemo("reverse")),
    "NeMo-RL mixed": ("mixed_kl(parameter=0.3)", nemo("mixed", 0.3)),
    "ModelOpt, T 2": (f"kd({EVERY})", modelopt(2)),
    "ModelOpt, T 0.5, reverse": (f"teacher_topk({EVERY},temperature=0.5)", modelopt(0.5, True)),
    "ModelOpt top-k, reverse": ("forward_kl(divergence=reverse_kl)", modelopt_ghost),
    "DistiLLM skew": (f"skew_kl({EVERY})", distillm),
    "DistiLLM skew reverse": (f"skew_reverse_kl({EVERY})", distillm_reverse),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_peers_loss_and_gradient(name: str) -> None:
    text, formula = PEERS[name]
    objective = parse_objective(text, k=None if EVERY in text else K).objective
    z, lq = logits(30, 5, V), logits(31, 5, V).log_softmax(-1)
    ours, dz = run(objective, make_full(z, lq, kept=objective.k))
    leaf = z.clone().requires_grad_()
    theirs = formula(leaf, lq, lq.topk(K).indices)
    (grad,) = torch.autograd.grad(theirs.sum(), leaf)
    assert theirs.abs().min() > 1e-3
    torch.testing.assert_close(ours.row_loss, theirs.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dz, grad, rtol=1e-10, atol=1e-12)


def on_teacher(divergence: str, tail: str, parameter: float | None) -> Objective:
    return Objective(
        support="teacher",
        divergence=divergence,
        tail=tail,
        estimator="divergence",
        k=K,
        parameter=parameter,
    )


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize(
    ("divergence", "parameter", "limit"),
    [
        ("alpha", 1 - 1e-7, "forward_kl"),
        ("alpha", 1e-7, "reverse_kl"),
        ("skew_reverse", 1e-7, "reverse_kl"),
        ("mixed_kl", 1 - 1e-7, "forward_kl"),
        ("mixed_kl", 1e-7, "reverse_kl"),
    ],
)
def test_limits_are_the_two_kls(divergence: str, parameter: float, limit: str, tail: str) -> None:
    full = make_full(logits(22, 5, V), logits(23, 5, V), kept=K)
    near, dz = run(on_teacher(divergence, tail, parameter), full)
    exact, expected = run(on_teacher(limit, tail, None), full)
    torch.testing.assert_close(near.row_loss, exact.row_loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(dz, expected, rtol=0, atol=1e-5)


def test_alpha_of_a_half_is_four_times_one_minus_the_bhattacharyya_coefficient() -> None:
    z, teacher = logits(24, 5, V), logits(25, 5, V)
    objective = parse_objective("alpha_divergence", k=V).objective
    ours, _ = run(objective, make_full(z, teacher, kept=V))
    coefficient = (z.softmax(-1) * teacher.softmax(-1)).sqrt().sum(-1)
    torch.testing.assert_close(ours.row_loss, 4 * (1 - coefficient), rtol=1e-12, atol=0)


@pytest.mark.parametrize("divergence", PARAMETERS)
def test_a_bucket_is_a_lower_bound_of_the_whole(divergence: str) -> None:
    """Show what makes a bucket exact, coarsened: it holds of every f-divergence."""
    full = make_full(logits(26, 50, V), logits(27, 50, V), kept=V)
    coarse, _ = run(on_teacher(divergence, "bucket", 0.3), full)
    exact, _ = run(replace(on_teacher(divergence, "bucket", 0.3), k=V), full)
    assert (coarse.row_loss <= exact.row_loss + 1e-12).all()
    assert (coarse.row_loss >= -1e-12).all()


def minimum(objective: Objective, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Descend to the least loss; return it and the student there, both [P, ...]."""
    z = torch.zeros_like(teacher, requires_grad=True)
    full = make_full(z.detach(), teacher, kept=K)
    optimizer = torch.optim.LBFGS([z], max_iter=100, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        loss, dz = run(objective, replace(full, live=z.detach()))
        z.grad = dz
        return loss.row_loss.sum()

    optimizer.step(step)
    return run(objective, replace(full, live=z.detach()))[0].row_loss, z.detach()


@pytest.mark.parametrize(
    ("tail", "divergence"),
    [*(("ignore", name) for name in TRUNCATED), *(("zero", name) for name in OUTSIDE_COST)],
)
def test_a_cut_teacher_has_the_minimum_of_the_docstring(divergence: str, tail: str) -> None:
    teacher = logits(28, 3, 9)
    b = 0.3 if divergence in PARAMETERS else None
    least, z = minimum(on_teacher(divergence, tail, b), teacher)
    top = teacher.topk(K).indices
    q = teacher.softmax(-1).gather(1, top)
    m, p = q.sum(-1), z.softmax(-1).gather(1, top)
    if tail == "zero":
        expected, value = q / m[:, None], torch.zeros_like(m)
    elif divergence in ("jsd", "alpha"):
        expected, value = q, torch.zeros_like(m)
    else:
        expected = q / m[:, None]
        value = m * m.log() if b is None else -m * (b + (1 - b) / m).log()
    torch.testing.assert_close(p, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(least, value, rtol=0, atol=1e-3)


def test_reverse_kl_without_the_mass_outside_is_least_where_mass_has_left() -> None:
    """Show the reason of the rejection: at p = q / e it is -m / e, less than 0 at p = q."""
    q = logits(29, 1, 9).softmax(-1)[0].sort(descending=True).values[:K]
    p = torch.linspace(0.01, 1.5, 299, dtype=torch.float64)[:, None] * q
    values = (p * (p / q).log()).sum(-1)
    assert values.min().item() == pytest.approx(-q.sum().item() / math.e, rel=1e-4)
    assert (p[values.argmin()] / q)[0].item() == pytest.approx(1 / math.e, abs=5e-3)


def test_the_presets_of_peers_are_served_by_a_top_k() -> None:
    for name in ("forward_kl_topk", "mixed_kl", "kd"):
        assert PRESETS[name].objective.k <= 16, "the least k_min of usual scores"
