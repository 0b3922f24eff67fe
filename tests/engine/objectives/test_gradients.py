"""Every allowed objective against autograd through the whole vocabulary, in float64."""

import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives import (
    PRESETS,
    Objective,
    current_topk,
    parse_objective,
    row_objective,
)
from logitcask.engine.objectives.objective import ALLOWED_COMBINATIONS
from logitcask.engine.objectives.presets import ROW_PRESETS
from logitcask.engine.objectives.supports import SAMPLED_SUPPORTS
from logitcask.kernels.objective_input import ObjectiveInput
from logitcask.kernels.sparse_kl import sparse_kl
from tests.engine.objectives.full_rows import Full, make_full, run, support, truth

SOAK_ALONE = ("skew_reverse", "alpha", "mixed_kl")
"""Divergences that `make soak` alone tests on all supports, and every run on the teacher's."""
CASES = sorted(
    cell
    for cell in ALLOWED_COMBINATIONS
    if cell[0] == "teacher" or cell[1] not in SOAK_ALONE or os.environ.get("LOGITCASK_SOAK")
)
SHARES = {"jsd": 0.3, "skew": 0.2, "skew_reverse": 0.2, "alpha": 0.3, "mixed_kl": 0.4}
AT_THE_CUT_TEACHER = {("zero", name) for name in SHARES} | {
    (tail, name) for tail in ("zero", "ignore") for name in ("forward_kl", "skew")
}
"""(tail, divergence) whose student rests at the teacher renormalised on the support."""


def cell_id(cell: tuple[str, ...]) -> str:
    return "-".join(cell)


def objective_of(cell: tuple[str, str, str, str], k: int = 3) -> Objective:
    support, divergence, tail, estimator = cell
    return Objective(
        support=support,
        divergence=divergence,
        tail=tail,
        estimator=estimator,
        k=1 if support in SAMPLED_SUPPORTS else k,
        parameter=SHARES.get(divergence),
    )


