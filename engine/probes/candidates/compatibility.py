"""Student and candidate teachers on a few prompts: agreement, knowledge, assessment, rank.

All means are over the student's responses but `novelty/teacher_correct`, which is over the
teacher's: what it must write to be right, and the student would hardly write. A novelty over the
student's own correct responses is the teacher's addition to these. Standard errors are over
prompts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from logitcask.engine.probes.candidates.agreement import MEASURES, AgreementRows, Estimate, estimate
from logitcask.engine.probes.candidates.assessment import (
    ASSESSMENTS,
    LEAST_PROMPTS,
    NEW_ABOVE,
    REFERENCES,
    Assessment,
    Evidence,
    assessment,
)
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.types import Array

READING = (
    "the assessment rests on our thresholds (engine/probes/README.md), which a teacher can pass "
    "and still fail; the levels of the paper are at k = 16 on math"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherReport:
    """One candidate. An estimate is None where nothing gives it."""

    name: str
    model: str
    assessment: Assessment
    because: str
    """The reasons of the assessment."""
    rank: int = 0
    """1 = first."""
    ahead: Estimate | None = None
    """Accuracy less that of the teacher one rank below, paired by prompt."""
    measures: Mapping[str, Estimate | None]
    """MEASURES; acceptance/weakest; novelty/student_correct and /teacher_correct; accuracy/teacher
    and /gain; verified/* = shares of the prompts that the teacher, the student, both or
    neither get right, in more than half of the responses."""
    accuracy: Mapping[str, float]
    """Prompt id -> share of the teacher's responses that are correct; empty without a grader."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompatibilityReport:
    """Candidates by rank."""

    k: int
    prompts: int
    rows: int
    """Response tokens of the student that count."""
    store: str
    rollouts: str
    student_accuracy: Estimate | None
    accuracy: Mapping[str, float]
    """Prompt id -> share of the student's responses that are correct; empty without a grader."""
    teachers: tuple[TeacherReport, ...]
    references: tuple[tuple[str, str], ...]
    """Levels of the paper."""
    reading: str


def accuracies(
    store: Store, snapshot: Snapshot, *, rollouts: str, correct_from: float
) -> dict[str, float]:
    """Return prompt id -> share of its responses with a reward of at least `correct_from`.

    Empty where the rollouts have no rewards.
    """
    right: dict[str, list[bool]] = {}
    for segment in snapshot.rollouts(rollouts):
        data = store.read_rollouts(segment)
        if data.reward is None:
            continue
        for number, reward in zip(data.seq_prompt.tolist(), data.reward.tolist(), strict=True):
            right.setdefault(data.prompts[number].id, []).append(reward >= correct_from)
    return {name: sum(each) / len(each) for name, each in right.items()}


def teacher_report(
    name: str,
    model: str,
    rows: AgreementRows,
    *,
    correct_from: float,
    own: AgreementRows | None = None,
    student: Mapping[str, float] | None = None,
    teacher: Mapping[str, float] | None = None,
) -> TeacherReport:
    """Measure a teacher and give its assessment.

    own: rows of its own responses; student, teacher: accuracies on the same prompts. All are None
    for a teacher that did not sample, or without a grader.
    """
    measures = {each: rows.mean(each) for each in MEASURES}
    correct = rows.correct(correct_from)
    measures["novelty/student_correct"] = rows.mean("novelty", correct)
    measures["novelty/teacher_correct"] = (
        None if own is None else own.mean("novelty", own.correct(correct_from))
    )
    new, gain = None, None
    if student and teacher:
        s, t = (np.array([of[each] for each in student]) for of in (student, teacher))
        each_prompt = np.arange(len(s))
        gain = estimate(t - s, each_prompt)
        new = estimate(t - s - NEW_ABOVE * (1 - s), each_prompt)
        measures |= {"accuracy/teacher": estimate(t, each_prompt), "accuracy/gain": gain}
        measures |= _verified(s > 0.5, t > 0.5)
    weakest_at, weakest = rows.weakest(LEAST_PROMPTS) or (0, None)
    measures["acceptance/weakest"] = weakest
    common = [rows.ratio(f"overlap/mass_{of}", f"topk/mass_{of}") for of in ("student", "teacher")]
    said, because = assessment(
        Evidence(
            prompts=len(rows.prompts),
            common=min(common, key=lambda each: each.mean),
            weakest_at=weakest_at,
            weakest=weakest,
            entropy_ratio=rows.ratio("entropy/teacher", "entropy/student"),
            new=new,
            gain=gain,
        )
    )
    return TeacherReport(
        name=name,
        model=model,
        assessment=said,
        because=because,
        measures=measures,
        accuracy=dict(teacher or {}),
    )


def _verified(student: Array, teacher: Array) -> dict[str, Estimate | None]:
    """Return the shares of prompts that both, one or neither got right, each [M] bool."""
    each_prompt = np.arange(len(student))
    kinds = {
        "teacher_only": teacher & ~student,
        "both": teacher & student,
        "student_only": student & ~teacher,
        "neither": ~student & ~teacher,
    }
    return {
        f"verified/{name}": estimate(kind.astype(np.float64), each_prompt)
        for name, kind in kinds.items()
    }


def compare(
    reports: Sequence[TeacherReport],
    rows: AgreementRows,
    *,
    k: int,
    store: str,
    rollouts: str,
    student: Mapping[str, float],
) -> CompatibilityReport:
    """Rank teachers: by assessment, then by their gain, without one by the teacher's overlap mass.

    rows: of any teacher; student: accuracies, empty without a grader.
    """
    ordered = sorted(reports, key=_place)
    teachers = []
    for rank, each in enumerate(ordered, 1):
        below = ordered[rank] if rank < len(ordered) else None
        ahead = None
        if below is not None and each.accuracy and below.accuracy:
            gap = np.array([each.accuracy[name] - below.accuracy[name] for name in each.accuracy])
            ahead = estimate(gap, np.arange(len(gap)))
        teachers.append(replace(each, rank=rank, ahead=ahead))
    of_student = np.array(list(student.values()))
    return CompatibilityReport(
        k=k,
        prompts=len(rows.prompts),
        rows=len(rows.prompt),
        store=store,
        rollouts=rollouts,
        student_accuracy=estimate(of_student, np.arange(len(of_student))) if student else None,
        accuracy=student,
        teachers=tuple(teachers),
        references=REFERENCES,
        reading=READING,
    )


def _place(each: TeacherReport) -> tuple[float, ...]:
    gain, mass = (each.measures.get(name) for name in ("accuracy/gain", "overlap/mass_teacher"))
    return (
        ASSESSMENTS.index(each.assessment),
        math.inf if gain is None else -gain.mean,
        math.inf if mass is None else -mass.mean,
    )
