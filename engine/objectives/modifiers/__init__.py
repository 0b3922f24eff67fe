"""Modifiers: small changes to an objective, any number of which can be combined.

    base.py         Modifier, and the places at which one acts
    row.py          the target, the advantage or the gradient of a row
    terms.py        losses of their own, added with a weight, and the control without a teacher
    row_weights.py  weights of whole rows in an update

Add one as a class in one of these and a line in MODIFIERS.
"""

from collections.abc import Mapping

from logitcask.engine.objectives.modifiers.base import Modifier
from logitcask.engine.objectives.modifiers.row import (
    AdaptiveTarget,
    Baseline,
    Clip,
    EntropyBonus,
    EntropyGate,
    Extrapolate,
    Floor,
    Importance,
)
from logitcask.engine.objectives.modifiers.row_weights import KeepEntropy, Prune, Stepwise
from logitcask.engine.objectives.modifiers.terms import (
    CrossEntropy,
    FixedAdvantage,
    ReturnToGo,
    Reward,
    Term,
)

MODIFIERS: dict[str, type[Modifier]] = {
    kind.name: kind
    for kind in (
        Extrapolate,
        AdaptiveTarget,
        Baseline,
        Floor,
        Importance,
        Clip,
        EntropyGate,
        EntropyBonus,
        CrossEntropy,
        Reward,
        ReturnToGo,
        FixedAdvantage,
        Prune,
        Stepwise,
        KeepEntropy,
    )
}

EXCLUDES: Mapping[str, tuple[frozenset[str], str]] = {
    FixedAdvantage.name: (
        frozenset(
            {"extrapolate", "baseline", "floor", "entropy_gate", "return_to_go"}
            | {"prune", "stepwise"}
        ),
        "it reads the teacher's values, and the control reads none",
    ),
    ReturnToGo.name: (
        frozenset({"extrapolate", "adaptive_target", "floor"}),
        "the sum over later positions is of log q - log p as they are",
    ),
}
"""Modifier -> the modifiers that have no meaning with it, and the reason."""

__all__ = [
    "EXCLUDES",
    "MODIFIERS",
    "AdaptiveTarget",
    "Baseline",
    "Clip",
    "CrossEntropy",
    "EntropyBonus",
    "EntropyGate",
    "Extrapolate",
    "FixedAdvantage",
    "Floor",
    "Importance",
    "KeepEntropy",
    "Modifier",
    "Prune",
    "ReturnToGo",
    "Reward",
    "Stepwise",
    "Term",
]
