"""Presets: named objectives with their sources and requirements.

In formulas `~` is "renormalised on S", sg[] is held fixed, A = log q - log p, y the sampled id, b
the behaviour policy. S(p) is that of the current student unless a formula says otherwise. Each
preset has its own k; `parse_objective` changes it and adds modifiers.
"""

from dataclasses import dataclass, replace

from logitcask.engine.objectives.modifiers import (
    AdaptiveTarget,
    Baseline,
    Clip,
    EntropyGate,
    Extrapolate,
    FixedAdvantage,
    Floor,
    Importance,
    KeepEntropy,
    Modifier,
    Prune,
    ReturnToGo,
    Stepwise,
)
from logitcask.engine.objectives.objective import Objective

FULL_VOCAB_K = 65535
"""The k of an objective over the whole vocabulary: more than a row can hold."""


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
    """Contents that the store must have."""
    staleness: str
    """Effect of a student that has moved since it sampled, and the metric to watch."""
    note: str = ""
    """A caution; printed with the exactness report."""


def _on(
    support: str,
    k: int,
    divergence: str = "reverse_kl",
    tail: str = "renormalize",
    parameter: float | None = None,
) -> Objective:
    return Objective(
        support=support,
        divergence=divergence,
        tail=tail,
        estimator="divergence",
        k=k,
        parameter=parameter,
    )


def _drawn(*modifiers: Modifier, support: str = "sampled") -> Objective:
    return Objective(
        support=support,
        divergence="reverse_kl",
        tail="ignore",
        estimator="policy_gradient",
        k=1,
        modifiers=modifiers,
    )


_KEPT = "teacher's kept ids, k <= k_min of the score request"
_TAIL = "teacher's kept ids and tail; k counts kept ids at most, fewer are fine"
_STUDENT = "teacher's log-probs at the student's stored ids, k <= student_k of the rollouts"
_TOKEN = "teacher's log-prob of the sampled token"
_FIXED = "exact at any age"
_FROZEN = "S(p) is frozen when sampled; watch cache/uncached_mass and cache/coverage"
_ON_POLICY = (
    "the scores stay exact, but the sampled id is a draw of the behaviour policy; watch "
    "cache/approx_kl: above 0.05 be careful, above 0.2 sample again, or add +importance"
)
_COVERED = "ids of the current S(p) without a score are left out: watch cache/uncached_mass"
_MINUS_A = "The loss shown is -A, an unbiased draw of KL(p || q) on policy; a row's can be < 0."

