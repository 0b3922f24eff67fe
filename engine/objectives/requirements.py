"""Requirements: the data that an objective needs of a cache."""

from logitcask.engine.alignment.span_scores import ENDS, NONE, STARTS
from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.modifiers import (
    Baseline,
    Clip,
    CrossEntropy,
    EntropyGate,
    FixedAdvantage,
    Floor,
    Importance,
    Prune,
    ReturnToGo,
    Reward,
    Stepwise,
)
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.presets import FULL_VOCAB_K, SPAN_PRESETS
from logitcask.engine.objectives.report import CacheInfo
from logitcask.engine.objectives.spans.losses import SPAN_ROWS
from logitcask.engine.objectives.supports import SAMPLED_SUPPORTS

_NEEDS_NORMALISER = (Baseline, Clip, EntropyGate, Floor, ReturnToGo, Stepwise)
"""Modifiers that change when a constant is added to all of the teacher's log-probs of a row."""


def check_served(objective: Objective, cache: CacheInfo) -> None:
    """Raise ObjectiveError unless the cache has the data that the objective needs."""
    _check_spans(objective, cache)
    _check_draws(objective, cache)
    if not cache.known_draws:
        _check_unknown_draws(objective, cache)
    _check_rewards(objective, cache)
    _check_k(objective, cache)
    if objective.support == "student":
        _check_student(objective, cache)
    if objective.needs_base and not cache.base:
        raise ObjectiveError(
            "this objective needs scores of a base model, and --base names none",
            hint="score the rollouts with it (score --teacher-kind "
            "base), and name its scores with --base",
        )
    if cache.scored:
        _check_positions(objective, cache)
    if cache.mixture_kind != "sum":
        _check_mixture(objective, cache)


def _check_spans(objective: Objective, cache: CacheInfo) -> None:
    """Raise ObjectiveError for a teacher whose tokenizer does not fit the objective."""
    if not objective.over_spans:
        if cache.span_rows is None or any(
            isinstance(each, FixedAdvantage) for each in objective.modifiers
        ):
            return
        rows = {name: SPAN_ROWS.get(p.objective.divergence) for name, p in SPAN_PRESETS.items()}
        served = [name for name, row in rows.items() if row in (None, cache.span_rows)]
        raise ObjectiveError(
            "these scores are of spans, because the teacher has another tokenizer, and support "
            f"{objective.support!r} needs the student's",
            hint=f"train with --objective {' or '.join(served)}",
        )
    needed = SPAN_ROWS.get(objective.divergence)
    if needed is None:
        return
    if cache.span_rows not in (None, needed):
        raise ObjectiveError(
            f"{objective.divergence!r} compares the teacher's ids at the {_ROWS[needed]} row of "
            f"each span, and these scores have them {_AT[str(cache.span_rows)]}",
            hint=f"score again, under another name, with --span-topk {needed}, or train with "
            "--objective span_advantage",
        )
    if objective.divergence in ("gold", "gold_bayesian") and not cache.at_student:
        raise ObjectiveError(
            f"{objective.divergence!r} takes an id of the student without a score for one that the "
            "teacher has no token of, and the teacher did not score the student's ids",
            hint="score with a teacher that can score chosen ids, or train with --objective simct",
        )


_ROWS = {STARTS: "first", ENDS: "last"}
_AT = {NONE: "at no row", STARTS: "at the first row", ENDS: "at the last row"}


def _check_draws(objective: Objective, cache: CacheInfo) -> None:
    if objective.support == "teacher_mc" and not cache.q_draws:
        raise ObjectiveError(
            "these scores are the teacher's top ids, and this objective averages over its draws",
            hint="score again, under another name, with --selection sampled --draws 50",
        )
    if _reads_ids(objective) and cache.q_draws:
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


def _reads_ids(objective: Objective) -> bool:
    """Return whether the objective compares the teacher's ids, not draws or realised tokens."""
    if objective.over_spans:
        return objective.divergence in SPAN_ROWS
    return objective.support not in SAMPLED_SUPPORTS


