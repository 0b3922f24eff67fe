"""Objectives: the losses that a student is trained with on cached scores.

    objective.py        Objective: support x divergence x tail x estimator  ALLOWED_COMBINATIONS
    supports.py         the ids that a loss compares, and log-probs on them SUPPORTS
    divergences.py      how two distributions are compared on them          DIVERGENCES
    tail.py             the mass outside the support                        TAILS
    policy_gradient.py  the other estimator, and its weights of ids         WEIGHTS
    modifiers/          small changes, any number of them                   MODIFIERS
    loss_weights.py     weights of whole rows in an update                  AGGREGATIONS
    presets/            named objectives with their sources                 PRESETS
    parse.py            text -> preset
    spans/              losses that join rows, for another tokenizer        SPAN_LOSSES
    evaluate.py         an objective's loss and gradient, as the kernels call it
    report.py           facts of a cache, and the labels of exactness
    requirements.py     the data that an objective needs of a cache
    exactness.py        how exactly a cache serves an objective
    bounds.py           warnings and actions when the student moved too far

README.md lists them with formulas, and says how to add one.
"""

from logitcask.engine.objectives.bounds import Bounds, exceeded, warnings
from logitcask.engine.objectives.evaluate import current_topk, row_objective
from logitcask.engine.objectives.exactness import check_exactness, served
from logitcask.engine.objectives.loss_weights import AGGREGATIONS, LossWeights, loss_weights
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.parse import parse_objective
from logitcask.engine.objectives.presets import PRESETS, Preset
from logitcask.engine.objectives.report import CacheInfo, ExactnessReport

__all__ = [
    "AGGREGATIONS",
    "PRESETS",
    "Bounds",
    "CacheInfo",
    "ExactnessReport",
    "LossWeights",
    "Objective",
    "Preset",
    "check_exactness",
    "current_topk",
    "exceeded",
    "loss_weights",
    "parse_objective",
    "row_objective",
    "served",
    "warnings",
]
