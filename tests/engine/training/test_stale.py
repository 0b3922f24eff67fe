"""Every preset on a student 20 updates later, compared with the live teacher on the same prefixes.

The expected results use whole vocabularies: a forward of teacher, base and updated student over the
stored ids, then float64, and the formulas by autograd. They share no code with the store, the
scorer or the objectives.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from logitcask.engine.backends.hf import HF
from logitcask.engine.objectives import (
    PRESETS,
    CacheInfo,
    check_exactness,
    current_topk,
    loss_weights,
    parse_objective,
    row_objective,
)
from logitcask.engine.objectives.modifiers import Stepwise
from logitcask.engine.objectives.presets import ROW_PRESETS
from logitcask.engine.packing.source import Pack, PackSource
from logitcask.engine.packing.targets import Targets
from logitcask.engine.rollout.plan import rollout
from logitcask.engine.rollout.unit import RolloutRequest
from logitcask.engine.score.plan import score
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import Store, open_store
from logitcask.engine.types import Prompt, SamplingParams, ScoreParams
from logitcask.kernels.objective_input import SparseLoss
from logitcask.kernels.sparse_kl import sparse_kl
from tests.engine.objectives.full_rows import Full, make_full, ranking, truth
from tests.engine.objectives.row_formulas import FORMULAS, Row
from tests.engine.score.scored import ref
from tests.engine.tiny import N_VOCAB, make_model, save_folder

UPDATES = 20
PROFILES = ("raw32", "default")
PROMPTS = [Prompt(id=f"p{i}", token_ids=tuple(range(3 + 5 * i, 8 + 6 * i))) for i in range(4)]
REQUESTS = {
    "topk": ScoreParams(k_min=16, k_max=64, top_p=0.99),
    "every": ScoreParams(entry_kind="topk", k_min=N_VOCAB, k_max=N_VOCAB),
    "drawn": ScoreParams(entry_kind="sampled", draws=50, at_student=False),
    "base": ScoreParams(),
}
"""Names of scores."""
SCORES = {"full_vocab": "every", "rs_kd": "drawn"}
"""The scores that a preset needs instead of `topk`."""
CURRENT_SUPPORTS = ("union", "non_overlap")
"""Supports that use the scored part of the current S(p)."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The same P rows of both stores, and the logits [P, V] of every model on them, in float64."""

    rows: dict[tuple[str, str], Pack]
    """(profile, name of the scores) -> all rows; `topk` includes the base model's scores."""
    live: Tensor
    old: Tensor
    teacher: Tensor
    base: Tensor

    def full(self, profile: str, name: str) -> Full:
        """Return rows with the ids of the store and the numbers of the models."""
        targets = self.rows[profile, SCORES.get(name, "topk")].targets
        return Full(live=self.live, old=self.old, teacher=self.teacher, targets=targets)


def logits(model: Qwen3ForCausalLM, row: Pack) -> Tensor:
    """Return the logits [P, V] of a pack, with a separate forward for each sequence."""
    starts = (row.position_ids[0] == 0).nonzero()[:, 0].tolist()
    parts = torch.tensor_split(row.input_ids[0], starts[1:])
    return torch.cat([model(input_ids=ids[None]).logits[0] for ids in parts])[row.predict_at]


def filled(path: Path, root: Path, profile: str) -> Store:
    """Make a store of rollouts with draws and of every kind of score."""
    store, student = open_store(path, create=True), ref(root / "student")
    sampler = HF(student)
    rollout(
        RolloutRequest(
            store=store,
            model=student,
            sampler=sampler,
            prompts=PROMPTS,
            sampling=SamplingParams(n=2, max_new_tokens=24),
            student_k=16,
            mc_draws=16,
            profile=profile,
        )
    )
    for name, request in REQUESTS.items():
        kind = "base" if name == "base" else "teacher"
        model: Any = ref(root / kind)
        score(
            ScoreRequest(
                store=store,
                model=model,
                scorer=HF(model),
                teacher_name=name,
                params=request,
                role=kind,
                extra_ids="mc" if name in ("topk", "base") else None,
                profile=profile,
            )
        )
    return store


