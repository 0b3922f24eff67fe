"""Mass that the top-k of student and teacher hold, against k, from the store alone.

A cache of the teacher's scores holds S(p) and S(q) of some k: the mass outside of them is what a
loss on these ids does not see. The definitions are those of engine/metrics; p is the student that
sampled. Where log p of a teacher's id is not stored, the student's mass is given as a range.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from logitcask.engine.errors import IncompleteError
from logitcask.engine.metrics.metrics import overlap_advantage, overlap_ratio
from logitcask.engine.packing.batches import PlannedPacks
from logitcask.engine.probes.topk.rows import (
    region_masks,
    sampled_rows,
    student_mass,
    teacher_mass,
)
from logitcask.engine.types import Array, Progress, no_progress

ENOUGH = 0.99
"""Mass from which on a top-k is said to hold nearly all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TopK:
    """Means over the rows at one k. `A_on_B`: the mass of A on the top-k of B."""

    k: int
    overlap_ratio: float
    """|S(p) & S(q)| / k (Eq. 6)."""
    overlap_advantage: float
    """Eq. 7, nats."""
    student_on_student: float
    """The student's mass on its own top-k."""
    teacher_on_student: float
    """The teacher's mass on the student's top-k."""
    teacher_on_teacher: float
    student_on_teacher: float
    """At least: on the ids with a stored log p."""
    student_on_teacher_upper: float
    coverage: float
    """The student's mass on both top-k together, at least: what a cache of this k covers."""
    coverage_upper: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKReport:
    rows: int
    table: tuple[TopK, ...]
    reading: str


def powers(most: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... and `most` itself."""
    return tuple(sorted({*(1 << i for i in range(most.bit_length())), most}))


def topk_report(
    packs: PlannedPacks, ks: Sequence[int], *, progress: Progress = no_progress
) -> TopKReport:
    """Measure each k; the largest is stored for every row, of both models.

    Raises IncompleteError where no row counts in a loss.
    """
    rows, sums = 0, np.zeros((len(ks), 9))
    for each in sampled_rows(packs, max(ks), stage="k", progress=progress):
        rows += len(each.rows)
        for at, k in enumerate(ks):
            x = each.at_k(k)
            masks = region_masks(x)
            student, teacher = masks["student"], masks["teacher"]
            values = (
                overlap_ratio(x),
                overlap_advantage(x),
                student_mass(each, student)[0],
                teacher_mass(each, student),
                teacher_mass(each, teacher),
                *student_mass(each, teacher),
                *student_mass(each, masks["union"]),
            )
            sums[at] += [float(value.sum()) for value in values]
    if not rows:
        raise IncompleteError(
            "no row of these rollouts is scored and counts in a loss",
            hint="probe rollouts that hold sampled tokens, with scores",
        )
    table = tuple(_topk(k, mean) for k, mean in zip(ks, sums / rows, strict=True))
    return TopKReport(rows=rows, table=table, reading=_reading(table))


def _topk(k: int, mean: Array) -> TopK:
    ratio, advantage, p_on_p, q_on_p, q_on_q, p_on_q, p_on_q_hi, covered, covered_hi = mean.tolist()
    return TopK(
        k=k,
        overlap_ratio=ratio,
        overlap_advantage=advantage,
        student_on_student=p_on_p,
        teacher_on_student=q_on_p,
        teacher_on_teacher=q_on_q,
        student_on_teacher=p_on_q,
        student_on_teacher_upper=p_on_q_hi,
        coverage=covered,
        coverage_upper=covered_hi,
    )


def _reading(table: Sequence[TopK]) -> str:
    held = {each.k: min(each.student_on_student, each.teacher_on_teacher) for each in table}
    enough = [k for k, mass in held.items() if mass >= ENOUGH]
    if enough:
        return f"from k = {enough[0]} on each model has {ENOUGH:.0%} of its mass on its own top-k"
    last = max(held)
    return (
        f"at k = {last}, the most that is stored, one model has {held[last]:.0%} of its mass on "
        "its own top-k: a loss on these ids does not see the rest"
    )