_ALL = (
    Preset(
        name="overlap",
        objective=_on("overlap", 16),
        source="arXiv 2604.13016, section 4.2, Overlap Top-k",
        formula="KL(p~ || q~) on S = S(p) & S(q)",
        needs=_KEPT,
        staleness="exact at any age; watch cache/coverage, below 0.95 the loss covers less of p",
        note="Rows with at most one common id give no gradient and stay in the divisor; "
        "overlap/empty_share counts those with none.",
    ),
    Preset(
        name="opd",
        objective=_on("student", 16),
        source="arXiv 2604.13016, Eq.5, Student Top-k",
        formula="KL(p~ || q~) on S = S(p) of the behaviour policy",
        needs=_STUDENT,
        staleness=_FROZEN,
    ),
    Preset(
        name="opd_released",
        objective=Objective(
            support="student",
            divergence="reverse_kl",
            tail="ignore",
            estimator="policy_gradient",
            k=16,
        ),
        source="github.com/thunlp/OPD, compute_distillation_reward, weights student_p",
        formula="-sum_S sg[p~ A] log p, S as in opd",
        needs=_STUDENT,
        staleness=_FROZEN,
        note="Not the gradient of Eq.5: it adds [KL(p~ || q~) + log(m_p / m_q)] grad log m_p, m "
        "being the mass on S. The loss shown is -sum_S p~ A. The released ratio clipping "
        "does nothing at one update per rollout, so it is left out: +clip adds it.",
    ),
    Preset(
        name="non_overlap",
        objective=_on("non_overlap", 16),
        source="arXiv 2604.13016, section 4.2, Non-overlap Top-k",
        formula="KL(p~ || q~) on S = S(p) xor S(q)",
        needs=_KEPT,
        staleness=_COVERED,
        note="A control: the paper finds it clearly weaker. The released code weights its ids by "
        "p instead of p~.",
    ),
    Preset(
        name="union",
        objective=_on("union", 16),
        source="github.com/thunlp/OPD, TOP_K_STRATEGY union, as a divergence",
        formula="KL(p~ || q~) on S = S(p) | S(q)",
        needs=_KEPT,
        staleness=_COVERED,
    ),
    Preset(
        name="teacher_topk",
        objective=_on("teacher", 16),
        source="arXiv 2603.25562, teacher local support matching",
        formula="KL(p~ || q~) on S = S(q)",
        needs=_KEPT,
        staleness=_FIXED,
        note="The paper uses K = 32 (--teacher-topk-min 32 when scoring, --loss-topk "
        "32 here), rollouts at top-p 0.9, "
        "and masks special tokens; there is no mask here.",
    ),
    Preset(
        name="forward_kl",
        objective=_on("teacher", 64, "forward_kl", "bucket"),
        source="truncated forward KL with a tail bucket, e.g. arXiv 2503.16870, section 3",
        formula="sum_S q log(q / p) + q_t log(q_t / p_t), t = all outside S = S(q)",
        needs=_TAIL,
        staleness=_FIXED,
        note="A bucket pulls all ids outside S in proportion to p.",
    ),
    Preset(
        name="gkd",
        objective=_on("teacher", 64, "jsd", "bucket", parameter=0.5),
        source="arXiv 2306.13649, generalised JSD",
        formula="beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, on S(q) and a "
        "bucket",
        needs=_TAIL,
        staleness=_FIXED,
        note="beta is 0.5: gkd(parameter=0.1) sets another. The rollouts in the store decide the "
        "on-policy fraction of the paper.",
    ),
    Preset(
        name="full_vocab",
        objective=_on("teacher", FULL_VOCAB_K),
        source="arXiv 2604.13016, Eq.4",
        formula="KL(p || q)",
        needs="every id of the vocabulary kept: k_min = its size, for oracles on small ones",
        staleness=_FIXED,
    ),
    Preset(
        name="sampled_token",
        objective=_drawn(),
        source="arXiv 2604.13016, Eq.3",
        formula="-sg[A] log p(y)",
        needs=_TOKEN,
        staleness=_ON_POLICY,
        note=_MINUS_A,
    ),
    Preset(
        name="lightning",
        objective=_drawn(),
        source="arXiv 2604.13010, Lightning OPD",
        formula="-sg[A] log p(y), y from the SFT model, fixed",
        needs="teacher's log-prob of the sampled token, on rollouts of the student before training",
        staleness="off policy by design, rollouts are never renewed; watch cache/approx_kl",
        note="Teacher consistency: the teacher must be the one that generated the student's SFT "
        "data, else the gradient has a bias that no amount of data removes. A store cannot check "
        "this. On the same rollouts it equals sampled_token.",
    ),
    Preset(
        name="exopd",
        objective=_drawn(Extrapolate(1.25)),
        source="arXiv 2602.12125, ExOPD, lambda 1.25",
        formula="-sg[lambda log q + (1 - lambda) log b - log p] log p(y), b the base model",
        needs=f"{_TOKEN}, and the base model's (score --teacher-kind base, train --base)",
        staleness=_ON_POLICY,
        note="The paper caps importance ratios at 5: exopd+importance(cap=5) does.",
    ),
    Preset(
        name="vopd",
        objective=_drawn(Baseline("student", 16)),
        source="arXiv 2605.07865, vOPD",
        formula="-sg[A + KL(p~ || q~)] log p(y), KL on the scored ids of S(p)",
        needs=f"{_TOKEN} and at the student's stored ids",
        staleness=f"{_ON_POLICY}; the baseline changes only the variance, at any age",
        note="k is 16, the paper's configuration has 100. " + _MINUS_A,
    ),
    Preset(
        name="vopd_cached",
        objective=_drawn(Baseline("teacher")),
        source="vopd with a baseline from any cache",
        formula="-sg[A + KL(p || q)] log p(y), KL coarsened to the teacher's kept ids and a bucket",
        needs=f"{_TOKEN}, kept ids and tail",
        staleness=f"{_ON_POLICY}; the baseline changes only the variance, at any age",
        note=_MINUS_A,
    ),
    Preset(
        name="eopd",
        objective=_drawn(Clip(0.2), EntropyGate(0.8, 1.0, 16)),
        source="arXiv 2603.07079, EOPD",
        formula="clipped -A log p(y) + [H(q) > 0.8] KL(q || p) on S(q), k 16, and a bucket",
        needs=f"{_TOKEN}, kept ids, tail and the teacher's entropy",
        staleness=_ON_POLICY,
        note="The paper does not define the mass outside S(q); here it is a bucket.",
    ),
    Preset(
        name="veto",
        objective=Objective(
            support="teacher",
            divergence="reverse_kl",
            tail="renormalize",
            estimator="divergence",
            k=16,
            modifiers=(AdaptiveTarget(0.3),),
        ),
        source="arXiv 2601.07155, Veto",
        formula="KL(p~ || Q~) on S(q), Q = q sg[p]^beta",
        needs=_KEPT,
        staleness=_FIXED,
        note="beta is fixed at 0.3; the paper lets it decay. Its optimum is q^(1 / (1 - beta)), "
        "sharper than q.",
    ),
    Preset(
        name="reopold",
        objective=_drawn(Floor(), KeepEntropy(0.5)),
        source="arXiv 2603.11137, REOPOLD",
        formula="-sg[max(A, log(0.2 / 0.8))] log p(y) on the half with the largest entropy",
        needs=f"{_TOKEN} and the student's entropy",
        staleness=_ON_POLICY,
        note="Sources disagree on the floor, see modifiers.Floor. The entropy is that of the "
        "behaviour policy. A floor biases the estimate: p = q is not its only optimum.",
    ),
    Preset(
        name="prune_opd",
        objective=Objective(
            support="student",
            divergence="reverse_kl",
            tail="ignore",
            estimator="policy_gradient",
            k=16,
            modifiers=(Prune(),),
        ),
        source="arXiv 2605.07804, Prune-OPD, its code's defaults",
        formula="w opd_released, w = 1 - 0.02 (rows so far with an overlap under 0.9), >= 0",
        needs=f"{_STUDENT}; kept ids",
        staleness=f"{_FROZEN}; w is that of the behaviour policy",
    ),
    Preset(
        name="sod",
        objective=_drawn(Stepwise()),
        source="arXiv 2605.07725, SOD",
        formula="-w sg[A] log p(y), w = min((d_1 + e) / (d_j + e), 1.5), d_j = mean |A| of step j",
        needs=_TOKEN,
        staleness=f"{_ON_POLICY}; w is that of the behaviour policy",
        note="A store has no step boundaries: a step is 64 tokens. The outcome reward's advantage "
        "is left out.",
    ),
    Preset(
        name="async_mc",
        objective=_drawn(Importance(), support="mc"),
        source="arXiv 2606.24143, AsyncOPD",
        formula="-(1 / m) sum_i sg[(rho A)(v_i)] log p(v_i), v_i drawn from b, rho = p / b",
        needs="m ids drawn by the student (rollout --mc-draws), scored (score --extra-ids mc)",
        staleness="unbiased at any age for the token, not for its prefix; its variance grows with "
        "cache/approx_kl",
    ),
    Preset(
        name="rs_kd",
        objective=Objective(
            support="teacher_mc",
            divergence="forward_kl",
            tail="ignore",
            estimator="divergence",
            k=1,
        ),
        source="arXiv 2503.16870, random sampling KD",
        formula="-(1 / N) sum_i log(p / q)(v_i), v_i drawn from the teacher",
        needs="N ids drawn by the teacher (score --selection sampled --draws N)",
        staleness="unbiased at any age for KL(q || p)",
        note="Draws do not give S(q): overlap metrics have no meaning with them.",
    ),
    Preset(
        name="minillm",
        objective=replace(_on("student", 16), modifiers=(ReturnToGo(),)),
        source="arXiv 2306.08543, Eq.3 with length normalization (section 2.2)",
        formula="opd - sg[R] log p(y), R = mean of log q - log b over the later sampled ids",
        needs=f"{_STUDENT}, and of every sampled token",
        staleness=f"{_FROZEN}; R is that of the behaviour policy, see cache/approx_kl",
        note="The single step is KL(p~ || q~) on S(p) instead of the whole vocabulary: "
        "full_vocab+return_to_go has it all. Teacher-mixed sampling and the loss on the "
        "pretraining corpus are left out. The paper divides R by one less than its terms.",
    ),
    Preset(
        name="fixed_advantage",
        objective=_drawn(FixedAdvantage()),
        source="a control as in arXiv 2608.31046 (its abstract alone was read)",
        formula="-sg[c] log p(y), c = -1 at every row",
        needs="any scores: none of their values is read",
        staleness="draws of the behaviour policy; watch cache/approx_kl",
        note="A control without a teacher: an objective that gains no more than this one does not "
        "gain by the teacher's values. On policy its mean gradient is zero, later it lowers the "
        "sampled ids. fixed_advantage+fixed(nats=-0.1) sets another c, and c = 0 with +reward is "
        "reinforcement learning alone.",
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}