def logits(seed: int, rows: int, vocab: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale


@st.composite
def fulls(draw: st.DrawFn, drawn: str = "mc") -> tuple[int, Full]:
    """Draw k and rows, with draws of the student (`mc`) or of the teacher (`q_draws`).

    Includes ties, impossible ids, ragged kept lists, an old student and disjoint top-k.
    """
    rows = draw(st.integers(1, 4))
    vocab = draw(st.integers(3, 11))
    k = draw(st.integers(2, 5))
    kinds = st.sampled_from(["smooth", "ties", "holes"])

    def side(seed: int) -> Tensor:
        z = logits(seed, rows, vocab)
        kind = draw(kinds)
        if kind == "ties":
            z = z.round() / 2
        elif kind == "holes":
            z[:, draw(st.integers(0, vocab - 1))] = -math.inf
            z[0, draw(st.integers(0, vocab - 1))] = -math.inf
            z[:, 1] = 0.5  # something is always possible
        return z

    seed = draw(st.integers(0, 1 << 20))
    live, old, teacher = side(seed), side(seed + 1), side(seed + 2)
    if draw(st.booleans()):
        teacher = torch.where(teacher == -math.inf, teacher, -live.nan_to_num(neginf=-4.0))
    counts = st.dictionaries(st.integers(0, vocab - 1), st.integers(1, 5), min_size=1)
    full = make_full(
        live,
        teacher,
        old=old,
        **{drawn: draw(st.lists(counts, min_size=rows, max_size=rows))},
        student_k=draw(st.integers(k, k + 2)),
        kept=draw(st.lists(st.integers(1, vocab), min_size=rows, max_size=rows)),
        token=draw(st.lists(st.integers(0, vocab - 1), min_size=rows, max_size=rows)),
    )
    return k, full


@pytest.mark.parametrize("cell", CASES, ids=cell_id)
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_every_cell_is_its_formula(cell: tuple[str, str, str, str], data: st.DataObject) -> None:
    k, full = data.draw(fulls("q_draws" if cell[0] == "teacher_mc" else "mc"))
    objective = objective_of(cell, k)
    ours, dz = run(objective, full)
    loss, grad = truth(objective, full)
    # Another test has the floor: a student without mass outside S, where the teacher has some.
    assume(loss.isfinite().all() and grad.isfinite().all())
    torch.testing.assert_close(ours.row_loss, loss, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(dz, grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [n for n, p in ROW_PRESETS.items() if not p.objective.modifiers])
def test_every_preset_is_its_formula_at_its_own_k(name: str) -> None:
    """Check the presets without modifiers; test_modifiers has the others."""
    preset = PRESETS[name]
    live = logits(0, 6, 90)
    draws = [{2 * r: 3, 2 * r + 1: 1, 50: 2} for r in range(6)]
    full = make_full(
        live,
        live + 0.5 * logits(1, 6, 90),
        old=live + 0.3 * logits(2, 6, 90),
        student_k=16,
        kept=90 if name == "full_vocab" else [16, 20, 64, 31, 16, 50],
        token=[3, 1, 4, 1, 5, 89],
        q_draws=draws if preset.objective.support == "teacher_mc" else None,
    )
    ours, dz = run(preset.objective, full)
    loss, grad = truth(preset.objective, full)
    assert loss.abs().min() > 1e-3, "every row has a loss"
    torch.testing.assert_close(ours.row_loss, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dz, grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", [c for c in CASES if c[3] == "divergence"], ids=cell_id)
def test_gradient_matches_finite_differences_of_the_loss(
    cell: tuple[str, str, str, str],
) -> None:
    sides = {"old": logits(5, 3, 9), "kept": [3, 5, 9], "token": 8}
    if cell[0] == "teacher_mc":
        sides["q_draws"] = [{2: 1, 5: 3}, {0: 4}, {8: 1, 1: 1, 3: 2}]
    full = make_full(logits(3, 3, 9), logits(4, 3, 9), **sides)  # type: ignore[arg-type]
    objective = objective_of(cell)
    _, dz = run(objective, full)
    step = 1e-5
    for v in range(9):
        moved = torch.zeros(9, dtype=torch.float64)
        moved[v] = step
        above, below = (
            run(objective, replace(full, live=full.live + sign * moved))[0].row_loss
            for sign in (1, -1)
        )
        torch.testing.assert_close(
            (above - below) / (2 * step), dz[:, v], rtol=1e-6, atol=1e-8, msg=str(v)
        )


def expected_gradient(objective: Objective, live: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean gradient [P, V] over draws from the live student or from the teacher."""
    rows, vocab = live.shape
    if objective.support not in SAMPLED_SUPPORTS:
        return run(objective, make_full(live, teacher, student_k=objective.k, kept=4))[1]
    probs = (teacher if objective.support == "teacher_mc" else live).softmax(-1)
    parts = []
    for y in range(vocab):
        drawn = {"sampled": {"token": y}}.get(objective.support)
        name = "q_draws" if objective.support == "teacher_mc" else "mc"
        full = make_full(
            live,
            teacher,
            student_k=1,
            kept=4,
            **(drawn or {name: [{y: 1}] * rows}),  # type: ignore[arg-type]
        )
        parts.append(probs[:, y : y + 1] * run(objective, full)[1])
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("cell", CASES, ids=cell_id)
def test_every_cell_has_its_stationary_point_at_the_teacher_only(
    cell: tuple[str, str, str, str],
) -> None:
    objective = objective_of(cell)
    teacher = logits(6, 5, 8)
    if cell[0] == "teacher" and (cell[2], cell[1]) in AT_THE_CUT_TEACHER:
        teacher = torch.where(teacher >= teacher.topk(3).values[:, -1:], teacher, -torch.inf)
    at_rest = expected_gradient(objective, teacher.clone(), teacher)
    assert at_rest.abs().max() < 1e-14
    # A non-overlap is empty as long as the two top-k are equal.
    far = objective.support == "non_overlap"
    moved = -teacher if far else teacher + 0.1 * logits(7, 5, 8)
    assert (expected_gradient(objective, moved, teacher).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("cell", [c for c in CASES if c[0] != "non_overlap"], ids=cell_id)
def test_every_cell_descends(cell: tuple[str, str, str, str]) -> None:
    """Step along -gradient from a perturbed teacher: the expected loss at least halves."""
    objective = objective_of(cell)
    teacher = logits(8, 5, 8)
    live = teacher + 0.3 * logits(9, 5, 8)
    before = expected_loss(objective, live, teacher)
    for _ in range(50):
        live = live - 3.0 * expected_gradient(objective, live, teacher)
    after = expected_loss(objective, live, teacher)
    assert (after < 0.5 * before).all(), (before, after)


def expected_loss(objective: Objective, live: Tensor, teacher: Tensor) -> Tensor:
    """Return the quantity [P] that an objective minimizes.

    An advantage is zero if the raw log-probs agree on the support, so their distance is returned.
    """
    log_p, log_q = live.log_softmax(-1), teacher.log_softmax(-1)
    if objective.support in ("sampled", "mc"):
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if objective.support == "teacher_mc":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if objective.estimator == "divergence":
        return run(objective, make_full(live, teacher, student_k=3, kept=4))[0].row_loss
    top = {
        "teacher": log_q.topk(3).indices,
        "student": log_p.topk(3).indices,
        "overlap": log_p.topk(1).indices,
        "union": torch.cat([log_q.topk(3).indices, log_p.topk(3).indices], -1),
    }[objective.support]
    return (log_p.gather(1, top) - log_q.gather(1, top)).abs().sum(-1)


@pytest.mark.parametrize("cell", [c for c in CASES if c[0] == "non_overlap"], ids=cell_id)
def test_a_small_step_on_the_non_overlap_descends(cell: tuple[str, str, str, str]) -> None:
    """Take a step that keeps the support, which empties as the student nears the teacher.

    The measure is the loss of a divergence. The gradient of an advantage is that of
    sum_S w (log p - log q)^2 / 2 with w fixed, so its measure is this sum.
    """
    objective = objective_of(cell)
    teacher, live = logits(8, 5, 8), -logits(8, 5, 8)
    dz = expected_gradient(objective, live, teacher)
    assert (dz.abs().amax(-1) > 1e-3).all()

    def lowered(z: Tensor) -> Tensor:
        full = make_full(z, teacher, student_k=3, kept=4)
        if objective.estimator == "divergence":
            return run(objective, full)[0].row_loss
        log_p, log_q = z.log_softmax(-1), teacher.log_softmax(-1)
        values = []
        for r in range(5):
            ids = support(objective, make_full(live, teacher, student_k=3, kept=4), r)
            w = live[r, ids].softmax(-1)
            values.append((w * (log_p[r, ids] - log_q[r, ids]) ** 2).sum() / 2)
        return torch.stack(values)

    step = 1e-4
    fallen = lowered(live) - lowered(live - step * dz)
    torch.testing.assert_close(fallen, step * (dz**2).sum(-1), rtol=1e-2, atol=0)


def test_forward_and_reverse_kl_by_hand() -> None:
    """Take p = (1/2, 1/8, 3/8) and q = (1/4, 5/8, 1/8) on two ids and the tail."""
    p = torch.tensor([[0.5, 0.125, 0.375]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.625, 0.125]], dtype=torch.float64).log()
    full = make_full(p, q, student_k=2, kept=2)
    reverse, _ = run(objective_of(("teacher", "reverse_kl", "bucket", "divergence"), 2), full)
    forward, _ = run(objective_of(("teacher", "forward_kl", "bucket", "divergence"), 2), full)
    # 1/2 log 2 + 1/8 log(1/5) + 3/8 log 3 and 1/4 log(1/2) + 5/8 log 5 + 1/8 log(1/3)
    assert reverse.loss.item() == pytest.approx(
        0.5 * math.log(2) - 0.125 * math.log(5) + 0.375 * math.log(3)
    )
    assert forward.loss.item() == pytest.approx(
        -0.25 * math.log(2) + 0.625 * math.log(5) - 0.125 * math.log(3)
    )


def test_forward_kl_gradient_on_the_support_is_p_minus_q() -> None:
    full = make_full(logits(10, 4, 12), logits(11, 4, 12), kept=5)
    _, dz = run(PRESETS["forward_kl"].objective, full)
    p, q = full.live.softmax(-1), full.teacher.softmax(-1)
    for r in range(4):
        ids = full.teacher[r].topk(5).indices
        torch.testing.assert_close(dz[r, ids], (p - q)[r, ids], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["teacher-forward_kl-bucket", "student-reverse_kl-bucket"])
def test_rounded_log_probs_with_their_tail_are_normalized(name: str) -> None:
    """Round to float16, where the mass is not 1: without a correction KL < 0 at p = q."""
    teacher = logits(14, 50, 40)
    support, divergence, tail = name.split("-")
    objective = Objective(
        support=support, divergence=divergence, tail=tail, estimator="divergence", k=8
    )
    for live in (teacher, logits(15, 50, 40)):
        full = make_full(live, teacher, student_k=8, kept=8)
        stored = full.targets.q_log_p.half().double()
        assert (stored.exp().sum(1) - full.targets.q_log_p.exp().sum(1)).abs().max() > 1e-4
        rounded = replace(full, targets=replace(full.targets, q_log_p=stored))
        loss, dz = run(objective, rounded)
        exact, exact_dz = run(objective, full)
        assert (loss.row_loss >= -1e-12).all()
        assert (loss.loss - exact.loss).abs() / len(live) < 2e-4
        if live is not teacher:
            assert (dz - exact_dz).norm() / exact_dz.norm() < 2e-3


def test_renormalised_objectives_do_not_change_other_logits() -> None:
    full = make_full(logits(12, 4, 12), logits(13, 4, 12), kept=3)
    _, dz = run(parse_objective("teacher_topk", k=3).objective, full)
    for r in range(4):
        touched = set(dz[r].nonzero()[:, 0].tolist())
        assert touched == set(full.teacher[r].topk(3).indices.tolist())


def test_a_tail_below_the_floor_keeps_loss_and_gradient_bounded() -> None:
    """Round 1 - sum p to 0 in float32, while the teacher has 1 % of its mass outside S."""
    live = torch.full((1, 200), -40.0)
    live[0, :2] = torch.tensor([1.0, 0.0])
    q = torch.full((1, 200), 0.01 / 198)
    q[0, :2] = torch.tensor([0.7, 0.29])
    full = make_full(live, q.log(), student_k=2, kept=2, token=5)
    objective = parse_objective("forward_kl", k=2).objective
    with torch.no_grad():
        objective_fn = row_objective(objective, full.targets)
    z = live.clone().requires_grad_()
    result = sparse_kl(z, full.targets.ids, objective_fn, k=16)
    result.loss.backward()
    assert z.grad is not None
    p = live.softmax(-1)[0, :2]
    # On S exactly p - q; outside the pull is weaker than the true total of -1 %, and not above 0.
    torch.testing.assert_close(z.grad[0, :2], p - q[0, :2], rtol=0, atol=1e-6)
    outside = z.grad[0, 2:]
    assert (outside <= 0).all()
    assert -0.02 <= outside.sum() <= 0
    on_s = (q[0, :2] * (q[0, :2].log() - p.log())).sum()
    tail = 0.01 * (math.log(0.01) - math.log(2.0**-18))
    assert result.loss.item() == pytest.approx(on_s.item() + tail, abs=1e-3)


def test_rounding_of_a_small_tail_does_not_blow_up_the_pull_outside() -> None:
    """Take peaked students with large logits: the true pull outside S sums to r - q_tail < 0."""
    z = logits(22, 40, 1000, 10.0).float() + 20
    top = z.topk(16).indices
    q = torch.full_like(z, 0.1 / 984).scatter(1, top, 0.9 / 16)
    full = make_full(z, q.log(), student_k=1, kept=16)
    leaf = z.clone().requires_grad_()
    objective = parse_objective("forward_kl", k=16).objective
    sparse_kl(leaf, full.targets.ids, row_objective(objective, full.targets)).loss.backward()
    assert leaf.grad is not None
    pull = leaf.grad.scatter(1, top, 0.0).sum(-1)
    r = 1 - z.double().softmax(-1).gather(1, top).sum(-1)
    assert (r < 1e-5).sum() >= 3, "there are tails below the precision of float32"
    assert (pull >= -3 * 0.1).all()
    assert (pull <= r + 1e-6).all()


@pytest.mark.parametrize("name", [n for n, p in ROW_PRESETS.items() if not p.objective.modifiers])
def test_float32_is_as_good_as_plain_torch(name: str) -> None:
    """Compare errors against float64 on peaked rows: at most about twice naive torch's."""
    z = [logits(seed, 8, 2000, 4.0) for seed in (20, 21)]
    z[1] = z[0] + 0.5 * z[1]
    best = z[1].topk(3).indices.tolist()
    draws = [{a: 3, b: 1, c: 2} for a, b, c in best] if name == "rs_kd" else None
    exact = make_full(z[0], z[1], student_k=16, kept=64, token=7, q_draws=draws)
    objective = PRESETS[name].objective
    loss, grad = truth(objective, exact)
    half = make_full(z[0].float(), z[1].float(), student_k=16, kept=64, token=7, q_draws=draws)
    naive_loss, naive_grad = truth(objective, half)
    ours, dz = run(objective, half)
    for got, naive, expected in ((ours.row_loss, naive_loss, loss), (dz, naive_grad, grad)):
        worst = 2 * (naive.double() - expected).abs().max() + 2e-6
        assert (got.double() - expected).abs().max() <= worst


def test_a_kernel_that_selects_too_few_ids_is_rejected() -> None:
    full = make_full(logits(14, 2, 9), logits(15, 2, 9), kept=6)
    objective = parse_objective("overlap", k=6).objective
    objective_fn = row_objective(objective, full.targets)
    with pytest.raises(ObjectiveError, match=r"top 3 ids.*needs 6"):
        sparse_kl(full.live, full.targets.ids, objective_fn, k=3)
    assert current_topk(objective, n_vocab=9) == 9
    assert current_topk(objective, n_vocab=1000) == 16
    assert current_topk(parse_objective("overlap", k=32).objective, n_vocab=1000) == 32
    assert current_topk(PRESETS["forward_kl"].objective, n_vocab=1000) == 16


def test_a_broken_student_shows_in_its_loss() -> None:
    full = make_full(logits(16, 2, 9), logits(17, 2, 9))
    broken = full.live.clone()
    broken[0, 3] = math.nan
    for preset in (PRESETS["opd"], PRESETS["forward_kl"], PRESETS["sampled_token"]):
        ours, _ = run(preset.objective, replace(full, live=broken))
        assert ours.row_loss[0].isnan(), preset.name
        assert ours.row_loss[1].isfinite(), preset.name


def test_rows_of_any_chunk_find_their_targets() -> None:
    full = make_full(logits(18, 7, 11), logits(19, 7, 11), token=[0, 1, 2, 3, 4, 5, 6])
    objective_fn = row_objective(parse_objective("overlap", k=4).objective, full.targets)
    seen: list[Tensor] = []

    def watched(view: ObjectiveInput) -> object:
        seen.append(view.index)
        return objective_fn(view)

    whole = sparse_kl(full.live, full.targets.ids, objective_fn, k=11)
    parts = sparse_kl(full.live, full.targets.ids, watched, k=11, chunk_rows=3)  # type: ignore[arg-type]
    assert [len(index) for index in seen] == [3, 3, 1]
    torch.testing.assert_close(parts.row_loss, whole.row_loss, rtol=0, atol=0)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(parts.metrics[name], value, rtol=0, atol=0, msg=name)
