"""What a student learns from cached scores: an objective is support x divergence x outside x form.

    supports.py       which ids of a row the loss looks at            SUPPORTS
    divergences.py    how it compares two distributions on them       DIVERGENCES
    objective.py      an objective, and which combinations mean something   CELLS
    row_objective.py  its loss and gradient by K-sized torch          OUTSIDE
    presets.py        the named ones, with their sources              PRESETS
    exactness.py      what a cache can serve of it, in words, or a refusal

To add a preset, name a value in PRESETS. To add a divergence, write a few lines of torch on [C, S]
log-probs and a line in DIVERGENCES; a support likewise. Then allow its cells in CELLS: the tests
check of every allowed cell that its expected gradient is zero at p = q and nowhere near, and that
it descends. Nothing here is vocabulary-sized, so no kernel is ever needed.
"""

from logitcask.engine.objectives.exactness import Facts, Verdict, verdict, warnings
from logitcask.engine.objectives.objective import Objective
from logitcask.engine.objectives.presets import PRESETS, Preset, find_preset
from logitcask.engine.objectives.row_objective import live_k, row_objective

__all__ = [
    "PRESETS",
    "Facts",
    "Objective",
    "Preset",
    "Verdict",
    "find_preset",
    "live_k",
    "row_objective",
    "verdict",
    "warnings",
]
