"""Metrics that the tokens of the viewer are coloured by.

The page computes both advantages, both surprises and the entropy gap from the log-probs and
entropies of p and q that it shows next to them. The definitions are those of engine/metrics,
engine/exchange/README.md and engine/probes/correctness.py; p is the student that sampled, as
stored, q the teacher, y the token.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One metric of a token."""

    id: str
    name: str
    unit: str
    """nats, or '' for a share in [0, 1]."""
    how: str
    """A sentence how to read it."""
    edges: tuple[float, ...]
    """Borders between the colours, ascending: 6 for one direction, 8 for two around 0."""
    worst: str
    """high, low or both: the end that deserves a closer look, in the stronger colour."""
    bad: float
    """Default threshold: tokens beyond it (`both`: beyond either sign of it) are underlined."""
    of_teacher: bool = True
    """It needs a teacher's scores."""


_KL = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_NATS = (0.1, 0.3, 1.0, 2.0, 4.0, 8.0)
_LOW = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
_BOUND = (
    "A lower bound: both distributions are cut to the ids that both sides store and one bucket."
)

MEASURES = (
    Measure(
        id="reverse_kl",
        name="KL(p ‖ q)",
        unit="nats",
        how="How far the student is from the teacher, weighed by the student: high where it puts "
        f"mass on what the teacher finds unlikely. {_BOUND}",
        edges=_KL,
        worst="high",
        bad=1.0,
    ),
    Measure(
        id="forward_kl",
        name="KL(q ‖ p)",
        unit="nats",
        how="How far the student is from the teacher, weighed by the teacher: high where it lacks "
        f"what the teacher would write. {_BOUND}",
        edges=_KL,
        worst="high",
        bad=1.0,
    ),
    Measure(
        id="span_advantage",
        name="advantage of the span, log q - log p",
        unit="nats",
        how="Of a teacher with another tokenizer: its log-prob of the smallest piece around the "
        "token that is whole tokens to both, less the student's. All tokens of the piece have it.",
        edges=(-3.0, -1.0, -0.3, -0.1, 0.1, 0.3, 1.0, 3.0),
        worst="both",
        bad=1.0,
    ),
    Measure(
        id="advantage",
        name="advantage log q(y) - log p(y)",
        unit="nats",
        how="What the teacher thinks of the sampled token: below 0 it wants it less often than the "
        "student, above 0 more often.",
        edges=(-3.0, -1.0, -0.3, -0.1, 0.1, 0.3, 1.0, 3.0),
        worst="both",
        bad=1.0,
    ),
    Measure(
        id="overlap_ratio",
        name="overlap ratio",
        unit="",
        how="Share of the ids that the top-k of both have in common. Ids of little mass count as "
        "much as others, so read it with the overlap mass.",
        edges=(0.25, 0.4, 0.5, 0.6, 0.75, 0.9),
        worst="low",
        bad=0.25,
    ),
    Measure(
        id="overlap_mass_student",
        name="overlap mass of p",
        unit="",
        how="The student's probability on the ids that are in the top-k of both. Low: it writes "
        "what the teacher does not consider.",
        edges=_LOW,
        worst="low",
        bad=0.9,
    ),
    Measure(
        id="overlap_mass_teacher",
        name="overlap mass of q",
        unit="",
        how="The teacher's probability on the ids that are in the top-k of both. Low: the student "
        "does not consider what the teacher would write.",
        edges=_LOW,
        worst="low",
        bad=0.9,
    ),
    Measure(
        id="teacher_surprise",
        name="teacher surprise -log q(y)",
        unit="nats",
        how="How unlikely the sampled token is for the teacher. High with a low entropy of the "
        "teacher: it is sure of something else.",
        edges=_NATS,
        worst="high",
        bad=4.0,
    ),
    Measure(
        id="student_surprise",
        name="student surprise -log p(y)",
        unit="nats",
        how="How unlikely the sampled token was for the student itself at temperature 1.",
        edges=_NATS,
        worst="high",
        bad=4.0,
        of_teacher=False,
    ),
    Measure(
        id="student_entropy",
        name="student entropy",
        unit="nats",
        how="How undecided the student is over the whole vocabulary: near 0 it knows what comes.",
        edges=(0.03, 0.1, 0.3, 1.0, 2.0, 4.0),
        worst="high",
        bad=2.0,
        of_teacher=False,
    ),
    Measure(
        id="teacher_entropy",
        name="teacher entropy",
        unit="nats",
        how="How undecided the teacher is. Of a server that returns its best ids alone it is the "
        "middle between the lowest and the highest possible value.",
        edges=(0.03, 0.1, 0.3, 1.0, 2.0, 4.0),
        worst="high",
        bad=2.0,
    ),
    Measure(
        id="entropy_gap",
        name="entropy gap",
        unit="nats",
        how="Distance of both entropies: high where one is sure and the other is not.",
        edges=(0.03, 0.1, 0.3, 0.6, 1.0, 2.0),
        worst="high",
        bad=1.0,
    ),
    Measure(
        id="coverage",
        name="coverage",
        unit="",
        how="The student's probability on its listed ids that the teacher scored. A loss on stored "
        "scores does not see the rest.",
        edges=_LOW,
        worst="low",
        bad=0.8,
    ),
)
