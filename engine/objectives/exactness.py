"""Exactness: how exactly a cache serves an objective after the student has moved.

Three things can be exact or not: the scores at the ids of the support, the set of those ids, and
the estimator. The prefixes are always those of the rollouts. A combination that the cache cannot
serve raises ObjectiveError.
"""

from dataclasses import dataclass
from enum import StrEnum

from logitcask.engine.backends.returned import RESOLVED
from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.modifiers import Baseline, EntropyGate
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.presets import FULL_VOCAB_K, Preset
from logitcask.engine.objectives.supports import SAMPLED_SUPPORTS


class Served(StrEnum):
    """The exactness of an objective on any cache that has the data it needs."""

    EXACT = "exact"
    COARSENED = "exact, coarsened"
    UNCACHED = "exact, uncached ids left out"
    FROZEN = "exact, S(p) frozen"
    ON_POLICY = "unbiased on policy"
    ANY_AGE = "unbiased at any age"
    FLOOR = "biased by its floor"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheInfo:
    """Properties of the rollouts, the scores and the student that decide the exactness."""

    student_k: int
    """Ids of the student's own top-k per position of the rollouts."""
    k_min: int
    """Of the score request: the teacher's top-k is exact up to this k."""
    k_max: int
    at_student: bool
    """The teacher scored the student's ids too; else only its own kept ids have a score."""
    versions: tuple[int, ...]
    """Distinct versions of the behaviour policies; empty in a loop, where every round samples from
    the current student.
    """
    student_version: int | None
    """Of the student to be trained; None if it is not known."""
    same_base_weights: bool
    """It has the base weights of the behaviour policies; else it is an off-lineage student."""
    same_template: bool
    """The student's own template renders the prompts as they are in the rollouts."""
    plain_sampling: bool = True
    """Sampled at temperature 1 from the whole distribution."""
    same_weights: bool = True
    """The student's weights are those that sampled; two runs may reach one version."""
    allow_off_lineage: bool = False
    """`--allow-off-lineage`."""
    n_vocab: int = 0
    """Ids that both tokenizers know."""
    mc_draws: int = 0
    """Ids per position that the behaviour policy drew in addition to its token."""
    at_mc: bool = False
    """The teacher scored all of those."""
    q_draws: int = 0
    """Ids per position that were drawn from the teacher; 0 if its top ids were kept."""
    base: bool = False
    """Scores of a base model are available."""
    entropy_bounds: bool = False
    """The teacher returned only top-k log-probs: its entropy is an interval, its tail 1 - sum."""

    @property
    def ages(self) -> tuple[int | None, ...]:
        """Return the updates between each version and the student, None where it is not known."""
        if not self.versions:
            return (0,)
        if not self.same_base_weights or (now := self.student_version) is None:
            return (None,)
        return tuple(now - version for version in self.versions)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactnessReport:
    """Exactness of one run; printed before it and stored in run.json."""

    scores: str
    support: str
    estimator: str
    prefixes: str
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        labels = ("scores", "support", "estimator", "prefixes")
        return [
            *(f"{label}: {getattr(self, label)}" for label in labels),
            *(f"note: {note}" for note in self.notes),
        ]


def check_exactness(objective: Objective | Preset, cache: CacheInfo) -> ExactnessReport:
    """Return the exactness of an objective on this cache.

    Raises ObjectiveError if the cache cannot serve it.
    """
    notes = []
    if isinstance(objective, Preset):
        notes += [objective.note] if objective.note else []
        objective = objective.objective
    _check_draws(objective, cache)
    _check_k(objective, cache)
    if objective.support == "student":
        _check_student(objective, cache)
    if objective.needs_base and not cache.base:
        raise ObjectiveError(
            "this objective needs scores of a base model, and --base names none",
            hint="score the rollouts with it (score --teacher-kind "
            "base), and name its scores with --base",
        )
    if not cache.same_base_weights:
        notes.append(
            "Off-lineage student: a model of other base weights sampled these rollouts, so ages "
            "are unknown."
        )
    if not cache.same_template:
        notes.append(
            "The student's chat template renders these prompts differently; it is trained on the "
            "stored prompts."
        )
    if cache.entropy_bounds:
        notes.append(
            "The teacher returned only top-k log-probs: its entropy is an interval of width "
            "entropy/teacher_width, entropy/gap is a lower bound, and the tail is 1 - their mass, "
            f"resolved to {RESOLVED:g}."
        )
    return ExactnessReport(
        scores=_scores(objective, cache),
        support=_support(objective, cache),
        estimator=_estimator(objective, cache),
        prefixes=_prefixes(cache),
        notes=tuple(notes),
    )


