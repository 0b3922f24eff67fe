"""Regions of ids: the mass on each, and the share of the gradient that pulls at its logits.

In the paper (Sec. 4.2, Fig. 7) training on the overlap S(p) & S(q) alone does as well as on the
student's top-k, and training on the ids that one of both lacks does worse. The gradient is that of
the student's top-k by the logits z of a row, in two forms (p~, q~ renormalised on S(p)):

    opd            Eq. 5:          p~_v (log(p~_v / q~_v) - KL(p~ || q~)) on S(p), 0 elsewhere
    opd_released   the code's:     p~_v log(p_v / q_v) [v in S(p)] - p_v sum_S p~ log(p / q)

A share is the sum over rows of a region's squared norm, divided by that of all ids: disjoint
regions add up. p is the student that sampled, from its stored log-probs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcask.engine.errors import IncompleteError
from logitcask.engine.objectives import Objective
from logitcask.engine.objectives.evaluate import loss_terms
from logitcask.engine.objectives.supports import SUPPORTS, support_log_probs
from logitcask.engine.packing.batches import PlannedPacks
from logitcask.engine.probes.topk.rows import (
    REGIONS,
    SampledRows,
    region_masks,
    sampled_rows,
    student_mass,
    teacher_mass,
)
from logitcask.engine.types import Progress, no_progress

RELEASED = "opd_released"


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """Means over the rows; `gradient` and `share` have a key for each objective."""

    ids: float
    """Ids in the region."""
    student_mass: float
    """The student's mass on those with a stored log p."""
    student_mass_upper: float
    """The most that it can be."""
    teacher_mass: float
    gradient: Mapping[str, float]
    """Norm of the gradient at the region's logits, nats."""
    share: Mapping[str, float | None]
    """Share of the squared norm; None where the gradient is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionReport:
    """Regions of the top-k of both models."""

    k: int
    rows: int
    regions: Mapping[str, Region]
    """Name of REGIONS -> its means."""
    unseen_share: float | None
    """Share of the squared norm of `opd_released` at ids without a stored log p, at most: shares of
    that objective are of the ids that have one."""
    overlap_cosine: float | None
    """Cosine of the gradients of Eq. 5 on the overlap and on the student's top-k, of all rows as
    one vector; None where one of them is 0."""
    reading: str


def region_report(
    packs: PlannedPacks,
    objectives: Mapping[str, Objective],
    overlap: Objective,
    *,
    k: int,
    progress: Progress = no_progress,
) -> RegionReport:
    """Measure each region of the top-k of both models.

    objectives: `opd` and `opd_released` at k; overlap: Eq. 5 on the overlap at k; the store serves
    all of them. Raises IncompleteError where no row counts in a loss.
    """
    rows, sums = 0, dict[str, list[Tensor]]()
    unseen, dots = torch.zeros((), dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for each in sampled_rows(packs, k, stage="regions", progress=progress):
        rows += len(each.rows)
        gradients = {name: logit_gradient(each, one) for name, one in objectives.items()}
        _add(sums, "squares", [g.square().sum() for g, _ in gradients.values()])
        for name, mask in region_masks(each.at_k(k)).items():
            least, most = student_mass(each, mask)
            norms = [torch.where(mask, g, 0.0).norm(dim=1) for g, _ in gradients.values()]
            values = [mask.double().sum(1), least, most, teacher_mass(each, mask), *norms]
            _add(sums, name, [value.sum() for value in values])
            _add(sums, f"{name} squares", [norm.square().sum() for norm in norms])
        unseen += gradients[RELEASED][1].sum()
        one, other = gradients["opd"][0], logit_gradient(each, overlap)[0]
        dots += torch.stack([(a * b).sum() for a, b in ((one, other), (one, one), (other, other))])
    if not rows:
        raise IncompleteError(
            "no row of these rollouts is scored and counts in a loss",
            hint="probe rollouts that hold sampled tokens, with scores",
        )
    squares = dict(zip(objectives, map(float, sums["squares"]), strict=True))
    regions = {name: _region(name, sums, squares, rows) for name in REGIONS}
    whole = squares[RELEASED] + float(unseen)
    norm = float((dots[1] * dots[2]).sqrt())
    return RegionReport(
        k=k,
        rows=rows,
        regions=regions,
        unseen_share=float(unseen) / whole if whole > 0 else None,
        overlap_cosine=float(dots[0]) / norm if norm > 0 else None,
        reading=_reading(regions),
    )


def logit_gradient(each: SampledRows, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return ([C, S] dL/dz at the columns, 0 where log p is not stored; [C] bound elsewhere).

    The bound is of the squared norm at all ids without a stored log p.
    """
    rows, view = each.rows, each.view
    topk_index = rows.topk_index(view.top_ids)
    mask = SUPPORTS[objective.support](topk_index, rows, objective.k)
    inputs = support_log_probs(rows, view.log_p, topk_index, view.entropy, mask, objective.support)
    terms, _ = loss_terms(objective, inputs)
    gradient = torch.where(rows.ids >= 0, terms.at_ids + terms.dense_at_ids * view.log_p.exp(), 0.0)
    # sum p^2 <= max p sum p.
    return gradient, terms.dense.square() * each.bound * each.rest


def _add(sums: dict[str, list[Tensor]], name: str, values: list[Tensor]) -> None:
    known = sums.get(name)
    sums[name] = values if known is None else [a + b for a, b in zip(known, values, strict=True)]


def _region(
    name: str, sums: Mapping[str, list[Tensor]], totals: Mapping[str, float], rows: int
) -> Region:
    ids, least, most, mass, *norms = (float(value) / rows for value in sums[name])
    squares = dict(zip(totals, sums[f"{name} squares"], strict=True))
    return Region(
        ids=ids,
        student_mass=least,
        student_mass_upper=most,
        teacher_mass=mass,
        gradient=dict(zip(totals, norms, strict=True)),
        share={
            objective: float(squares[objective]) / total if total > 0 else None
            for objective, total in totals.items()
        },
    )


def _reading(regions: Mapping[str, Region]) -> str:
    overlap, mass = regions["overlap"].share["opd"], regions["overlap"].student_mass
    if overlap is None:
        return "the gradient is 0 on every row: on the student's top ids the models agree"
    text = f"the overlap holds {mass:.0%} of the student's mass and {overlap:.0%} of the gradient"
    if overlap > 0.9:
        return (
            f"{text}: training on it alone is about training on the student's top-k, as in the "
            "paper (Fig. 7)"
        )
    return (
        f"{text}: the rest is at ids that the teacher does not rank, which training on the overlap "
        "alone leaves out"
    )
