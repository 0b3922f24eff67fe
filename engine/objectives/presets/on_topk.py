"""Presets on a top-k, the teacher's or the student's."""

from dataclasses import replace

from logitcask.engine.objectives.modifiers import AdaptiveTarget, Prune, ReturnToGo
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.presets.base import (
    COVERED,
    FIXED,
    FROZEN,
    FULL_VOCAB_K,
    KEPT,
    OVERLAP_AGE,
    STUDENT,
    TAIL,
    Preset,
    on_topk,
)

ON_TOPK = (
    Preset(
        name="overlap",
        objective=on_topk("overlap", 16),
        source="arXiv 2604.13016, section 4.2, Overlap Top-k",
        formula="KL(p~ || q~) on S = S(p) & S(q)",
        needs=KEPT,
        staleness=OVERLAP_AGE,
        note="Rows with at most one common id give no gradient and stay in the divisor; "
        "overlap/empty_share counts those with none.",
    ),
    Preset(
        name="opd",
        objective=on_topk("student", 16),
        source="arXiv 2604.13016, Eq.5, Student Top-k",
        formula="KL(p~ || q~) on S = S(p) of the behaviour policy",
        needs=STUDENT,
        staleness=FROZEN,
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
        needs=STUDENT,
        staleness=FROZEN,
        note="Not the gradient of Eq.5: it adds [KL(p~ || q~) + log(m_p / m_q)] grad log m_p, m "
        "being the mass on S. The loss shown is -sum_S p~ A. The released ratio clipping "
        "does nothing at one update per rollout, so it is left out: +clip adds it.",
    ),
    Preset(
        name="non_overlap",
        objective=on_topk("non_overlap", 16),
        source="arXiv 2604.13016, section 4.2, Non-overlap Top-k",
        formula="KL(p~ || q~) on S = S(p) xor S(q)",
        needs=KEPT,
        staleness=COVERED,
        note="A control: the paper finds it clearly weaker. The released code weights its ids by "
        "p instead of p~.",
    ),
    Preset(
        name="union",
        objective=on_topk("union", 16),
        source="github.com/thunlp/OPD, TOP_K_STRATEGY union, as a divergence",
        formula="KL(p~ || q~) on S = S(p) | S(q)",
        needs=KEPT,
        staleness=COVERED,
    ),
    Preset(
        name="teacher_topk",
        objective=on_topk("teacher", 16),
        source="arXiv 2603.25562, teacher local support matching",
        formula="KL(p~ || q~) on S = S(q)",
        needs=KEPT,
        staleness=FIXED,
        note="The paper uses K = 32 (--teacher-topk-min 32 when scoring, --loss-topk "
        "32 here), rollouts at top-p 0.9, "
        "and masks special tokens; there is no mask here.",
    ),
    Preset(
        name="forward_kl",
        objective=on_topk("teacher", 64, "forward_kl", "bucket"),
        source="truncated forward KL with a tail bucket, e.g. arXiv 2503.16870, section 3",
        formula="sum_S q log(q / p) + q_t log(q_t / p_t), t = all outside S = S(q)",
        needs=TAIL,
        staleness=FIXED,
        note="A bucket pulls all ids outside S in proportion to p.",
    ),
    Preset(
        name="gkd",
        objective=on_topk("teacher", 64, "jsd", "bucket", parameter=0.5),
        source="arXiv 2306.13649, generalised JSD",
        formula="beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, on S(q) and a "
        "bucket",
        needs=TAIL,
        staleness=FIXED,
        note="beta is 0.5: gkd(parameter=0.1) sets another. The rollouts in the store decide the "
        "on-policy fraction of the paper.",
    ),
    Preset(
        name="full_vocab",
        objective=on_topk("teacher", FULL_VOCAB_K),
        source="arXiv 2604.13016, Eq.4",
        formula="KL(p || q)",
        needs="every id of the vocabulary kept: k_min = its size, for oracles on small ones",
        staleness=FIXED,
    ),
    Preset(
        name="forward_kl_topk",
        objective=on_topk("teacher", 16, "forward_kl", "ignore"),
        source="verl, forward_kl_topk; open-instruct, forward_kl_topk_from_logprobs",
        formula="sum_S q log(q / p), S = S(q), of p and q as they are",
        needs=KEPT,
        staleness=FIXED,
        note="It is m KL(q~ || p) + m log m, m the teacher's mass on S: it pulls the student to "
        "the teacher renormalised on S, and can be below 0. forward_kl_topk(tail=zero) is "
        "KL(q~ || p) itself, the default of DistillKit (missing = zero). verl's clamps are left "
        "out.",
    ),
    Preset(
        name="mixed_kl",
        objective=on_topk("teacher", 16, "mixed_kl", parameter=0.5),
        source="NeMo-RL, kl_type mixed",
        formula="w KL(q~ || p~) + (1 - w) KL(p~ || q~), w 0.5, on S = S(q)",
        needs=KEPT,
        staleness=FIXED,
        note="w is NeMo-RL's mixed_kl_weight: mixed_kl(parameter=0.3) sets another.",
    ),
    Preset(
        name="kd",
        objective=replace(on_topk("teacher", 16, "forward_kl"), temperature=2.0),
        source="arXiv 1503.02531, section 2, soft targets, on a top-k",
        formula="T^2 KL(q~ || p~) on S = S(q), both at p^(1 / T), T = 2",
        needs=KEPT,
        staleness=FIXED,
        note="kd(temperature=4) sets another T. Renormalised on S, both sides are exact at any T; "
        "the mass outside at T is in no cache, so other tails take no T. DistillKit's "
        "symmetric_uniform gives all of it to one id, ModelOpt has the whole vocabulary.",
    ),
    Preset(
        name="skew_kl",
        objective=on_topk("teacher", 64, "skew", "bucket", parameter=0.1),
        source="arXiv 2402.03898, DistiLLM, skew KL, alpha 0.1",
        formula="KL(q || alpha q + (1 - alpha) p), on S(q) and a bucket",
        needs=TAIL,
        staleness=FIXED,
    ),
    Preset(
        name="skew_reverse_kl",
        objective=on_topk("teacher", 64, "skew_reverse", "bucket", parameter=0.1),
        source="arXiv 2402.03898, DistiLLM, skew reverse KL, alpha 0.1",
        formula="KL(p || alpha p + (1 - alpha) q), on S(q) and a bucket",
        needs=TAIL,
        staleness=FIXED,
    ),
    Preset(
        name="alpha_divergence",
        objective=on_topk("teacher", 64, "alpha", "bucket", parameter=0.5),
        source="Amari's alpha-divergence; for distillation arXiv 2505.04560 has its family",
        formula="(1 - sum q^alpha p^(1 - alpha)) / (alpha (1 - alpha)), on S(q) and a bucket",
        needs=TAIL,
        staleness=FIXED,
        note="alpha -> 1 is forward KL, alpha -> 0 reverse KL, 0.5 is 4 (1 - sum sqrt(q p)).",
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
        needs=KEPT,
        staleness=FIXED,
        note="beta is fixed at 0.3; the paper lets it decay. Its optimum is q^(1 / (1 - beta)), "
        "sharper than q.",
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
        needs=f"{STUDENT}; kept ids",
        staleness=f"{FROZEN}; w is that of the behaviour policy",
    ),
    Preset(
        name="minillm",
        objective=replace(on_topk("student", 16), modifiers=(ReturnToGo(),)),
        source="arXiv 2306.08543, Eq.3 with length normalization (section 2.2)",
        formula="opd - sg[R] log p(y), R = mean of log q - log b over the later sampled ids",
        needs=f"{STUDENT}, and of every sampled token",
        staleness=f"{FROZEN}; R is that of the behaviour policy, see cache/approx_kl",
        note="The single step is KL(p~ || q~) on S(p) instead of the whole vocabulary: "
        "full_vocab+return_to_go has it all. Teacher-mixed sampling and the loss on the "
        "pretraining corpus are left out. The paper divides R by one less than its terms.",
    ),
)
