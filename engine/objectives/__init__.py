"""What a student learns from cached scores: an objective is support x divergence x outside x form,
and modifiers on it.

    supports.py       which ids of a row the loss looks at, and its log-probs there   SUPPORTS
    divergences.py    how it compares two distributions on them       DIVERGENCES
    tail.py           what it does with the mass elsewhere            OUTSIDE
    modifiers.py      small changes, any number of them               MODIFIERS
    objective.py      an objective, and which combinations mean something   CELLS, WEIGHTS
    evaluate.py       its loss and gradient, as the kernels call it or compute it themselves
    weights.py        what a whole row weighs in an update            AGGREGATIONS
    presets.py        the named ones, with their sources              PRESETS
    parse.py          a preset from its text
    exactness.py      what a cache can serve of it, in words, or a refusal
    bounds.py         how far the student may move from what was scored

To add a preset, name a value in PRESETS. To add a divergence, write a few lines of torch on [C, S]
log-probs and a line in DIVERGENCES, and one in PARAMETERS if it has a parameter; CELLS allows it on
every top-k support. A support is a mask in SUPPORTS, its cells in CELLS, LIVE or DRAWN if it is one
of these, and its words in both dicts of exactness.py: what is exact of it, and which ids it is. A
modifier is a class in MODIFIERS. The tests check of every allowed cell that its expected gradient
is zero at p = q and nowhere near, that it descends, and that it is its formula, which they have
once more in float64 (full_rows.py). Nothing here is vocabulary-sized, so no kernel is ever needed:
what the fused kernels do not know runs as its torch.
"""

from logitcask.engine.objectives.bounds import Bounds, exceeded, warnings
from logitcask.engine.objectives.evaluate import live_k, row_objective
from logitcask.engine.objectives.exactness import (
    CacheInfo,
    ExactnessReport,
    check_exactness,
    served,
)
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.parse import parse_objective
from logitcask.engine.objectives.presets import PRESETS, Preset
from logitcask.engine.objectives.weights import AGGREGATIONS, Weighed, loss_weights

__all__ = [
    "AGGREGATIONS",
    "PRESETS",
    "Bounds",
    "CacheInfo",
    "ExactnessReport",
    "Objective",
    "Preset",
    "Weighed",
    "check_exactness",
    "exceeded",
    "live_k",
    "loss_weights",
    "parse_objective",
    "row_objective",
    "served",
    "warnings",
]
