"""Modifier: the base class, with the places at which a modifier acts.

p is the student, q the teacher. The places, in the order in which the loss of a row is made:

    prepare            values that need all rows of a pack
    adjust_target      the target that the student is compared with
    adjust_advantage   A [C, S] of the policy gradient, per id
    adjust_gradient    -w A [C, S], as a loss and as a derivative by log p
    adjust_terms       the finished loss of a row and its coefficients
    term               a loss of its own, which is added with a weight: see terms.py

or, with scope `sequence` or `batch`, weights of whole rows by the stored values of them and their
neighbours: see loss_weights.py.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.supports import LossTerms, SupportLogProbs
from logitcask.engine.packing.targets import Targets

RATIO_BOUND = 20.0
"""Largest |log ratio|, as in the released code of arXiv 2604.13016."""


class Combination(Protocol):
    """The parts of an objective that decide if a modifier has a meaning in it."""

    @property
    def support(self) -> str: ...
    @property
    def divergence(self) -> str: ...
    @property
    def tail(self) -> str: ...
    @property
    def estimator(self) -> str: ...


@dataclass(frozen=True)
class Modifier:
    """The base class: it changes nothing."""

    name: ClassVar[str]
    scope: ClassVar[str] = "row"
    current_topk: ClassVar[int] = 0
    """Ids of the current student's top-k that it reads."""
    needs_base: ClassVar[bool] = False
    keeps_sum: ClassVar[bool] = True
    """A renormalised objective stays one: its derivatives by log p still sum to zero."""

    def check(self, objective: Combination) -> None:
        """Raise ObjectiveError if it has no meaning in the objective."""

    def prepare(self, rows: Targets) -> Targets:
        """Add values to all rows of a pack."""
        return rows

    def adjust_target(self, inputs: SupportLogProbs) -> SupportLogProbs:
        return inputs

    def adjust_advantage(self, a: Tensor, inputs: SupportLogProbs) -> Tensor:
        return a

    def adjust_gradient(
        self, loss: Tensor, g: Tensor, inputs: SupportLogProbs
    ) -> tuple[Tensor, Tensor]:
        return loss, g

    def adjust_terms(self, terms: LossTerms, inputs: SupportLogProbs) -> LossTerms:
        return terms

    def reject(self, what: str, why: str, hint: str) -> ObjectiveError:
        return ObjectiveError(f"modifier {self.name!r} with {what}: {why}", hint=hint)

    def require_policy_gradient(self, objective: Combination) -> None:
        if objective.estimator != "policy_gradient":
            raise self.reject(
                "estimator 'divergence'",
                "there is no advantage to change",
                "use estimator 'policy_gradient'",
            )

    def require_support(self, objective: Combination, why: str, *supports: str) -> None:
        if objective.support not in supports:
            known = " or ".join(map(repr, supports))
            raise self.reject(f"support {objective.support!r}", why, f"use support {known}")

    def require_range(self, key: str, low: float, high: float, ends: str = "()") -> None:
        """Raise ObjectiveError unless `key` lies between; a bracket of `ends` closes its side."""
        value = getattr(self, key)
        closed = (value == low and ends[0] == "[") or (value == high and ends[1] == "]")
        if not (low < value < high or closed):
            raise ObjectiveError(
                f"modifier {self.name!r}: {key} = {value} is not in "
                f"{ends[0]}{low:g}, {high:g}{ends[1]}",
                hint=f"give {key} a value in it",
            )


def policy_ratio(log_p: Tensor, log_old: Tensor, mask: Tensor) -> Tensor:
    """Return [C, S] p / p_old on the support, 0 elsewhere."""
    log_ratio = torch.where(mask, log_p - log_old, 0.0).clamp(-RATIO_BOUND, RATIO_BOUND)
    return torch.where(mask, log_ratio.exp(), 0.0)
