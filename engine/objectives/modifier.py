"""What every modifier of an objective is, and what it may refuse."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.supports import LossTerms, SupportLogProbs

RATIO_BOUND = 20.0
"""Largest |log ratio|, as in the released code of arXiv 2604.13016."""


class Parts(Protocol):
    """What of an objective decides whether a modifier has a meaning in it."""

    @property
    def support(self) -> str: ...
    @property
    def outside(self) -> str: ...
    @property
    def form(self) -> str: ...


@dataclass(frozen=True)
class Modifier:
    """Does nothing."""

    name: ClassVar[str]
    scope: ClassVar[str] = "row"
    live_k: ClassVar[int] = 0
    """Ids of the live top-k that it looks at."""
    needs_base: ClassVar[bool] = False
    keeps_sum: ClassVar[bool] = True
    """A renormalised objective stays one: its derivatives by log p still sum to zero."""

    def check(self, objective: Parts) -> None:
        """Raises ObjectiveError where it has no meaning."""

    def target(self, columns: SupportLogProbs) -> SupportLogProbs:
        return columns

    def advantage(self, a: Tensor, columns: SupportLogProbs) -> Tensor:
        return a

    def terms(self, loss: Tensor, g: Tensor, columns: SupportLogProbs) -> tuple[Tensor, Tensor]:
        return loss, g

    def step(self, step: LossTerms, columns: SupportLogProbs) -> LossTerms:
        return step


def ratio_of(log_p: Tensor, log_old: Tensor, on: Tensor) -> Tensor:
    """[C, S] p / p_old on the support, 0 elsewhere."""
    log_ratio = torch.where(on, log_p - log_old, 0.0).clamp(-RATIO_BOUND, RATIO_BOUND)
    return torch.where(on, log_ratio.exp(), 0.0)


def refused(name: str, what: str, why: str, hint: str) -> ObjectiveError:
    return ObjectiveError(f"modifier {name!r} with {what}: {why}", hint=hint)


def advantage_only(name: str, objective: Parts) -> None:
    if objective.form != "advantage":
        raise refused(
            name, "form 'divergence'", "there is no advantage to change", "use form 'advantage'"
        )


def within(
    name: str,
    key: str,
    value: float,
    low: float,
    high: float,
    *,
    closed_below: bool = False,
    closed_above: bool = False,
) -> None:
    if low < value < high or (closed_below and value == low) or (closed_above and value == high):
        return
    ends = "[" if closed_below else "(", "]" if closed_above else ")"
    raise ObjectiveError(
        f"modifier {name!r}: {key} = {value} is not in {ends[0]}{low:g}, {high:g}{ends[1]}",
        hint=f"give {key} a value in it",
    )