def served(objective: Objective) -> Served:
    """Return the exactness of an objective on any cache that has the data it needs."""
    names = {modifier.name for modifier in objective.modifiers}
    if objective.support == "teacher_mc" or "importance" in names:
        return Served.ANY_AGE
    if objective.support in SAMPLED_SUPPORTS:
        return Served.FLOOR if "floor" in names else Served.ON_POLICY
    if objective.support == "student":
        return Served.FROZEN
    if objective.support in ("union", "non_overlap"):
        return Served.UNCACHED
    return Served.COARSENED if objective.tail == "bucket" else Served.EXACT


def _check_draws(objective: Objective, cache: CacheInfo) -> None:
    if objective.support == "teacher_mc" and not cache.q_draws:
        raise ObjectiveError(
            "these scores are the teacher's top ids, and this objective averages over its draws",
            hint="score again, under another name, with --selection sampled --draws 50",
        )
    if objective.support not in SAMPLED_SUPPORTS and cache.q_draws:
        raise ObjectiveError(
            f"these scores are {cache.q_draws} ids drawn from the teacher, and support "
            f"{objective.support!r} is a top-k",
            hint="train with --objective rs_kd, or on scores that were made without --draws",
        )
    if objective.support == "mc" and not (cache.mc_draws and cache.at_mc):
        lack = "have no score" if cache.mc_draws else "are not in these rollouts"
        raise ObjectiveError(
            f"this objective averages over ids that the student drew, and they {lack}",
            hint="sample with --mc-draws 16 and score with "
            "--extra-ids mc, or train with --objective "
            "sampled_token",
        )


def _check_k(objective: Objective, cache: CacheInfo) -> None:
    if objective.support in SAMPLED_SUPPORTS:
        return
    # With a bucket any kept list is exact for the coarsened models; else S(q) must be known.
    coarse = objective.tail == "bucket" and objective.support in ("teacher", "overlap")
    if coarse or objective.support == "student":
        return
    if objective.k >= FULL_VOCAB_K and 0 < cache.n_vocab <= cache.k_min:
        return
    if objective.k >= FULL_VOCAB_K:
        raise ObjectiveError(
            f"this objective needs the whole vocabulary, {cache.n_vocab} ids, and these scores "
            f"have k_min = {cache.k_min}",
            hint=f"score again with --teacher-topk-min {cache.n_vocab} "
            f"--teacher-topk-max {cache.n_vocab} if that is "
            "affordable, or train with --objective gkd or forward_kl",
        )
    if objective.k > cache.k_min:
        also = f" --teacher-topk-max {objective.k}" if objective.k > cache.k_max else ""
        raise ObjectiveError(
            f"k = {objective.k} is more than k_min = {cache.k_min} of these scores: some rows "
            f"have fewer than {objective.k} of the teacher's ids",
            hint="score again with --teacher-topk-min "
            f"{objective.k}{also}, or train with --loss-topk {cache.k_min}",
        )


def _check_student(objective: Objective, cache: CacheInfo) -> None:
    if not cache.at_student:
        raise ObjectiveError(
            "these scores lack the teacher's log-probs at the student's ids, and a student support "
            "needs them",
            hint="score with a teacher that can score chosen ids, or train with "
            "--objective overlap",
        )
    if objective.k > cache.student_k:
        raise ObjectiveError(
            f"k = {objective.k} is more than student_k = {cache.student_k} of these rollouts",
            hint=f"sample and score again with --student-topk {objective.k}, or train with "
            f"--loss-topk {cache.student_k}",
        )
    if not cache.same_base_weights and not cache.allow_off_lineage:
        raise ObjectiveError(
            "off-lineage student: S(p) is frozen at the policy that sampled the rollouts "
            f"({_prefixes(cache)}), and the student has other base weights",
            hint="train with --objective overlap, whose S(p) is the current one, or allow it with "
            "--allow-off-lineage",
        )


