"""Presets over spans, for a teacher with another tokenizer. With the student's they are as well
defined: every span is one token.
"""

from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.presets.base import FIXED, Preset
from logitcask.engine.objectives.presets.on_draws import MINUS_A
from logitcask.engine.objectives.spans import SPAN_PARAMETERS

SPAN = "teacher's log-probs of its own tokens (score with any teacher)"
STARTS = f"{SPAN}, and its ids at the start of each span (score --span-topk starts)"
ENDS = f"{SPAN}, and its ids at the last row of each span (score --span-topk ends)"
STORED = "the shared ids are those that are stored, at any age; watch span/unmapped and span/tail"
HEURISTIC = (
    "The teacher's next token and the student's are different events, even of the same bytes: such "
    "a loss has a floor that is no error of the student. "
)


def _over_spans(loss: str, k: int = 1) -> Objective:
    _, usual, _ = SPAN_PARAMETERS.get(loss, ("", None, ""))
    return Objective(
        support="spans",
        divergence=loss,
        tail="ignore",
        estimator="spans",
        k=k,
        parameter=usual,
    )


ON_SPANS = (
    Preset(
        name="span_advantage",
        objective=_over_spans("advantage"),
        source="arXiv 2604.13016, Eq.3, on spans",
        formula="-sg[A(s)] log p(s), s a span, A(s) = log q(s) - log p(s)",
        needs=SPAN,
        staleness="the scores stay exact, but the text is a draw of the behaviour policy; watch "
        "cache/approx_kl: above 0.05 be careful, above 0.2 sample again, or add +importance",
        note="span_advantage(parameter=1) has the whole return and the mean gradient of KL(p || q) "
        "over responses, q(y) the probability of the teacher's own tokens of the text. " + MINUS_A,
    ),
    Preset(
        name="alm",
        objective=_over_spans("alm"),
        source="arXiv 2503.20083, ALM; tokenkit, binary_ce and binary_kl_temp_limit",
        formula="tau KL(Q || P) of yes or no, Q = q(s)^(1 / tau), P = p(s)^(1 / tau), tau 100",
        needs=SPAN,
        staleness=FIXED,
        note="Its least value is at p(s) = q(s), and it is no divergence of distributions. The "
        "source's binary_ce has the same gradient divided by tau. alm(parameter=inf) is the limit. "
        "On the student's own samples try alm(parameter=1): in bench/README.md it learns most. "
        "The source's log mass of tokens that begin with a space is left out.",
    ),
    Preset(
        name="uld",
        objective=_over_spans("uld", k=16),
        source="arXiv 2402.12030, ULD, at the start of each span",
        formula="sum |p_(i) - q_(i)| + |p_t - q_t|, sorted, t = all beyond the ranks known of both",
        needs=STARTS,
        staleness="a lower bound at any age; watch span/uld_width",
        note="Probabilities, not nats. It does not see which ids they are of: another order of the "
        "same probabilities costs nothing. The paper adds the cross-entropy: uld+ce(weight=1).",
    ),
    Preset(
        name="gold",
        objective=_over_spans("gold"),
        source="TRL, experimental GOLDTrainer, uld_use_hybrid_loss, merge `observed` put right",
        formula="JSD(q', p') on ids of equal bytes + sum |p'_(i) - q'_(i)| of others, x' = x at "
        "the span's start times x of its later tokens",
        needs=f"{STARTS}, the student's ids among them",
        staleness=STORED,
        note=HEURISTIC + "TRL's own rows are one late. Both weights are 1; beta is 0.5: "
        "gold(parameter=0.1) sets another.",
    ),
    Preset(
        name="gold_bayesian",
        objective=_over_spans("gold_bayesian"),
        source="TRL, experimental GOLDTrainer, uld_use_hybrid_loss, merge `bayesian`",
        formula="as gold, x' = x at the span's last row times x of its earlier tokens",
        needs=f"{ENDS}, the student's ids among them",
        staleness=STORED,
        note=HEURISTIC + "Inside a span the two models have read different bytes.",
    ),
    Preset(
        name="simct",
        objective=_over_spans("simct"),
        source="arXiv 2605.07711, SimCT, of log-probs",
        formula="KL(p~ || q~) on S = the ids of equal bytes at the span's start, and the span",
        needs=STARTS,
        staleness=STORED,
        note=HEURISTIC + "The released code has raw logits, and of a span their mean: no cache of "
        "log-probs gives those.",
    ),
    Preset(
        name="x_token",
        objective=_over_spans("x_token"),
        source="arXiv 2605.21699, X-Token, P-KL; NeMo-RL, _compute_p_kl, on the stored ids",
        formula="T^2 KL(q~ || p~) on the ids of equal bytes at the span's start, both at p^(1 / T)",
        needs=STARTS,
        staleness=STORED,
        note=HEURISTIC + "NeMo-RL compares means over the rows of a span, on the best ids of a "
        "batch: another loss. T is 1: x_token(parameter=2) sets another.",
    ),
)
