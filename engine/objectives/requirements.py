"""Requirements: the data that an objective needs of a cache."""

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.modifiers import (
    CrossEntropy,
    FixedAdvantage,
    Importance,
    Prune,
    ReturnToGo,
    Reward,
    Stepwise,
)
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.presets import FULL_VOCAB_K
from logitcask.engine.objectives.report import CacheInfo
from logitcask.engine.objectives.supports import SAMPLED_SUPPORTS


def check_served(objective: Objective, cache: CacheInfo) -> None:
    """Raise ObjectiveError unless the cache has the data that the objective needs."""
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


def _check_unknown_draws(objective: Objective, cache: CacheInfo) -> None:
    """Raise ObjectiveError for what rests on the distribution that the tokens were drawn from."""
    names = [each.name for each in objective.modifiers if isinstance(each, Importance)]
    names += [each.name for each in objective.terms if not isinstance(each, CrossEntropy)]
    off = any(isinstance(each, FixedAdvantage) and each.is_off for each in objective.modifiers)
    if objective.support in ("sampled", "mc") and not off:
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
    for modifier in objective.modifiers:
        if isinstance(modifier, Prune | Stepwise | ReturnToGo):
            raise ObjectiveError(
                f"modifier {modifier.name!r} looks at all positions of a response, and the "
                f"teacher has scored {cache.scored}",
                hint="repeat `logitcask score` with --positions all, which adds the others",
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
            f"({cache.prefixes()}), and the student has other base weights",
            hint="train with --objective overlap, whose S(p) is the current one, or allow it with "
            "--allow-off-lineage",
        )
