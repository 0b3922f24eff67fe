"""Regions, mass against k and estimators: each against the same numbers worked out row by row."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcask.engine.commands.probe import run_position_probe
from logitcask.engine.commands.probes.topk import run_region_probe, run_topk_probe
from logitcask.engine.config.probes import PositionProbeConfig, RegionProbeConfig, TopkProbeConfig
from logitcask.engine.errors import ConfigError, IncompleteError, ObjectiveError
from logitcask.engine.exchange.positions import positions
from logitcask.engine.probes.topk.estimators import EstimatorSums, estimates, full_gradient, names
from logitcask.engine.probes.topk.mass import powers
from logitcask.engine.probes.topk.regions import REGIONS
from logitcask.engine.store import Store
from logitcask.engine.types import ModelRef
from tests.engine.cached import Unit, make_unit
from tests.engine.fitting import make_case
from tests.engine.tiny import make_model, save_folder

K = 4
Case = tuple[Store, ModelRef]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    units = []
    for seed in range(2):
        # Rewards, and a row in four that does not count.
        unit = make_unit(seed, vocab=99, lengths=[7, 3, 0, 5, 6, 2], version=3 * seed)
        mask = unit.rollouts.loss_mask.copy()
        mask[1::4] = 0
        units.append(replace(unit, rollouts=replace(unit.rollouts, loss_mask=mask)))
    return make_case(tmp_path_factory.mktemp("topk"), units)


def config(kind: Any, store: Store, **settings: Any) -> Any:
    section = {
        RegionProbeConfig: "regions",
        TopkProbeConfig: "topk",
        PositionProbeConfig: "positions",
    }
    run = {} if kind is not TopkProbeConfig else {"run": {"device": "cpu"}}
    values = {"store": {"url": str(store.url)}, section[kind]: settings}
    return kind.model_validate(values | run)


Logs = dict[int, float]


def rows_of(store: Store) -> Iterator[tuple[list[int], list[int], Logs, Logs]]:
    """Yield S(p), S(q), and log p and log q of the ids that have one, of the rows that count."""
    for row in positions(store, rollouts="main", teacher="big"):
        if row["loss_mask"]:
            log_p, log_q = (
                dict(zip(row[ids], row[lp], strict=True)) | {row["token"]: row[own]}
                for ids, lp, own in (
                    ("student_topk_ids", "student_topk_logprobs", "student_logprob"),
                    ("teacher_ids", "teacher_logprobs", "teacher_logprob"),
                )
            )
            yield row["student_topk_ids"][:K], row["teacher_ids"][:K], log_p, log_q


def by_hand(store: Store) -> dict[str, dict[str, float]]:
    """Return the means of each region, with closed forms of both gradients."""
    found: dict[str, list[list[float]]] = {name: [] for name in REGIONS}
    totals = np.zeros(2)
    for top, best, log_p, log_q in rows_of(store):
        s, t = set(top), set(best)
        p, q = ({v: math.exp(x) for v, x in of.items()} for of in (log_p, log_q))
        p_s, q_s = (sum(of[v] for v in s) for of in (p, q))
        kl = sum(p[v] / p_s * math.log(p[v] / p_s / (q[v] / q_s)) for v in s)
        paper = {v: p[v] / p_s * (math.log(p[v] / p_s / (q[v] / q_s)) - kl) for v in s}
        total = sum(p[v] / p_s * math.log(p[v] / q[v]) for v in s)
        code = {v: (p[v] / p_s * math.log(p[v] / q[v]) if v in s else 0) - p[v] * total for v in p}
        totals += [sum(x * x for x in of.values()) for of in (paper, code)]
        of_region = (s & t, s - t, t - s, s ^ t, s, t, s | t)
        for name, ids in zip(REGIONS, of_region, strict=True):
            norms = [sum(of.get(v, 0) ** 2 for v in ids) for of in (paper, code)]
            least = sum(p.get(v, 0) for v in ids)
            rest = 1 - sum(p.values())
            unseen = len(ids - p.keys())
            most = least + min(unseen * min(min(p[v] for v in top), rest), rest)
            mass = sum(q[v] for v in ids)
            found[name].append([len(ids), least, most, mass, *map(math.sqrt, norms), *norms])
    return {
        name: {
            **dict(
                zip(
                    ("ids", "least", "most", "teacher", "opd", "released"),
                    np.mean(rows, 0)[:6].tolist(),
                    strict=True,
                )
            ),
            "shares": (np.sum(rows, 0)[6:] / totals).tolist(),
        }
        for name, rows in found.items()
    }


def test_regions_are_those_worked_out_by_hand(case: Case, tmp_path: Path) -> None:
    figure = tmp_path / "regions.svg"
    report = run_region_probe(config(RegionProbeConfig, case[0]), figure)
    assert ElementTree.parse(figure).getroot().tag.endswith("svg")
    assert report.k == K
    for name, expected in by_hand(case[0]).items():
        each = report.regions[name]
        found = [each.ids, each.student_mass, each.student_mass_upper, each.teacher_mass]
        found += [each.gradient["opd"], each.gradient["opd_released"]]
        assert found == pytest.approx(list(expected.values())[:6], rel=1e-5, abs=1e-7), name
        shares = [each.share["opd"], each.share["opd_released"]]
        assert shares == pytest.approx(expected["shares"], rel=1e-5, abs=1e-9), name
    regions = report.regions
    for objective in ("opd", "opd_released"):
        part = [regions[name].share[objective] for name in ("student", "teacher_only")]
        assert sum(part) == pytest.approx(regions["union"].share[objective])
    assert regions["student"].share["opd"] == pytest.approx(1), "Eq. 5 pulls at no other id"
    assert regions["student"].ids + regions["teacher_only"].ids == regions["union"].ids
    assert 0 < (report.unseen_share or 0) < 1
    assert -1 <= (report.overlap_cosine or 0) <= 1
    json.dumps(asdict(report), allow_nan=False)


def with_own_teacher(unit: Unit) -> Unit:
    """Return the unit with the student's stored values as those of the teacher: p = q."""
    student = unit.rollouts.student
    assert student is not None
    scores = replace(student, at_lp=student.entry_lp)
    return replace(unit, scores=scores)


