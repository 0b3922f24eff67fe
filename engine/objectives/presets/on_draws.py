"""Presets on draws, of the student or of the teacher."""

from logitcask.engine.objectives.modifiers import (
    Baseline,
    Clip,
    CrossEntropy,
    EntropyGate,
    Extrapolate,
    FixedAdvantage,
    Floor,
    Importance,
    KeepEntropy,
    Modifier,
    Stepwise,
)
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.presets.base import FIXED, Preset

TOKEN = "teacher's log-prob of the sampled token"
ON_POLICY = (
    "the scores stay exact, but the sampled id is a draw of the behaviour policy; watch "
    "cache/approx_kl: above 0.05 be careful, above 0.2 sample again, or add +importance"
)
MINUS_A = "The loss shown is -A, an unbiased draw of KL(p || q) on policy; a row's can be < 0."


def _drawn(*modifiers: Modifier, support: str = "sampled") -> Objective:
    return Objective(
        support=support,
        divergence="reverse_kl",
        tail="ignore",
        estimator="policy_gradient",
        k=1,
        modifiers=modifiers,
    )


ON_DRAWS = (
    Preset(
        name="sampled_token",
        objective=_drawn(),
        source="arXiv 2604.13016, Eq.3",
        formula="-sg[A] log p(y)",
        needs=TOKEN,
        staleness=ON_POLICY,
        note=MINUS_A,
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
        needs=f"{TOKEN}, and the base model's (score --teacher-kind base, train --base)",
        staleness=ON_POLICY,
        note="The paper caps importance ratios at 5: exopd+importance(cap=5) does.",
    ),
    Preset(
        name="vopd",
        objective=_drawn(Baseline("student", 16)),
        source="arXiv 2605.07865, vOPD",
        formula="-sg[A + KL(p~ || q~)] log p(y), KL on the scored ids of S(p)",
        needs=f"{TOKEN} and at the student's stored ids",
        staleness=f"{ON_POLICY}; the baseline changes only the variance, at any age",
        note="k is 16 by default; the paper's configuration is vopd+baseline(k=100). " + MINUS_A,
    ),
    Preset(
        name="vopd_cached",
        objective=_drawn(Baseline("teacher")),
        source="vopd with a baseline from any cache",
        formula="-sg[A + KL(p || q)] log p(y), KL coarsened to the teacher's kept ids and a bucket",
        needs=f"{TOKEN}, kept ids and tail",
        staleness=f"{ON_POLICY}; the baseline changes only the variance, at any age",
        note=MINUS_A,
    ),
    Preset(
        name="eopd",
        objective=_drawn(Clip(0.2), EntropyGate(0.8, 1.0, 16)),
        source="arXiv 2603.07079, EOPD",
        formula="clipped -A log p(y) + [H(q) > 0.8] KL(q || p) on S(q), k 16, and a bucket",
        needs=f"{TOKEN}, kept ids, tail and the teacher's entropy",
        staleness=ON_POLICY,
        note="The paper does not define the mass outside S(q); here it is a bucket.",
    ),
    Preset(
        name="reopold",
        objective=_drawn(Floor(), KeepEntropy(0.5)),
        source="arXiv 2603.11137, REOPOLD",
        formula="-sg[max(A, log(0.2 / 0.8))] log p(y) on the half with the largest entropy",
        needs=f"{TOKEN} and the student's entropy",
        staleness=ON_POLICY,
        note="Sources disagree on the floor, see modifiers.Floor. The entropy is that of the "
        "behaviour policy. A floor biases the estimate: p = q is not its only optimum.",
    ),
    Preset(
        name="sod",
        objective=_drawn(Stepwise()),
        source="arXiv 2605.07725, SOD",
        formula="-w sg[A] log p(y), w = min((d_1 + e) / (d_j + e), 1.5), d_j = mean |A| of step j",
        needs=TOKEN,
        staleness=f"{ON_POLICY}; w is that of the behaviour policy",
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
    Preset(
        name="sft",
        objective=_drawn(FixedAdvantage(0.0), CrossEntropy(1.0)),
        source="supervised fine-tuning, the cold start of arXiv 2604.13016, section 5.1, Table 3",
        formula="-log p(y), y of any text",
        needs="any scores: none of their values is read",
        staleness=FIXED,
        note="Cross-entropy on the stored tokens. On samples of the student itself it teaches "
        "nothing: it is for text of a teacher (recipe cold-start, import).",
    ),
)
