"""The objectives that have a name, with where they come from and what they ask of a store.

In formulas `~` is "renormalised on S" and sg[] is held fixed. k is each preset's own;
`find_preset(name, k=...)` gives another.
"""

from dataclasses import dataclass, replace

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A named objective."""

    name: str
    objective: Objective
    source: str
    """Paper, and the equation in it."""
    formula: str
    """Loss of one position, nats."""
    needs: str
    """What a store must hold for it."""
    staleness: str
    """What happens when the student moves away from the one that sampled, and what to watch."""
    note: str = ""
    """What a reader must know before trusting it; printed with the verdict."""


_ON_POLICY = (
    "the scores stay exact, but the sampled id is a draw of the student that sampled; watch "
    "cache/drift_k3: above 0.05 be careful, above 0.2 sample again"
)

_ALL = (
    Preset(
        name="overlap",
        objective=Objective(
            support="overlap",
            divergence="reverse_kl",
            outside="renormalize",
            form="divergence",
            k=16,
        ),
        source="arXiv 2604.13016, section 4.2, Overlap Top-k",
        formula="KL(p~ || q~) on S = S(p) & S(q), S(p) live",
        needs="teacher's kept ids, k <= k_min of the score request",
        staleness="exact at any age; watch cache/coverage, below 0.95 the loss sees less of p",
        note="Rows with at most one common id give no gradient and stay in the divisor; "
        "overlap/empty_share counts those with none.",
    ),
    Preset(
        name="opd",
        objective=Objective(
            support="student",
            divergence="reverse_kl",
            outside="renormalize",
            form="divergence",
            k=16,
        ),
        source="arXiv 2604.13016, Eq.5, Student Top-k",
        formula="KL(p~ || q~) on S = S(p) of the student that sampled",
        needs="teacher's log-probs at the student's stored ids, k <= student_k of the rollouts",
        staleness="S(p) is frozen when sampled; watch cache/miss_mass and cache/coverage",
    ),
    Preset(
        name="opd_released",
        objective=Objective(
            support="student", divergence="reverse_kl", outside="ignore", form="advantage", k=16
        ),
        source="github.com/thunlp/OPD, compute_distillation_reward, weights student_p",
        formula="-sum_S sg[A] log p, A = -p~ (log p - log q), S as in opd",
        needs="teacher's log-probs at the student's stored ids, k <= student_k of the rollouts",
        staleness="S(p) is frozen when sampled; watch cache/miss_mass and cache/coverage",
        note="Not the gradient of Eq.5: it adds [KL(p~ || q~) + log(m_p / m_q)] grad log m_p, m "
        "being the mass on S. The loss shown is -sum_S A. The released ratio clipping does nothing "
        "at one update per rollout, and is left out.",
    ),
    Preset(
        name="teacher_topk",
        objective=Objective(
            support="teacher",
            divergence="reverse_kl",
            outside="renormalize",
            form="divergence",
            k=16,
        ),
        source="arXiv 2603.25562, teacher local support matching",
        formula="KL(p~ || q~) on S = S(q)",
        needs="teacher's kept ids, k <= k_min of the score request",
        staleness="exact at any age",
        note="The paper uses K = 32 (--k-min 32 when scoring, --k 32 here), rollouts at top-p 0.9, "
        "and masks special tokens; there is no mask here.",
    ),
    Preset(
        name="forward_kl",
        objective=Objective(
            support="teacher", divergence="forward_kl", outside="tail", form="divergence", k=64
        ),
        source="truncated forward KL with a tail bucket, e.g. arXiv 2503.16870, section 3",
        formula="sum_S q log(q / p) + q_t log(q_t / p_t), t = all outside S = S(q)",
        needs="teacher's kept ids and tail; k counts kept ids at most, fewer are fine",
        staleness="exact at any age",
        note="A bucket pulls all ids outside S alike, in proportion to p.",
    ),
    Preset(
        name="sampled_token",
        objective=Objective(
            support="sampled", divergence="reverse_kl", outside="ignore", form="advantage", k=1
        ),
        source="arXiv 2604.13016, Eq.3",
        formula="-sg[A] log p(y), A = log q(y) - log p(y), y the sampled id",
        needs="teacher's log-prob of the sampled token",
        staleness=_ON_POLICY,
        note="The loss shown is -A, an unbiased draw of KL(p || q) on policy; a row's can be < 0.",
    ),
    Preset(
        name="lightning",
        objective=Objective(
            support="sampled", divergence="reverse_kl", outside="ignore", form="advantage", k=1
        ),
        source="arXiv 2604.13010, Lightning OPD",
        formula="-sg[A] log p(y), A = log q(y) - log p(y), y from the SFT model, fixed",
        needs="teacher's log-prob of the sampled token, on rollouts of the student at its start",
        staleness="off policy by design, rollouts are never renewed; watch cache/drift_k3",
        note="Teacher consistency: the teacher must be the one that made the student's SFT data, "
        "else the gradient has a bias that no amount of data removes. A store cannot show this: "
        "you must know it. On given rollouts it is the estimator of sampled_token.",
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def find_preset(name: str, *, k: int | None = None) -> Preset:
    """The preset of this name, with another k if one is given. Raises ObjectiveError."""
    if name not in PRESETS:
        raise ObjectiveError(f"unknown objective {name!r}", remedy=f"known: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if k is None:
        return preset
    return replace(preset, objective=replace(preset.objective, k=k))