def test_equal_models_have_no_gradient(tmp_path: Path) -> None:
    unit = with_own_teacher(make_unit(0, vocab=99, lengths=[4, 3, 2, 5, 1, 2]))
    store, _ = make_case(tmp_path, [unit])
    report = run_region_probe(config(RegionProbeConfig, store))
    overlap = report.regions["overlap"]
    assert overlap.ids == K
    assert overlap.gradient["opd"] == pytest.approx(0, abs=1e-6)
    assert report.regions["non_overlap"].ids == 0
    topk, _ = run_topk_probe(config(TopkProbeConfig, store))
    assert [each.overlap_ratio for each in topk.table] == [1, 1, 1]
    assert [each.coverage for each in topk.table] == [each.coverage_upper for each in topk.table]


def test_masses_are_those_of_positions_and_of_regions(case: Case, tmp_path: Path) -> None:
    store, _ = case
    figure = tmp_path / "k.svg"
    report, estimators = run_topk_probe(config(TopkProbeConfig, store), figure)
    assert estimators is None
    assert figure.stat().st_size > 0
    assert [each.k for each in report.table] == [1, 2, 4]
    last = report.table[-1]
    (whole,) = run_position_probe(config(PositionProbeConfig, store, bins=1)).ranges
    assert last.overlap_ratio == pytest.approx(whole.means["overlap/ratio"], rel=1e-6)
    regions = run_region_probe(config(RegionProbeConfig, store)).regions
    for name, value in (
        ("student", (last.student_on_student, last.teacher_on_student)),
        ("teacher", (last.student_on_teacher, last.teacher_on_teacher)),
    ):
        each = regions[name]
        assert (each.student_mass, each.teacher_mass) == pytest.approx(value)
    assert (last.coverage, last.coverage_upper) == pytest.approx(
        (regions["union"].student_mass, regions["union"].student_mass_upper)
    )
    masses = [each.student_on_student for each in report.table]
    assert masses == sorted(masses)
    assert report.rows == whole.rows


def test_what_the_store_lacks_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="top 4 ids of both models") as error:
        run_region_probe(config(RegionProbeConfig, case[0], k=8))
    assert "--k 4" in str(error.value.hint)
    with pytest.raises(ConfigError, match="one of them is given"):
        run_topk_probe(config(TopkProbeConfig, case[0], model=case[1].name))
    bare = make_unit(0, vocab=99, lengths=[4, 3, 2, 5, 1, 2], at_student=False)
    store, _ = make_case(tmp_path / "bare", [bare])
    with pytest.raises(ObjectiveError, match="log-probs at the student's ids"):
        run_region_probe(config(RegionProbeConfig, store))
    with pytest.raises(ObjectiveError, match="log-probs at the student's ids"):
        run_topk_probe(config(TopkProbeConfig, store))
    rollouts = replace(bare.rollouts, loss_mask=np.zeros_like(bare.rollouts.loss_mask))
    full = make_unit(0, vocab=99, lengths=[4, 3, 2, 5, 1, 2])
    masked, _ = make_case(tmp_path / "masked", [replace(full, rollouts=rollouts)])
    with pytest.raises(IncompleteError, match="no row"):
        run_region_probe(config(RegionProbeConfig, masked))


def test_powers_end_at_the_largest() -> None:
    assert powers(1) == (1,)
    assert powers(6) == (1, 2, 4, 6)
    assert powers(16) == (1, 2, 4, 8, 16)


