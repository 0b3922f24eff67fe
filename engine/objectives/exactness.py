"""What a cache can serve of an objective once the student has moved: said in words, or refused.

Three things can each be exact or not, whatever the objective: the scores at the ids it looks at,
the set of those ids, and the estimator. The prefixes are always those of the rollouts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.presets import Preset

COVERAGE_WARN = 0.95
DRIFT_WARN = 0.05
"""Nats of k3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the rollouts, the scores and the student at hand are."""

    student_k: int
    """Ids of the student's own top-k that the rollouts hold a position."""
    k_min: int
    """Of the score request: the teacher's top-k is exact up to this k."""
    k_max: int
    at_student: bool
    """The teacher was asked at the student's ids too; else its own kept ids are all that is known.
    """
    versions: tuple[int, ...]
    """Versions of the students that sampled, each once; empty in a loop, where every round samples
    from the student as it then is.
    """
    student_version: int
    """Of the student that is to be trained."""
    same_root: bool
    """It descends from the model that those students descend from; else it is foreign."""
    same_template: bool
    """Prompts were rendered as the student's own template renders them."""
    plain_sampling: bool = True
    """Sampled at temperature 1 from the whole distribution."""
    same_weights: bool = True
    """The student has the digest that sampled: two runs of one root may reach one version."""
    allow_foreign: bool = False
    """`--foreign-student`."""

    @property
    def ages(self) -> tuple[int | None, ...]:
        """Updates between each version and the student; None for a foreign one."""
        if not self.versions:
            return (0,)
        if not self.same_root:
            return (None,)
        return tuple(self.student_version - version for version in self.versions)

    @property
    def on_policy(self) -> bool:
        return self.ages == (0,) and self.same_weights and self.plain_sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Labels of a run; they are printed before it and stored with it."""

    scores: str
    support: str
    estimator: str
    prefixes: str
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For a person."""
        labels = ("scores", "support", "estimator", "prefixes")
        return [
            *(f"{label}: {getattr(self, label)}" for label in labels),
            *(f"note: {note}" for note in self.notes),
        ]


def verdict(what: Objective | Preset, facts: Facts) -> Verdict:
    """Labels of this objective on this cache. Raises ObjectiveError where it cannot be served."""
    objective = what.objective if isinstance(what, Preset) else what
    _check_k(objective, facts)
    if objective.support == "student":
        _check_student(objective, facts)
    notes = [what.note] if isinstance(what, Preset) and what.note else []
    if not facts.same_root:
        notes.append("Foreign student: another model sampled these rollouts, ages are unknown.")
    if not facts.same_template:
        notes.append(
            "The student's chat template renders prompts otherwise than these rollouts hold them; "
            "it is trained on the prompts as held."
        )
    return Verdict(
        scores=_scores(objective),
        support=_support(objective, facts),
        estimator=_estimator(objective, facts),
        prefixes=_prefixes(facts),
        notes=tuple(notes),
    )


def warnings(what: Objective | Preset, metrics: Mapping[str, float | None]) -> list[str]:
    """What the metrics of an update say against this objective on this cache; for a person.

    The bounds are starting values, not yet calibrated; nothing is skipped because of them.
    """
    objective = what.objective if isinstance(what, Preset) else what
    found = []
    coverage, drift = metrics.get("cache/coverage"), metrics.get("cache/drift_k3")
    live = objective.support in ("overlap", "student")
    if live and coverage is not None and coverage < COVERAGE_WARN:
        found.append(
            f"cache/coverage = {coverage:.3f}: only that share of the student's mass has a score, "
            f"and under {COVERAGE_WARN} the loss sees too little of it; score with a larger "
            "--k-max, or sample and score again"
        )
    if objective.support == "sampled" and drift is not None and drift > DRIFT_WARN:
        found.append(
            f"cache/drift_k3 = {drift:.3f} nats: over {DRIFT_WARN} the sampled ids are no longer "
            "draws of this student; sample and score again"
        )
    return found


def _check_k(objective: Objective, facts: Facts) -> None:
    # With a tail any kept list is exact for what it coarsens to; elsewhere S(q) must be known.
    in_teacher = objective.support in ("teacher", "overlap") and objective.outside != "tail"
    if in_teacher and objective.k > facts.k_min:
        also = f" --k-max {objective.k}" if objective.k > facts.k_max else ""
        raise ObjectiveError(
            f"k = {objective.k} is more than k_min = {facts.k_min} of these scores: some rows hold "
            f"fewer than {objective.k} of the teacher's ids",
            remedy=f"score again with --k-min {objective.k}{also}, or train with --k {facts.k_min}",
        )


def _check_student(objective: Objective, facts: Facts) -> None:
    if not facts.at_student:
        raise ObjectiveError(
            "this teacher was not asked at the student's ids, and a student support needs its "
            "log-probs there",
            remedy="score with a teacher that answers at chosen ids, or train with "
            "--objective overlap",
        )
    if objective.k > facts.student_k:
        raise ObjectiveError(
            f"k = {objective.k} is more than student_k = {facts.student_k} of these rollouts",
            remedy=f"sample and score again with --student-k {objective.k}, or train with "
            f"--k {facts.student_k}",
        )
    if not facts.same_root and not facts.allow_foreign:
        raise ObjectiveError(
            "foreign student: S(p) is frozen where the rollouts were sampled "
            f"({_prefixes(facts)}), and the student to be trained is not of that root",
            remedy="train with --objective overlap, whose S(p) is live, or allow it with "
            "--foreign-student",
        )


def _scores(objective: Objective) -> str:
    if objective.outside == "tail":
        first = f"first {objective.k} kept ids" if objective.support == "teacher" else "support"
        return f"exact for both models coarsened to the {first} and one bucket: a lower bound of KL"
    return {
        "teacher": f"exact: every row holds the teacher's top-{objective.k}",
        "overlap": f"exact: every row holds the teacher's top-{objective.k}",
        "student": "exact: the teacher was asked at the student's ids",
        "sampled": "exact: the teacher's log-prob of the sampled id",
    }[objective.support]


def _support(objective: Objective, facts: Facts) -> str:
    k = objective.k
    return {
        "teacher": f"fixed: the teacher's top-{k}",
        "overlap": f"live: the student's top-{k} of today within the teacher's, which never leaves "
        "what was scored",
        "student": f"frozen: the top-{k} of the student that sampled ({_prefixes(facts)}); "
        "today's may differ, see cache/miss_mass",
        "sampled": "fixed: the sampled id",
    }[objective.support]


def _estimator(objective: Objective, facts: Facts) -> str:
    if objective.support != "sampled":
        if objective.form == "advantage":
            return "deterministic, though not the gradient of a divergence"
        return "deterministic"
    if facts.on_policy:
        when = "first update" if facts.versions else "first update of a round"
        return (
            f"one draw per position, unbiased for KL(p || q) at age 0, off policy after the {when}"
        )
    ages = ", ".join("unknown" if age is None else str(age) for age in facts.ages)
    how = "" if facts.plain_sampling else ", from a tempered or truncated distribution"
    if facts.ages == (0,) and not facts.same_weights:
        how += ", but of another run"
    return (
        f"one draw per position, biased: off policy (age {ages}{how}) and not importance-weighted"
    )


def _prefixes(facts: Facts) -> str:
    if not facts.versions:
        return "of the student itself, renewed every round"
    low, high = min(facts.versions), max(facts.versions)
    versions = f"version {low}" if low == high else f"versions {low} to {high}"
    return versions if facts.same_root else f"{versions} of another root"
