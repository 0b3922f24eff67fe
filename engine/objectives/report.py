"""Data of exactness: the facts of a cache and a student, and the labels that follow from them."""

from dataclasses import dataclass
from enum import StrEnum


class Served(StrEnum):
    """The exactness of an objective on any cache that has the data it needs."""

    EXACT = "exact"
    COARSENED = "exact, coarsened"
    CUT = "exact, teacher cut to S"
    UNCACHED = "exact, uncached ids left out"
    FROZEN = "exact, S(p) frozen"
    ON_POLICY = "unbiased on policy"
    ANY_AGE = "unbiased at any age"
    FLOOR = "biased by its floor"
    CONTROL = "a control, no teacher"
    SURROGATE = "span-exact, a surrogate"
    HEURISTIC = "heuristic, truncated"


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
    mixture: str = ""
    """Several teachers with weights, whose losses are averaged; empty for one on each row."""
    mixture_kind: str = "sum"
    """`sum` of their losses, or the loss from their `arithmetic` or `geometric` mean."""
    weighting: str = ""
    """Source of their weights, as text, where they are computed."""
    own_ids: tuple[str, ...] = ()
    """Those that did not score the student's ids, only their own."""
    rewards: bool = False
    """The rollouts have rewards."""
    samples: int = 0
    """Responses to each prompt."""
    max_age: int = 0
    """In a loop: updates between the student that samples a round and its first update, at most."""
    scored: str = ""
    """Positions that have a score, as text, where it is not all of them."""
    imported: str = ""
    """Origin of rollouts that another program sampled, as text; empty for our own. The student
    scored them, and did not draw them: ages are unknown."""
    known_draws: bool = True
    """The log-probs of the drawn ids are known, under the distribution that they are drawn from."""
    span_rows: str | None = None
    """Of a teacher with another tokenizer: the row of each span that has its best ids, `none`,
    `starts` or `ends`. None for a teacher with the student's."""
    entropy_bounds: bool = False
    """The teacher returned only top-k log-probs: its entropy is an interval, its tail 1 - sum."""

    @property
    def known_ages(self) -> bool:
        """Return True where versions count the updates of this student."""
        return self.same_base_weights and not self.imported

    @property
    def ages(self) -> tuple[int | None, ...]:
        """Return the updates between each version and the student, None where it is not known."""
        if not self.versions:
            return (0, self.max_age) if self.max_age else (0,)
        if not self.known_ages or (now := self.student_version) is None:
            return (None,)
        return tuple(now - version for version in self.versions)

    def prefixes(self) -> str:
        """Return the policies that sampled the rollouts, as text."""
        if self.imported:
            return f"imported, {self.imported}"
        if not self.versions and self.max_age:
            return f"of a student at most {self.max_age} updates older, new in every round"
        if not self.versions:
            return "of the current student, new in every round"
        low, high = min(self.versions), max(self.versions)
        versions = f"version {low}" if low == high else f"versions {low} to {high}"
        return versions if self.same_base_weights else f"{versions} of other base weights"


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
