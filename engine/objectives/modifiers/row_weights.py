"""Modifiers with scope `sequence` or `batch`: the settings of loss_weights.py."""

import math
from dataclasses import dataclass
from typing import ClassVar

from logitcask.engine.objectives.modifiers.base import Combination, Modifier


@dataclass(frozen=True)
class Prune(Modifier):
    """Rows get the weight clip(1 - drop n, 0, 1) + floor, n the rows so far in their response in
    which the stored top-k of student and teacher share less than `overlap` (Prune-OPD, arXiv
    2605.07804, its code's defaults). It shortens no rollouts, as these are stored already.
    """

    name: ClassVar[str] = "prune"
    scope: ClassVar[str] = "sequence"
    overlap: float = 0.9
    drop: float = 0.02
    floor: float = 0.0
    k: int = 16

    def check(self, objective: Combination) -> None:
        self.require_range("overlap", 0.0, 1.0, "(]")
        self.require_range("drop", 0.0, 1.0, "(]")
        self.require_range("floor", 0.0, math.inf, "[)")
        self.require_range("k", 1, math.inf, "[)")


@dataclass(frozen=True)
class Stepwise(Modifier):
    """Rows of step j get the weight min((d_1 + e) / (d_j + e), 1 + delta), e = 1e-6.

    d is the mean |log b - log q| of a step's sampled ids, b the behaviour policy (SOD, arXiv
    2605.07725; its product of ratios telescopes). A store has no step boundaries: a step is
    `tokens` response tokens. `+ reward` adds the advantage of the outcome.
    """

    name: ClassVar[str] = "stepwise"
    scope: ClassVar[str] = "sequence"
    tokens: int = 64
    delta: float = 0.5

    def check(self, objective: Combination) -> None:
        self.require_range("tokens", 1, math.inf, "[)")
        self.require_range("delta", 0.0, math.inf, "[)")


@dataclass(frozen=True)
class KeepEntropy(Modifier):
    """Only the `share` of an update's rows with the largest stored entropy of the student has a
    weight (REOPOLD's second stage, arXiv 2603.11137; TIP, arXiv 2604.14084).
    """

    name: ClassVar[str] = "keep_entropy"
    scope: ClassVar[str] = "batch"
    share: float = 0.5

    def check(self, objective: Combination) -> None:
        self.require_range("share", 0.0, 1.0, "(]")