def read(store: Store, name: str) -> Pack:
    base = "base" if name == "topk" else None
    source = PackSource(store, store.head(), "main", name, base=base)
    units = source.lengths()
    members = [(u, s) for u, each in enumerate(units) for s in range(len(each.response))]
    return source.pack(np.array(members))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("stale")
    models = {name: make_model(seed=i) for i, name in enumerate(("student", "teacher", "base"))}
    for name, model in models.items():
        save_folder(root / name, model)
    rows = {}
    for profile in PROFILES:
        store = filled(root / profile, root, profile)
        rows |= {(profile, name): read(store, name) for name in ("topk", "every", "drawn")}
    row = rows["raw32", "topk"]
    for other in rows.values():
        assert torch.equal(row.input_ids, other.input_ids), "the same prefixes"
        assert torch.equal(row.targets.token, other.targets.token)
    with torch.no_grad():
        old, teacher, base = (logits(model, row).double() for model in models.values())
    student = models["student"].train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=7e-4)
    for _ in range(UPDATES):
        z = logits(student, row)
        loss(z, row.targets, "forward_kl").loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        live = logits(student, row).double()
    return Case(rows=rows, live=live, old=old, teacher=teacher, base=base)


def loss(z: Tensor, targets: Targets, name: str) -> SparseLoss:
    objective = PRESETS[name].objective
    k = current_topk(objective, N_VOCAB)
    return sparse_kl(z, targets.ids, row_objective(objective, targets), k=k)


def cached(case: Case, profile: str, name: str) -> tuple[SparseLoss, Tensor]:
    """Return the engine's losses and metrics on the store, and the gradient [P, V]."""
    z = case.live.float().requires_grad_()
    ours = loss(z, case.rows[profile, SCORES.get(name, "topk")].targets, name)
    ours.loss.backward()
    assert z.grad is not None
    return ours, z.grad.double()


def expected(case: Case, name: str) -> tuple[Tensor, Tensor]:
    """Return loss [P] and gradient [P, V] of the live teacher, at the stored ids."""
    full, objective = case.full("raw32", name), PRESETS[name].objective
    if name not in FORMULAS:
        return truth(objective, full)
    z = case.live.clone().requires_grad_()
    distributions = [x.log_softmax(-1) for x in (z, case.teacher, case.base, case.old)]
    t, losses, surrogates = full.targets, [], []
    assert t.mc_count is not None
    for r in range(len(z)):
        ids, counts = t.ids[r].tolist(), t.mc_count[r].tolist()
        later = (t.sequence == t.sequence[r]) & (torch.arange(len(z)) > r)
        gap = (case.teacher.log_softmax(-1) - case.old.log_softmax(-1)).gather(1, t.token[:, None])
        row = Row(
            *(distribution[r] for distribution in distributions),
            y=int(t.token[r]),
            scored=t.ids[r][t.cached[r]].tolist(),
            kept=ranking(case.teacher[r])[: int(t.n_kept[r])],
            draws={v: n for v, n in zip(ids, counts, strict=True) if n},
            later=tuple(gap[later, 0].tolist()),
        )
        value, surrogate = FORMULAS[name](row)
        losses.append(value)
        surrogates.append(surrogate)
    (grad,) = torch.autograd.grad(torch.stack(surrogates).sum(), z)
    return torch.stack(losses), grad


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def info_at(age: int) -> CacheInfo:
    return CacheInfo(
        student_k=16,
        k_min=N_VOCAB,
        k_max=N_VOCAB,
        at_student=True,
        versions=(0,),
        student_version=age,
        same_base_weights=True,
        same_template=True,
        n_vocab=N_VOCAB,
        mc_draws=16,
        at_mc=True,
        base=True,
    )


def test_the_student_has_moved(case: Case) -> None:
    """Require a distance that distinguishes the current student from the one that sampled."""
    p, old = case.live.log_softmax(-1), case.old.log_softmax(-1)
    assert (p.exp() * (p - old)).sum(-1).mean() > 0.3
    assert overlap_of(case.live, case.old, 16).double().mean() < 15


