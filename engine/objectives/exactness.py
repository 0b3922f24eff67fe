"""Exactness: how exactly a cache serves an objective after the student has moved.

Three things can be exact or not: the scores at the ids of the support, the set of those ids, and
the estimator. The prefixes are always those of the rollouts. A combination that the cache cannot
serve raises ObjectiveError.
"""

from logitcask.engine.alignment.span_scores import ENDS
from logitcask.engine.backends.returned import RESOLVED
from logitcask.engine.objectives.modifiers import (
    Baseline,
    CrossEntropy,
    EntropyGate,
    FixedAdvantage,
    Importance,
    Reward,
)
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.presets import FULL_VOCAB_K, Preset
from logitcask.engine.objectives.report import CacheInfo, ExactnessReport, Served
from logitcask.engine.objectives.requirements import check_served
from logitcask.engine.objectives.spans.losses import SPAN_ROWS
from logitcask.engine.objectives.supports import SAMPLED_SUPPORTS


def check_exactness(objective: Objective | Preset, cache: CacheInfo) -> ExactnessReport:
    """Return the exactness of an objective on this cache.

    Raises ObjectiveError if the cache cannot serve it.
    """
    notes = []
    if isinstance(objective, Preset):
        notes += [objective.note] if objective.note else []
        objective = objective.objective
    check_served(objective, cache)
    if not cache.same_base_weights:
        notes.append(
            "Off-lineage student: a model of other base weights sampled these rollouts, so ages "
            "are unknown."
        )
    if cache.imported:
        notes.append(
            f"Imported rollouts ({cache.imported}): the student scored them and did not sample "
            "them, so ages are unknown."
        )
    if cache.mixture:
        notes += _mixture_notes(objective, cache)
    if not cache.same_template:
        notes.append(
            "The student's chat template renders these prompts differently; it is trained on the "
            "stored prompts."
        )
    if cache.scored:
        notes.append(
            f"The cache serves {cache.scored}: the others have no loss and are in no metric."
        )
    if cache.entropy_bounds:
        notes.append(
            "The teacher returned only top-k log-probs: its entropy is an interval of width "
            "entropy/teacher_width, entropy/gap is a lower bound, and the tail is 1 - their mass, "
            f"resolved to {RESOLVED:g}."
        )
    return ExactnessReport(
        scores=_scores(objective, cache),
        support=_support(objective, cache),
        estimator=_estimator(objective, cache),
        prefixes=cache.prefixes(),
        notes=tuple(notes),
    )


def _mixture_notes(objective: Objective, cache: CacheInfo) -> list[str]:
    """Return the notes on several teachers: their weights, and what the loss compares with."""
    names = cache.mixture
    notes = []
    if cache.weighting:
        names = ", ".join(part.partition("=")[0] for part in names.split(","))
        notes.append(f"The weights of {names} are the softmax of {cache.weighting}.")
    if objective.over_spans:
        notes.append(
            f"Several teachers, {names}: loss and metrics are the means of theirs by weight, each "
            "on its own spans."
        )
        return notes
    if cache.mixture_kind == "sum":
        notes.append(
            f"Several teachers, {names}: loss and metrics are the means of theirs by "
            "weight. On one support the gradient is that of their normalised geometric mean with "
            "reverse KL and draws of the student, that of their mean distribution with forward KL."
        )
        return notes
    exact = "the student's stored ids, "
    if cache.own_ids:
        exact = ""
        notes.append(
            f"{', '.join(cache.own_ids)} scored the own top ids alone: at other ids of the student "
            "the mixture is not exact."
        )
    notes.append(
        f"Mixture, {names}: the {cache.mixture_kind} mean of the teachers is exact at ids that all "
        f"of them scored, {exact}the sampled tokens and the common part of their top ids"
        + (
            ". Other values are lower bounds, less by mixture/width in the mean; the distance in "
            "total variation is at most mixture/missing_mass. Its entropy is an interval."
            if cache.mixture_kind == "arithmetic"
            else ", up to its normaliser, which these losses do not need. Other ids have no score; "
            "mixture/width is the width of the log of the normaliser, mixture/missing_mass the "
            "mass of the other ids at most. Metrics use the lower end. Its entropy is an interval."
        )
        + " Its top-k of a position are the ids that no bound can move, which may be fewer than k."
    )
    return notes


def served(objective: Objective) -> Served:
    """Return the exactness of an objective on any cache that has the data it needs."""
    names = {modifier.name for modifier in objective.modifiers}
    if objective.over_spans:
        return _served_spans(objective)
    if _is_sft(objective):
        return Served.EXACT
    if "fixed" in names:
        return Served.CONTROL
    if objective.support in ("union", "non_overlap"):
        return Served.UNCACHED
    if objective.support in SAMPLED_SUPPORTS and "floor" in names:
        return Served.FLOOR
    if not all(term.corrected for term in objective.terms):
        return Served.ON_POLICY
    if objective.support == "teacher_mc" or "importance" in names:
        return Served.ANY_AGE
    if objective.support in SAMPLED_SUPPORTS:
        return Served.ON_POLICY
    if objective.support == "student":
        return Served.FROZEN
    if _is_cut(objective):
        return Served.CUT
    return Served.COARSENED if objective.tail == "bucket" else Served.EXACT