def _check_unknown_draws(objective: Objective, cache: CacheInfo) -> None:
    """Raise ObjectiveError for what rests on the distribution that the tokens were drawn from."""
    names = [each.name for each in objective.modifiers if isinstance(each, Importance)]
    names += [each.name for each in objective.terms if not isinstance(each, CrossEntropy)]
    off = any(isinstance(each, FixedAdvantage) and each.is_off for each in objective.modifiers)
    if (objective.support in ("sampled", "mc") and not off) or objective.divergence == "advantage":
        cause = f"support {objective.support!r} averages over draws of the student"
    elif names:
        cause = f"modifier {names[0]!r} rests on draws of the student"
    else:
        return
    raise ObjectiveError(
        f"{cause}, and these rollouts are imported ({cache.imported}) without their log-probs",
        hint="train with an objective that needs no draws, as --objective forward_kl, or import "
        "rollouts that have the log-probs of their tokens",
    )


def _check_positions(objective: Objective, cache: CacheInfo) -> None:
    """Raise ObjectiveError for a modifier that looks at other positions of a response."""
    if objective.divergence == "advantage" and objective.parameter:
        raise ObjectiveError(
            f"a return with gamma = {objective.parameter} looks at all positions of a response, "
            f"and the teacher has scored {cache.scored}",
            hint="repeat `logitcask score` with --positions all, which adds the others, or use "
            "span_advantage(parameter=0)",
        )
    for modifier in objective.modifiers:
        if isinstance(modifier, Prune | Stepwise | ReturnToGo):
            raise ObjectiveError(
                f"modifier {modifier.name!r} looks at all positions of a response, and the "
                f"teacher has scored {cache.scored}",
                hint="repeat `logitcask score` with --positions all, which adds the others",
            )


def _check_mixture(objective: Objective, cache: CacheInfo) -> None:
    """Raise ObjectiveError for an objective that a mixture of teachers cannot serve."""
    hint = "use --mixture sum"
    if objective.over_spans:
        raise ObjectiveError(
            f"a loss over spans with mixture = {cache.mixture_kind}: a mixture is of distributions "
            "over the student's tokens",
            hint=hint,
        )
    if cache.mixture_kind != "geometric":
        return
    # The normaliser of a row cancels in ratios, and is a baseline of a draw.
    if objective.estimator == "divergence" and objective.tail != "renormalize":
        raise ObjectiveError(
            f"tail {objective.tail!r} with mixture = geometric: its normaliser is known in bounds, "
            "and this loss needs the teacher's mass itself",
            hint=f"{hint}, whose gradient is the same for reverse KL, or tail 'renormalize'",
        )
    if objective.estimator == "policy_gradient" and objective.support not in SAMPLED_SUPPORTS:
        raise ObjectiveError(
            f"a policy gradient on support {objective.support!r} with mixture = geometric: its "
            "normaliser is known in bounds, and it multiplies the gradient of the support's mass",
            hint=f"{hint}, or support 'sampled'",
        )
    for modifier in objective.modifiers:
        capped = isinstance(modifier, Importance) and modifier.cap > 0
        if capped or isinstance(modifier, _NEEDS_NORMALISER):
            raise ObjectiveError(
                f"modifier {modifier.name!r} with mixture = geometric: it reads more than the "
                "teacher's ratios, and the normaliser is known in bounds",
                hint=f"{hint}, or leave the modifier out",
            )


def _check_rewards(objective: Objective, cache: CacheInfo) -> None:
    if not any(isinstance(term, Reward) for term in objective.terms):
        return
    if not cache.rewards:
        raise ObjectiveError(
            "modifier 'reward' needs the rewards of the responses, and these rollouts have none",
            hint="sample again, under another name, with --grader exact or another one",
        )
    if cache.samples < 2:
        raise ObjectiveError(
            f"modifier 'reward' with {cache.samples} response per prompt: the reward minus the "
            "mean over the responses to a prompt would be 0",
            hint="sample again with --n 4",
        )


def _check_k(objective: Objective, cache: CacheInfo) -> None:
    if objective.support in SAMPLED_SUPPORTS or objective.over_spans:
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
            f"({cache.prefixes()}), and the student has other base weights",
            hint="train with --objective overlap, whose S(p) is the current one, or allow it with "
            "--allow-off-lineage",
        )
