"""What a cache can serve of an objective once the student has moved: said in words, or refused.

Three things can each be exact or not, whatever the objective: the scores at the ids it looks at,
the set of those ids, and the estimator. The prefixes are always those of the rollouts.
"""

from dataclasses import dataclass

from logitcask.engine.backends.returned import RESOLVED
from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.modifiers import Baseline, EntropyGate
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.presets import WHOLE, Preset
from logitcask.engine.objectives.supports import DRAWN


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheInfo:
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
    student_version: int | None
    """Of the student that is to be trained; None where it is not known."""
    same_root: bool
    """It descends from the model that those students descend from; else it is foreign."""
    same_template: bool
    """Prompts were rendered as the student's own template renders them."""
    plain_sampling: bool = True
    """Sampled at temperature 1 from the whole distribution."""
    same_weights: bool = True
    """The student has the digest that sampled: two runs of one root may reach one version."""
    allow_foreign: bool = False
    """`--allow-off-lineage`."""
    n_vocab: int = 0
    """Ids that both tokenizers know."""
    mc_draws: int = 0
    """Ids that the rollouts' student drew a position, beside its tokens."""
    at_mc: bool = False
    """The teacher was asked at all of those."""
    q_draws: int = 0
    """Ids that the teacher drew a position; 0 where its best ids were kept."""
    base: bool = False
    """A base model's scores are at hand."""
    entropy_bounds: bool = False
    """The teacher told its best ids alone: its entropy is an interval, its tail what they leave."""

    @property
    def ages(self) -> tuple[int | None, ...]:
        """Updates between each version and the student; None for a foreign one, and for one whose
        version is not known.
        """
        if not self.versions:
            return (0,)
        if not self.same_root or (now := self.student_version) is None:
            return (None,)
        return tuple(now - version for version in self.versions)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactnessReport:
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


def check_exactness(what: Objective | Preset, facts: CacheInfo) -> ExactnessReport:
    """Labels of this objective on this cache. Raises ObjectiveError where it cannot be served."""
    objective = what.objective if isinstance(what, Preset) else what
    _check_draws(objective, facts)
    _check_k(objective, facts)
    if objective.support == "student":
        _check_student(objective, facts)
    if objective.needs_base and not facts.base:
        raise ObjectiveError(
            "this objective compares with a base model, and none was named",
            hint="score the rollouts with it (score --teacher-kind base), and name its "
            "scores with --base",
        )
    notes = [what.note] if isinstance(what, Preset) and what.note else []
    if not facts.same_root:
        notes.append("Foreign student: another model sampled these rollouts, ages are unknown.")
    if not facts.same_template:
        notes.append(
            "The student's chat template renders prompts otherwise than these rollouts hold them; "
            "it is trained on the prompts as held."
        )
    if facts.entropy_bounds:
        notes.append(
            "The teacher told its best ids alone: its entropy is an interval, as wide as "
            "entropy/teacher_width says, and entropy/gap a lower bound; the tail is 1 - their "
            f"mass, resolved to {RESOLVED:g}."
        )
    return ExactnessReport(
        scores=_scores(objective, facts),
        support=_support(objective, facts),
        estimator=_estimator(objective, facts),
        prefixes=_prefixes(facts),
        notes=tuple(notes),
    )


def served(objective: Objective) -> str:
    """In a few words, what any cache that holds what it needs serves of it."""
    names = {modifier.name for modifier in objective.modifiers}
    if objective.support == "teacher_mc" or "importance" in names:
        return "unbiased at any age"
    if objective.support in DRAWN:
        return "biased by its floor" if "floor" in names else "unbiased on policy"
    if objective.support == "student":
        return "exact, S(p) frozen"
    if objective.support in ("union", "non_overlap"):
        return "exact, ids missing"
    return "exact, coarsened" if objective.outside == "tail" else "exact"


def _check_draws(objective: Objective, facts: CacheInfo) -> None:
    if objective.support == "teacher_mc" and not facts.q_draws:
        raise ObjectiveError(
            "these scores are the teacher's best ids, and this objective averages over its draws",
            hint="score again, under another name, with --selection sampled --draws 50",
        )
    if objective.support not in DRAWN and facts.q_draws:
        raise ObjectiveError(
            f"these scores are {facts.q_draws} ids drawn from the teacher, and support "
            f"{objective.support!r} is made of best ids",
            hint="train with --objective rs_kd, or on scores that were made without --draws",
        )
    if objective.support == "mc" and not (facts.mc_draws and facts.at_mc):
        had = "were not asked of this teacher" if facts.mc_draws else "are not in these rollouts"
        raise ObjectiveError(
            f"this objective averages over ids that the student drew, and they {had}",
            hint="sample with --mc-draws 16 and score with --extra-ids mc, or train with "
            "--objective "
            "sampled_token",
        )


def _check_k(objective: Objective, facts: CacheInfo) -> None:
    if objective.support in DRAWN:
        return
    # With a tail any kept list is exact for what it coarsens to; elsewhere S(q) must be known.
    coarse = objective.outside == "tail" and objective.support in ("teacher", "overlap")
    if coarse or objective.support == "student":
        return
    if objective.k >= WHOLE and 0 < facts.n_vocab <= facts.k_min:
        return
    if objective.k >= WHOLE:
        raise ObjectiveError(
            f"this objective looks at the whole vocabulary, {facts.n_vocab} ids, and k_min = "
            f"{facts.k_min} of these scores",
            hint=f"score again with --teacher-topk-min {facts.n_vocab} --teacher-topk-max "
            f"{facts.n_vocab} where that "
            "is affordable, or train with --objective gkd or forward_kl",
        )
    if objective.k > facts.k_min:
        also = f" --teacher-topk-max {objective.k}" if objective.k > facts.k_max else ""
        raise ObjectiveError(
            f"k = {objective.k} is more than k_min = {facts.k_min} of these scores: some rows hold "
            f"fewer than {objective.k} of the teacher's ids",
            hint=f"score again with --teacher-topk-min {objective.k}{also}, or train with "
            f"--loss-topk {facts.k_min}",
        )