def _served_spans(objective: Objective) -> Served:
    if not all(term.corrected for term in objective.terms):
        return Served.ON_POLICY
    if objective.divergence == "advantage":
        corrected = any(isinstance(each, Importance) for each in objective.modifiers)
        return Served.ANY_AGE if corrected else Served.ON_POLICY
    return Served.HEURISTIC if objective.divergence in SPAN_ROWS else Served.SURROGATE


def _is_sft(objective: Objective) -> bool:
    """Return whether the cross-entropy on the stored tokens is the whole loss."""
    off = any(isinstance(each, FixedAdvantage) and each.is_off for each in objective.modifiers)
    return off and all(isinstance(each, CrossEntropy) for each in objective.terms)


def _is_cut(objective: Objective) -> bool:
    """Return whether the teacher is compared as if it had no mass outside the support."""
    cut = objective.tail in ("zero", "ignore") and objective.support == "teacher"
    return cut and objective.estimator == "divergence"


def _scores(objective: Objective, cache: CacheInfo) -> str:
    if objective.over_spans:
        return _span_scores(objective, cache)
    if cache.mixture_kind != "sum":
        return f"of the {cache.mixture_kind} mean of teachers, exact where all scored: see the note"
    text = _exact_scores(objective)
    if objective.temperature != 1:
        text += f"; at temperature {objective.temperature:g}, where ratios on S stay exact"
    if not cache.entropy_bounds:
        return text
    if objective.tail == "bucket":
        text += f"; the bucket is resolved to {RESOLVED:g}"
        if objective.divergence == "alpha":  # q^a p^(1 - a) of it, and p may be 1
            a = objective.parameter or 1.0
            text += f", its term in the loss to {RESOLVED**a / (a * (1 - a)):.1g}"
    if any(isinstance(each, Baseline) and each.on == "teacher" for each in objective.modifiers):
        text += (
            f"; the baseline's bucket is resolved to {RESOLVED:g}, which affects only the variance"
        )
    if any(isinstance(each, EntropyGate) for each in objective.modifiers):
        text += (
            "; the gate opens where the lower end of the teacher's entropy is above its bound, and "
            f"its bucket is resolved to {RESOLVED:g}"
        )
    return text


def _span_scores(objective: Objective, cache: CacheInfo) -> str:
    rows = SPAN_ROWS.get(objective.divergence)
    if cache.span_rows is None:
        found = ["exact: every span is one token of both"]
    else:
        found = ["span-exact: the log-prob of the teacher's own tokens, at most that of the bytes"]
    if rows is not None and cache.span_rows is not None:
        which = "last" if rows == ENDS else "first"
        found.append(
            f"boundary-conditioned: the teacher's next token at the {which} row of each span, "
            "another event than the student's"
        )
    if rows is not None:
        found.append("truncated to the stored ids, see span/unmapped and span/tail")
    return "; ".join(found)


def _exact_scores(objective: Objective) -> str:
    if objective.tail == "bucket":
        first = f"first {objective.k} kept ids" if objective.support == "teacher" else "support"
        return f"exact for both models coarsened to the {first} and one bucket: a lower bound of KL"
    if _is_cut(objective):
        how = "renormalised" if objective.tail == "zero" else "its mass outside left out"
        return f"exact for the teacher cut to its top-{objective.k}, {how}"
    if any(isinstance(each, FixedAdvantage) for each in objective.modifiers):
        return "not read: the advantage is fixed"
    top = "every id" if objective.k >= FULL_VOCAB_K else f"the teacher's top-{objective.k}"
    scored = f"exact at {top} and at the other scored ids of the current student"
    return {
        "teacher": f"exact: every row has {top}",
        "overlap": f"exact: every row has {top}",
        "union": scored,
        "non_overlap": scored,
        "student": "exact: the teacher scored the student's ids",
        "sampled": "exact: the teacher's log-prob of the sampled id",
        "mc": "exact: the teacher scored the drawn ids",
        "teacher_mc": "exact: the teacher's log-prob of the ids it drew",
    }[objective.support]