def _scores(objective: Objective, cache: CacheInfo) -> str:
    text = _exact_scores(objective)
    if not cache.entropy_bounds:
        return text
    if objective.tail == "bucket":
        text += f"; the bucket is resolved to {RESOLVED:g}"
    if any(isinstance(each, Baseline) and each.on == "teacher" for each in objective.modifiers):
        text += (
            f"; the baseline's bucket is resolved to {RESOLVED:g}, which affects only the variance"
        )
    if any(isinstance(each, EntropyGate) for each in objective.modifiers):
        text += (
            "; the gate opens where the lower end of the teacher's entropy is above its bound, and "
            f"its bucket is resolved to {RESOLVED:g}"
        )
    return text


def _exact_scores(objective: Objective) -> str:
    if objective.tail == "bucket":
        first = f"first {objective.k} kept ids" if objective.support == "teacher" else "support"
        return f"exact for both models coarsened to the {first} and one bucket: a lower bound of KL"
    top = "every id" if objective.k >= FULL_VOCAB_K else f"the teacher's top-{objective.k}"
    scored = f"exact at {top} and at the other scored ids of the current student"
    return {
        "teacher": f"exact: every row has {top}",
        "overlap": f"exact: every row has {top}",
        "union": scored,
        "non_overlap": scored,
        "student": "exact: the teacher scored the student's ids",
        "sampled": "exact: the teacher's log-prob of the sampled id",
        "mc": "exact: the teacher scored the drawn ids",
        "teacher_mc": "exact: the teacher's log-prob of the ids it drew",
    }[objective.support]


def _support(objective: Objective, cache: CacheInfo) -> str:
    k = objective.k
    missing = "ids without a score are left out, see cache/uncached_mass"
    return {
        "teacher": "fixed: the vocabulary"
        if k >= FULL_VOCAB_K
        else f"fixed: the teacher's top-{k}",
        "overlap": f"current: the student's top-{k} within the teacher's, all of it scored",
        "union": f"current: the student's top-{k} and the teacher's; {missing}",
        "non_overlap": f"current: the ids in one of the two top-{k} alone; {missing}",
        "student": f"frozen: the top-{k} of the behaviour policy ({_prefixes(cache)}); the current "
        "one may differ, see cache/uncached_mass",
        "sampled": "fixed: the sampled id",
        "mc": f"fixed: {cache.mc_draws} ids that the behaviour policy drew",
        "teacher_mc": f"fixed: {cache.q_draws} ids that were drawn from the teacher",
    }[objective.support]


def _estimator(objective: Objective, cache: CacheInfo) -> str:
    if objective.support not in SAMPLED_SUPPORTS:
        if objective.estimator == "policy_gradient":
            return "deterministic, but not the gradient of a divergence"
        return "deterministic"
    if objective.support == "teacher_mc":
        return f"{cache.q_draws} draws per position, unbiased for KL(q || p) at any age"
    mc = objective.support == "mc"
    draws = f"{cache.mc_draws} draws" if mc else "one draw"
    names = {modifier.name for modifier in objective.modifiers}
    if "floor" in names:
        return f"{draws} per position, biased by the floor"
    # The MC ids come from the full distribution at temperature 1, however the token was sampled.
    full = cache.plain_sampling or mc
    if "importance" in names and full:
        return (
            f"{draws} per position, importance-weighted: unbiased for KL(p || q) at any age, "
            "except for the prefixes"
        )
    if cache.ages == (0,) and cache.same_weights and full:
        update = "first update" if cache.versions else "first update of a round"
        return (
            f"{draws} per position, unbiased for KL(p || q) at age 0, off policy after the {update}"
        )
    ages = ", ".join("unknown" if age is None else str(age) for age in cache.ages)
    reason = "" if full else ", from a tempered or truncated distribution"
    if cache.ages == (0,) and not cache.same_weights:
        reason += ", but of another run"
    weighted = "importance-weighted" if "importance" in names else "not importance-weighted"
    return f"{draws} per position, biased: off policy (age {ages}{reason}) and {weighted}"


def _prefixes(cache: CacheInfo) -> str:
    if not cache.versions:
        return "of the current student, new in every round"
    low, high = min(cache.versions), max(cache.versions)
    versions = f"version {low}" if low == high else f"versions {low} to {high}"
    return versions if cache.same_base_weights else f"{versions} of other base weights"