def by_autograd(log_q: Tensor, z: Tensor, k: int) -> dict[str, Tensor]:
    """Return the gradient of each deterministic estimator of one row, by autograd."""
    best = {name: torch.zeros(len(z), dtype=torch.bool) for name in "pq"}
    best["p"][z.topk(k).indices] = True
    best["q"][log_q.topk(k).indices] = True

    def renormalised(mask: Tensor, p: Tensor) -> Tensor:
        a, b = (x[mask].log_softmax(0) for x in (p, log_q))
        return (a.exp() * (a - b)).sum()

    def bucket(mask: Tensor, p: Tensor) -> Tensor:
        a, b = (
            torch.cat([x[mask], *([] if mask.all() else [x[~mask].logsumexp(0, keepdim=True)])])
            for x in (p, log_q)
        )
        return (a.exp() * (a - b)).sum()

    def released(mask: Tensor, p: Tensor) -> Tensor:
        held = p.detach()
        return (held[mask].softmax(0) * (held - log_q)[mask] * p[mask]).sum()

    losses = {
        "student_topk": (renormalised, best["p"]),
        "teacher_topk": (renormalised, best["q"]),
        "overlap": (renormalised, best["p"] & best["q"]),
        "student_topk_bucket": (bucket, best["p"]),
        "teacher_topk_bucket": (bucket, best["q"]),
        "student_released": (released, best["p"]),
    }
    found = {}
    for name, (loss_of, mask) in losses.items():
        leaf = z.clone().requires_grad_()
        loss = loss_of(mask, leaf.log_softmax(0)) if mask.any() else 0 * leaf.sum()
        (found[name],) = torch.autograd.grad(loss, leaf)
    return found


V = 7


@pytest.fixture(scope="module")
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    p, q = (2 * torch.randn(5, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return p, q


def test_estimators_equal_autograd_and_enumeration(logits: tuple[Tensor, Tensor]) -> None:
    p, q = logits
    ks, draws = (1, 2, 4, V), (4,)
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    found = dict(estimates(log_p, log_q, ks, draws))
    assert list(found) == names(ks, draws)
    g, _ = full_gradient(log_p, log_q)
    for row in range(len(p)):
        # Each token with its probability: no draw.
        leaf = p[row].clone().requires_grad_()
        live = leaf.log_softmax(0)
        each = torch.stack(
            [
                torch.autograd.grad(
                    (live[y].detach() - log_q[row, y]) * live[y], leaf, retain_graph=True
                )[0]
                for y in range(V)
            ]
        )
        weight = log_p[row].exp()
        torch.testing.assert_close(g[row], weight @ each)
        variance = weight @ (each - g[row]).square().sum(1)
        torch.testing.assert_close(found["sampled", 1].variance[row], variance)
        torch.testing.assert_close(found["mc", 4].variance[row], variance / 4)
        for k in ks:
            for name, gradient in by_autograd(log_q[row], p[row], k).items():
                if k > 1 or name in ("student_topk_bucket", "teacher_topk_bucket"):
                    torch.testing.assert_close(found[name, k].mean[row], gradient)
    for name, k in names([V], []):
        torch.testing.assert_close(found[name, k].mean, g, msg=f"{name}: k = V has no bias")


def test_the_report_has_relative_errors(logits: tuple[Tensor, Tensor]) -> None:
    p, q = logits
    sums = EstimatorSums(ks=(2,), draws=(2,))
    # The last row has equal models.
    sums.add(torch.cat([p, p[:1]]), torch.cat([q, p[:1]]), np.array([0, 0, 1, 1, 2, 2]))
    report = sums.report()
    assert (report.rows, report.left_out) == (5, 1)
    lines = {(each.estimator, each.k): each for each in report.table}
    g, kl = full_gradient(p.log_softmax(1), q.log_softmax(1))
    topk = dict(estimates(p.log_softmax(1), q.log_softmax(1), (2,), ()))["student_topk", 2].mean
    bias = (topk - g).norm(dim=1) / g.norm(dim=1)
    assert lines["student_topk", 2].bias == pytest.approx(float(bias.mean()))
    assert lines["student_topk", 2].rms_error == pytest.approx(float((topk - g).norm() / g.norm()))
    assert lines["sampled", 1].variance == pytest.approx(2 * lines["mc", 2].variance)
    assert lines["sampled", 1].bias == 0
    assert report.reverse_kl == pytest.approx(float(kl.sum() / 6))
    json.dumps(asdict(report), allow_nan=False)
    same = EstimatorSums(ks=(2,), draws=())
    same.add(p, p, np.arange(5))
    with pytest.raises(IncompleteError, match="both models agree"):
        same.report()


def test_estimators_of_two_models_on_the_rows_of_a_store(case: Case, tmp_path: Path) -> None:
    store, model = case
    teacher = save_folder(tmp_path / "teacher", make_model(seed=1))
    settings = {"model": model.name, "teacher_model": str(teacher), "positions": 12}
    figure = tmp_path / "k.svg"
    _, report = run_topk_probe(config(TopkProbeConfig, store, **settings), figure)
    assert report is not None
    assert report.rows >= 12
    of = {(each.estimator, each.k): each for each in report.table}
    assert of["sampled", 1].bias == 0 < of["sampled", 1].variance
    assert of["student_topk", 64].rms_error < of["student_topk", 2].rms_error
    assert of["mc", 64].rms_error == pytest.approx(of["sampled", 1].rms_error / 8)