@pytest.mark.parametrize("name", ROW_PRESETS)
def test_exact_scores_are_those_of_the_live_teacher(case: Case, name: str) -> None:
    """Compare at the labelled ids.

    Live supports have the scored ids, frozen ones those of the student that sampled.
    """
    info = info_at(UPDATES)
    info = replace(info, q_draws=50) if name == "rs_kd" else info
    scores = check_exactness(PRESETS[name], info).scores
    assert scores.startswith("not read" if name in ("fixed_advantage", "sft") else "exact")
    exact, exact_grad = expected(case, name)
    ours, grad = cached(case, "raw32", name)
    # A forward in a padded batch differs from a single one by float32 rounding.
    torch.testing.assert_close(ours.row_loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert relative(grad, exact_grad) < 2e-6
    ours, grad = cached(case, "default", name)
    assert abs(float(ours.row_loss.double().mean() - exact.mean())) < 2e-4
    assert relative(grad, exact_grad) < 2e-3


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", ["prune_opd", "sod", "reopold"])
def test_row_weights_are_those_of_the_student_that_sampled(
    case: Case, name: str, profile: str
) -> None:
    """Compare the stored ones, at any age, with those of the live teacher and the old student."""
    stored = case.rows[profile, "topk"].targets
    full = make_full(
        case.live,
        case.teacher,
        old=case.old,
        student_k=16,
        kept=stored.n_kept.tolist(),
        token=stored.token.tolist(),
    )
    live = replace(full.targets, sequence=stored.sequence, position=stored.position)
    objective = PRESETS[name].objective
    if name == "sod":  # responses are shorter than its step
        objective = replace(objective, modifiers=(Stepwise(tokens=6),))
    ours, theirs = (loss_weights(objective, [rows], "token-mean") for rows in (stored, live))
    assert ours.weights[0].unique().numel() > 1, "the weights differ"
    torch.testing.assert_close(ours.weights[0].double(), theirs.weights[0], rtol=1e-4, atol=1e-6)
    assert ours.divisor == theirs.divisor


def test_coverage_and_uncached_mass_are_masses_of_the_current_student(case: Case) -> None:
    ours, _ = cached(case, "default", "union")
    p, targets = case.live.softmax(-1), case.rows["default", "topk"].targets
    for r in range(len(p)):
        scored = set(targets.ids[r][targets.cached[r]].tolist())
        missing = [v for v in ranking(case.live[r])[:16] if v not in scored]
        assert float(ours.metrics["cache/coverage"][r]) == pytest.approx(
            float(p[r, sorted(scored)].sum()), abs=1e-5
        )
        assert float(ours.metrics["cache/uncached_mass"][r]) == pytest.approx(
            float(p[r, missing].sum()), abs=1e-5
        )
    drift = (case.live.log_softmax(-1) - case.old.log_softmax(-1)).gather(1, targets.token[:, None])
    kl = (drift.exp() - 1 - drift)[:, 0]
    torch.testing.assert_close(ours.metrics["cache/approx_kl"].double(), kl, rtol=1e-4, atol=1e-5)
    assert kl.mean() > 0.2, "on-policy objectives would skip such rows"


@pytest.mark.parametrize("name", CURRENT_SUPPORTS)
def test_a_live_support_lacks_the_uncached_mass(case: Case, name: str) -> None:
    """Compare with the support of scores by the current teacher."""
    assert "uncached_mass" in check_exactness(PRESETS[name], info_at(UPDATES)).support
    full, every = case.full("raw32", name), case.full("raw32", "full_vocab").targets
    rescored = replace(full, targets=replace(every, n_kept=full.targets.n_kept))
    exact, exact_grad = truth(PRESETS[name].objective, rescored)
    ours, grad = cached(case, "raw32", name)
    served = ours.metrics["cache/uncached_mass"] == 0
    assert 10 < served.sum() < len(served) - 10, "rows of both kinds"
    torch.testing.assert_close(ours.row_loss.double()[served], exact[served], rtol=1e-5, atol=1e-5)
    assert relative(grad[served], exact_grad[served]) < 1e-5
    off = (ours.row_loss.double() - exact).abs()[~served]
    assert (off > 1e-5).all(), "a missing id changes the loss"
    missed = ours.metrics["cache/uncached_mass"].double()[~served]
    most = missed > missed.median()
    assert off[most].mean() > 2 * off[~most].mean(), "more missing mass, larger difference"


@pytest.mark.parametrize("name", ["opd", "opd_released"])
def test_a_frozen_support_is_the_current_one_if_the_top_k_has_not_changed(
    case: Case, name: str
) -> None:
    assert check_exactness(PRESETS[name], info_at(UPDATES)).support.startswith("frozen")
    objective, full = parse_objective(name, k=2).objective, case.full("raw32", name)
    current, current_grad = truth(objective, replace(full, old=full.live))
    z = case.live.float().requires_grad_()
    ours = sparse_kl(z, full.targets.ids, row_objective(objective, full.targets), k=16)
    ours.loss.backward()
    assert z.grad is not None
    same = overlap_of(case.live, case.old, 2) == 2
    assert 5 < same.sum() < len(same) - 10, "rows of both kinds"
    torch.testing.assert_close(ours.row_loss.double()[same], current[same], rtol=1e-5, atol=1e-5)
    assert relative(z.grad.double()[same], current_grad[same]) < 1e-5
    assert ((ours.row_loss.double() - current).abs()[~same] > 1e-5).all()


def overlap_of(a: Tensor, b: Tensor, k: int) -> Tensor:
    """Return the number [P] of ids that two top-k share."""
    tops = zip(a.topk(k).indices.tolist(), b.topk(k).indices.tolist(), strict=True)
    return torch.tensor([len({*x} & {*y}) for x, y in tops])


@pytest.mark.parametrize("name", ["forward_kl", "gkd"])
def test_a_coarsened_divergence_is_a_lower_bound_at_any_age(case: Case, name: str) -> None:
    """Check also that with lists of every id it is the divergence itself."""
    assert "a lower bound" in check_exactness(PRESETS[name], info_at(UPDATES)).scores
    log_p, log_q = case.live.log_softmax(-1), case.teacher.log_softmax(-1)
    m = log_q if name == "forward_kl" else torch.logaddexp(log_p, log_q) - math.log(2)
    if name == "forward_kl":
        whole = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        whole = ((log_q.exp() * (log_q - m)).sum(-1) + (log_p.exp() * (log_p - m)).sum(-1)) / 2
    ours, _ = cached(case, "raw32", name)
    missed = whole - ours.row_loss.double()
    assert (missed > -1e-5).all()
    assert missed.mean() > 1e-4, "a bucket hides something here"
    objective = parse_objective(name, k=N_VOCAB).objective
    targets = case.rows["raw32", "every"].targets
    objective_fn, k = row_objective(objective, targets), current_topk(objective, N_VOCAB)
    all_ids = sparse_kl(case.live.float(), targets.ids, objective_fn, k=k)
    torch.testing.assert_close(all_ids.row_loss.double(), whole, rtol=1e-5, atol=1e-5)


def test_importance_removes_the_bias_of_old_draws(case: Case) -> None:
    """Average the losses of `sampled_token` and `async_mc` over the sampling distribution."""
    log_p, log_q, old = (x.log_softmax(-1) for x in (case.live, case.teacher, case.old))
    a = log_p - log_q
    exact_kl = (log_p.exp() * a).sum(-1)
    plain = (old.exp() * a).sum(-1)
    assert (plain - exact_kl).abs().mean() > 0.1
    targets = case.rows["raw32", "topk"].targets
    ours, _ = cached(case, "raw32", "async_mc")
    count = targets.mc_count
    assert count is not None
    # Sixteen draws of each row: the error of the mean over rows is that of the draws.
    terms = ((log_p - old).exp() * a) - exact_kl[:, None]
    error = ((old.exp() * terms**2).sum(-1) / count.sum(-1)).sum().sqrt() / len(a)
    off = float(ours.row_loss.double().mean() - exact_kl.mean())
    assert abs(off) < 4 * float(error)