def _check_student(objective: Objective, facts: CacheInfo) -> None:
    if not facts.at_student:
        raise ObjectiveError(
            "this teacher was not asked at the student's ids, and a student support needs its "
            "log-probs there",
            hint="score with a teacher that answers at chosen ids, or train with "
            "--objective overlap",
        )
    if objective.k > facts.student_k:
        raise ObjectiveError(
            f"k = {objective.k} is more than student_k = {facts.student_k} of these rollouts",
            hint=f"sample and score again with --student-topk {objective.k}, or train with "
            f"--loss-topk {facts.student_k}",
        )
    if not facts.same_root and not facts.allow_foreign:
        raise ObjectiveError(
            "foreign student: S(p) is frozen where the rollouts were sampled "
            f"({_prefixes(facts)}), and the student to be trained is not of that root",
            hint="train with --objective overlap, whose S(p) is live, or allow it with "
            "--allow-off-lineage",
        )


def _scores(objective: Objective, facts: CacheInfo) -> str:
    words = _known(objective, facts)
    if not facts.entropy_bounds:
        return words
    if objective.outside == "tail":
        words += f"; the bucket is resolved to {RESOLVED:g}"
    if any(isinstance(each, Baseline) and each.on == "teacher" for each in objective.modifiers):
        words += (
            f"; the baseline's bucket is resolved to {RESOLVED:g}, which moves the variance alone"
        )
    if any(isinstance(each, EntropyGate) for each in objective.modifiers):
        words += (
            "; the gate opens where the least of the teacher's entropy is above its bound, and its "
            f"bucket is resolved to {RESOLVED:g}"
        )
    return words


def _known(objective: Objective, facts: CacheInfo) -> str:
    if objective.outside == "tail":
        first = f"first {objective.k} kept ids" if objective.support == "teacher" else "support"
        return f"exact for both models coarsened to the {first} and one bucket: a lower bound of KL"
    top = "every id" if objective.k >= WHOLE else f"the teacher's top-{objective.k}"
    live = f"exact where there are any: {top}, and what else of today's student was scored"
    return {
        "teacher": f"exact: every row holds {top}",
        "overlap": f"exact: every row holds {top}",
        "union": live,
        "non_overlap": live,
        "student": "exact: the teacher was asked at the student's ids",
        "sampled": "exact: the teacher's log-prob of the sampled id",
        "mc": "exact: the teacher was asked at the drawn ids",
        "teacher_mc": "exact: the teacher's log-prob of the ids it drew",
    }[objective.support]


def _support(objective: Objective, facts: CacheInfo) -> str:
    k = objective.k
    missing = "what was never scored of it is missing, see cache/miss_mass"
    return {
        "teacher": "fixed: the vocabulary" if k >= WHOLE else f"fixed: the teacher's top-{k}",
        "overlap": f"live: the student's top-{k} of today within the teacher's, which never leaves "
        "what was scored",
        "union": f"live: the student's top-{k} of today and the teacher's; {missing}",
        "non_overlap": f"live: what only one of the two top-{k} of today holds; {missing}",
        "student": f"frozen: the top-{k} of the student that sampled ({_prefixes(facts)}); "
        "today's may differ, see cache/miss_mass",
        "sampled": "fixed: the sampled id",
        "mc": f"fixed: {facts.mc_draws} ids that the student drew when it sampled",
        "teacher_mc": f"fixed: {facts.q_draws} ids that the teacher drew",
    }[objective.support]


def _estimator(objective: Objective, facts: CacheInfo) -> str:
    if objective.support not in DRAWN:
        if objective.form == "advantage":
            return "deterministic, though not the gradient of a divergence"
        return "deterministic"
    if objective.support == "teacher_mc":
        return f"{facts.q_draws} draws per position, unbiased for KL(q || p) at any age"
    mc = objective.support == "mc"
    draws = f"{facts.mc_draws} draws" if mc else "one draw"
    names = {modifier.name for modifier in objective.modifiers}
    if "floor" in names:
        return f"{draws} per position, biased by the floor"
    # The MC ids come from the whole law at temperature 1, however the token was sampled.
    whole = facts.plain_sampling or mc
    if "importance" in names and whole:
        return (
            f"{draws} per position, importance-weighted: unbiased for KL(p || q) at any age, "
            "though not for the prefixes"
        )
    if facts.ages == (0,) and facts.same_weights and whole:
        when = "first update" if facts.versions else "first update of a round"
        return (
            f"{draws} per position, unbiased for KL(p || q) at age 0, off policy after the {when}"
        )
    ages = ", ".join("unknown" if age is None else str(age) for age in facts.ages)
    how = "" if whole else ", from a tempered or truncated distribution"
    if facts.ages == (0,) and not facts.same_weights:
        how += ", but of another run"
    weighed = (
        "importance-weighted all the same" if "importance" in names else ("not importance-weighted")
    )
    return f"{draws} per position, biased: off policy (age {ages}{how}) and {weighed}"


def _prefixes(facts: CacheInfo) -> str:
    if not facts.versions:
        return "of the student itself, renewed every round"
    low, high = min(facts.versions), max(facts.versions)
    versions = f"version {low}" if low == high else f"versions {low} to {high}"
    return versions if facts.same_root else f"{versions} of another root"
