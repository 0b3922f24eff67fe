"""Preset: a named objective, and the texts of one whose fields were changed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.divergences import PARAMETERS
from logitcask.engine.objectives.modifiers import Term
from logitcask.engine.objectives.objective import Objective

FULL_VOCAB_K = 65535
"""The k of an objective over the whole vocabulary: more than a row can hold."""

KEPT = "teacher's kept ids, k <= k_min of the score request"
TAIL = "teacher's kept ids and tail; k counts kept ids at most, fewer are fine"
STUDENT = "teacher's log-probs at the student's stored ids, k <= student_k of the rollouts"
FIXED = "exact at any age"
FROZEN = "S(p) is frozen when sampled; watch cache/uncached_mass and cache/coverage"
COVERED = "ids of the current S(p) without a score are left out: watch cache/uncached_mass"
OVERLAP_AGE = "exact at any age; watch cache/coverage, below 0.95 the loss covers less of p"

SHAPING = ("support", "divergence", "tail", "temperature")
"""Fields of an objective that change its formula."""


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


def on_topk(
    support: str,
    k: int,
    divergence: str = "reverse_kl",
    tail: str = "renormalize",
    parameter: float | None = None,
) -> Objective:
    """Return the exact gradient of a divergence on a top-k."""
    return Objective(
        support=support,
        divergence=divergence,
        tail=tail,
        estimator="divergence",
        k=k,
        parameter=parameter,
    )


def with_fields(preset: Preset, changes: Mapping[str, Any]) -> Preset:
    """Return the preset with other fields of its objective, and with the texts of these.

    A divergence comes with its usual parameter. Raises ObjectiveError for the fields of a policy
    gradient that change its formula, and for an objective without meaning.
    """
    shaping = [key for key in SHAPING if key in changes]
    if shaping and preset.objective.estimator != "divergence":
        raise ObjectiveError(
            f"{shaping[0]} = {changes[shaping[0]]} with objective {preset.name!r}: only a "
            f"divergence has another one, and this is {_KINDS[preset.objective.estimator]}",
            hint="start from teacher_topk, opd, overlap, union or non_overlap",
        )
    if "divergence" in changes:
        _, usual = PARAMETERS.get(changes["divergence"], ("", None))
        changes = {"parameter": usual, **changes}
    objective = replace(preset.objective, **changes)
    if not shaping:
        return replace(preset, objective=objective)
    return replace(
        preset,
        objective=objective,
        formula=formula(objective),
        needs=_needs(objective),
        staleness=_STALENESS.get(objective.support, FIXED),
        note="",
    )


def formula(objective: Objective) -> str:
    """Return the loss of one position as text, for a divergence on a top-k."""
    cut = objective.tail in ("renormalize", "zero")
    p, q = "p~" if objective.tail == "renormalize" else "p", "q~" if cut else "q"
    text = _FORMULAS[objective.divergence].format(p=p, q=q)
    if objective.parameter is not None:
        name, _ = PARAMETERS[objective.divergence]
        text += f", {name} {objective.parameter:g}"
    if objective.k < FULL_VOCAB_K:
        text += f", on S = {_SUPPORTS[objective.support]}{_TAILS[objective.tail]}"
    if objective.temperature != 1:
        text = f"T^2 {text}, both at p^(1 / T), T = {objective.temperature:g}"
    others = [each.name for each in objective.modifiers if not isinstance(each, Term)]
    return ", with ".join([text, *others])


def _needs(objective: Objective) -> str:
    if objective.support == "student":
        return STUDENT
    return TAIL if objective.tail == "bucket" else KEPT


_KINDS = {"policy_gradient": "a policy gradient", "spans": "a loss over spans"}
_FORMULAS = {
    "reverse_kl": "KL({p} || {q})",
    "forward_kl": "KL({q} || {p})",
    "mixed_kl": "weight KL({q} || {p}) + (1 - weight) KL({p} || {q})",
    "jsd": "beta KL({q} || m) + (1 - beta) KL({p} || m), m = beta {q} + (1 - beta) {p}",
    "skew": "KL({q} || alpha {q} + (1 - alpha) {p})",
    "skew_reverse": "KL({p} || alpha {p} + (1 - alpha) {q})",
    "alpha": "sum [alpha {q} + (1 - alpha) {p} - {q}^alpha {p}^(1 - alpha)] / (alpha (1 - alpha))",
}
_SUPPORTS = {
    "teacher": "S(q)",
    "student": "S(p) of the behaviour policy",
    "overlap": "S(p) & S(q)",
    "union": "S(p) | S(q)",
    "non_overlap": "S(p) xor S(q)",
}
_TAILS = {
    "renormalize": "",
    "bucket": " and a bucket",
    "zero": ", q~ is 0 elsewhere",
    "ignore": " alone",
}
_STALENESS = {
    "student": FROZEN,
    "overlap": OVERLAP_AGE,
    "union": COVERED,
    "non_overlap": COVERED,
}