def _support(objective: Objective, cache: CacheInfo) -> str:
    k = objective.k
    if objective.over_spans:
        return _span_support(objective)
    missing = "ids without a score are left out, see cache/uncached_mass"
    return {
        "teacher": "fixed: the vocabulary"
        if k >= FULL_VOCAB_K
        else f"fixed: the teacher's top-{k}",
        "overlap": f"current: the student's top-{k} within the teacher's, all of it scored",
        "union": f"current: the student's top-{k} and the teacher's; {missing}",
        "non_overlap": f"current: the ids in one of the two top-{k} alone; {missing}",
        "student": f"frozen: the top-{k} of the "
        f"{'student at the import' if cache.imported else 'behaviour policy'} "
        f"({cache.prefixes()}); the current one may differ, see cache/uncached_mass",
        "sampled": "fixed: the sampled id",
        "mc": f"fixed: {cache.mc_draws} ids that the behaviour policy drew",
        "teacher_mc": f"fixed: {cache.q_draws} ids that were drawn from the teacher",
    }[objective.support]


def _span_support(objective: Objective) -> str:
    if objective.divergence not in SPAN_ROWS:
        return "fixed: the spans of both tokenizers"
    if objective.divergence == "uld":
        return (
            f"current: the student's top-{objective.k} as far as it is stored; the rest is between "
            "bounds, see span/uld_width"
        )
    return "fixed: the spans, and the stored ids that both models have a token of"


def _estimator(objective: Objective, cache: CacheInfo) -> str:
    return "; ".join([_own_estimator(objective, cache), *_terms(objective, cache)])


def _terms(objective: Objective, cache: CacheInfo) -> list[str]:
    """Return the texts on the losses that are added."""
    found = []
    for term in objective.terms:
        if isinstance(term, CrossEntropy):
            # Imported text has no draws of the student; nor have rollouts of other base weights.
            found.append(
                "ce: of the sampled tokens, pulls back to the policy that sampled them"
                if cache.known_ages
                else "ce: supervised fine-tuning on the text of another model"
            )
            continue
        goal = "the mean reward" if isinstance(term, Reward) else "the later part of KL(p || q)"
        drawn = _of_draws("one draw", goal, term.corrected, cache, cache.plain_sampling)
        found.append(f"{term.name}: {drawn}")
    return found


def _own_estimator(objective: Objective, cache: CacheInfo) -> str:
    if objective.divergence == "advantage":
        corrected = any(isinstance(each, Importance) for each in objective.modifiers)
        goal = _goal_of_spans(objective, cache)
        return _of_draws("one draw", goal, corrected, cache, cache.plain_sampling)
    if objective.support not in SAMPLED_SUPPORTS:
        if objective.estimator == "policy_gradient":
            return "deterministic, but not the gradient of a divergence"
        return "deterministic"
    if objective.support == "teacher_mc":
        return f"{cache.q_draws} draws per position, unbiased for KL(q || p) at any age"
    mc = objective.support == "mc"
    draws = f"{cache.mc_draws} draws" if mc else "one draw"
    names = {modifier.name for modifier in objective.modifiers}
    if "floor" in names:
        return f"{draws} per position, biased by the floor"
    if any(isinstance(each, FixedAdvantage) and each.is_off for each in objective.modifiers):
        return "no loss of its own: the advantage is 0"
    if "fixed" in names:
        return "one draw per position with a fixed advantage: on policy its mean gradient is zero"
    # The MC ids come from the full distribution at temperature 1, however the token was sampled.
    full = cache.plain_sampling or mc
    return _of_draws(draws, "KL(p || q)", "importance" in names, cache, full)


def _goal_of_spans(objective: Objective, cache: CacheInfo) -> str:
    """Return the text on what the advantages of spans are a draw of."""
    if objective.parameter == 1:
        return "KL(p || q) over responses"
    if cache.span_rows is None:
        return "KL(p || q)" if not objective.parameter else "a discounted KL(p || q)"
    return "KL(p || q) of spans whose ends do not depend on later text"


def _of_draws(draws: str, goal: str, corrected: bool, cache: CacheInfo, full: bool) -> str:
    """Return the text on an estimator of `goal` from draws of the behaviour policy.

    corrected: importance-weighted. full: drawn from the full distribution at temperature 1.
    """
    if corrected and full:
        return (
            f"{draws} per position, importance-weighted: unbiased for {goal} at any age, "
            "except for the prefixes"
        )
    if cache.ages == (0,) and cache.same_weights and full:
        update = "first update" if cache.versions else "first update of a round"
        return f"{draws} per position, unbiased for {goal} at age 0, off policy after the {update}"
    between = ", " if cache.versions else " to "
    ages = between.join("unknown" if age is None else str(age) for age in cache.ages)
    other = "of another program" if cache.imported else "from a tempered or truncated distribution"
    reason = "" if full else f", {other}"
    if cache.ages == (0,) and not cache.same_weights:
        reason += ", but of another run"
    weighted = "importance-weighted" if corrected else "not importance-weighted"
    return f"{draws} per position, biased: off policy (age {ages}{reason}) and {weighted}"
