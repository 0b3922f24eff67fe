"""Modifiers that add a loss of the sampled token with a weight, and the control without a teacher.

p is the student, q the teacher, b the behaviour policy, y the sampled token of a row, sg[] is held
fixed. A term is added to any objective, and metrics.jsonl has it as `loss/NAME`, without its
weight. The objective's own part is `loss/distill`. Terms that are policy gradients are on policy:
they have the same labels of exactness as the sampled token.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.modifiers.base import Combination, Modifier, policy_ratio
from logitcask.engine.objectives.supports import LossTerms, SupportLogProbs
from logitcask.engine.packing.targets import Targets

STD_FLOOR = 1e-6
"""Added to a standard deviation of rewards, as in verl's GRPO."""


@dataclass(frozen=True)
class Term(Modifier):
    """A loss of log p(y) that is added with a weight."""

    keeps_sum: ClassVar[bool] = False
    on_policy: ClassVar[bool] = True
    """It is a policy gradient on draws of the student."""
    formula: ClassVar[str]
    """Loss of one position without the weight, nats."""
    needs: ClassVar[str]
    """Contents that the store must have."""
    weight: float = 1.0

    def check(self, objective: Combination) -> None:
        self.require_range("weight", 0.0, math.inf)

    @property
    def corrected(self) -> bool:
        """Return whether it is unbiased on draws of an earlier student."""
        return not self.on_policy

    @abstractmethod
    def term(self, inputs: SupportLogProbs) -> LossTerms:
        """Return loss and gradient of C rows, without the weight."""


@dataclass(frozen=True)
class CrossEntropy(Term):
    """Adds weight -log p(y), the cross-entropy on the stored tokens. On text of another source this
    is supervised fine-tuning. On draws of b its mean gradient is that of KL(b || p): zero as long
    as p is b, and later a pull back to b.
    """

    name: ClassVar[str] = "ce"
    on_policy: ClassVar[bool] = False
    formula: ClassVar[str] = "-log p(y)"
    needs: ClassVar[str] = "the sampled tokens"
    weight: float = 0.1

    def term(self, inputs: SupportLogProbs) -> LossTerms:
        log_p = token_log_p(inputs)
        return LossTerms.of_log_p(-log_p, at_token(inputs, -torch.ones_like(log_p)))


@dataclass(frozen=True)
class Reward(Term):
    """Adds weight -sg[A] log p(y), A the reward of the response minus the mean over the responses
    to its prompt: GRPO's outcome supervision (arXiv 2402.03300, section 4.1.2), by default without
    the division by the standard deviation of these (arXiv 2503.20783), with `std` divided by it.
    `importance` multiplies by p(y) / b(y), b as in the modifier of that name.
    """

    name: ClassVar[str] = "reward"
    formula: ClassVar[str] = "-sg[reward - mean reward of the prompt] log p(y)"
    needs: ClassVar[str] = "rewards (rollout --grader) of two or more responses to each prompt"
    weight: float = 1.0
    std: bool = False
    importance: bool = False

    @property
    def corrected(self) -> bool:
        return self.importance

    def term(self, inputs: SupportLogProbs) -> LossTerms:
        rows, dtype = inputs.rows, inputs.log_p.dtype
        a = rows.require("reward").to(dtype) - rows.require("reward_mean").to(dtype)
        if self.std:
            a = a / (rows.require("reward_std").to(dtype) + STD_FLOOR)
        if self.importance:
            log_b = rows.behavior_logprobs.to(dtype)
            a = a * policy_ratio(token_log_p(inputs), log_b, torch.ones_like(a, dtype=torch.bool))
        return LossTerms.of_log_p(-a, at_token(inputs, -a))


@dataclass(frozen=True)
class ReturnToGo(Term):
    """Adds weight -sg[R] log p(y), R = sum_s discount^(s - t - 1) A_s over the positions s > t of
    the sequence, A_s = log q(y_s) - log b(y_s): MiniLLM's long part (arXiv 2306.08543, Eq.3; the
    objective is its single step). With `normalise` R is divided by the sum of its weights, the
    number of later positions at discount 1. Positions that are not trained on have no A.

    A_s is that of the student that sampled: the current one would need a second pass over the
    sequence. Both are the same on policy.
    """

    name: ClassVar[str] = "return_to_go"
    formula: ClassVar[str] = "-sg[R] log p(y), R of log q - log b over the later sampled ids"
    needs: ClassVar[str] = "teacher's log-prob of every sampled token"
    discount: float = 1.0
    normalise: bool = True

    def check(self, objective: Combination) -> None:
        super().check(objective)
        self.require_range("discount", 0.0, 1.0, "(]")
        if objective.divergence != "reverse_kl":
            raise self.reject(
                f"divergence {objective.divergence!r}",
                "it is the part of the sequence's KL(p || q) that a position has on later ones",
                "use divergence 'reverse_kl'",
            )

    def prepare(self, rows: Targets) -> Targets:
        return replace(rows, later_advantage=later_advantage(rows, self.discount, self.normalise))

    def term(self, inputs: SupportLogProbs) -> LossTerms:
        r = inputs.rows.require("later_advantage").to(inputs.log_p.dtype)
        return LossTerms.of_log_p(-r, at_token(inputs, -r))


@dataclass(frozen=True)
class FixedAdvantage(Modifier):
    """A becomes `nats` at every sampled token: no value of the teacher is read. On policy the mean
    gradient over draws is zero.
    """

    name: ClassVar[str] = "fixed"
    nats: float = -1.0

    @property
    def is_off(self) -> bool:
        """Return whether the objective has no part of its own, so that its terms are all of it."""
        return self.nats == 0

    def check(self, objective: Combination) -> None:
        self.require_range("nats", -math.inf, math.inf)
        self.require_policy_gradient(objective)
        self.require_support(objective, "a top-k is chosen by its values", "sampled")

    def adjust_target(self, inputs: SupportLogProbs) -> SupportLogProbs:
        # Also where the teacher excludes the token: its value must not matter.
        column = torch.arange(inputs.log_p.shape[1], device=inputs.log_p.device)
        mask = (column == inputs.rows.token_col[:, None]) & (inputs.log_p != -torch.inf)
        return replace(inputs, mask=mask, log_q=torch.where(mask, 0.0, inputs.log_q))

    def adjust_advantage(self, a: Tensor, inputs: SupportLogProbs) -> Tensor:
        return torch.full_like(a, self.nats)


def token_log_p(inputs: SupportLogProbs) -> Tensor:
    """Return [C] log p(y) of the current student."""
    return inputs.log_p.gather(1, inputs.rows.token_col[:, None])[:, 0]


def at_token(inputs: SupportLogProbs, value: Tensor) -> Tensor:
    """Return [C, S], `value` [C] in the column of the sampled token, 0 elsewhere."""
    return torch.zeros_like(inputs.log_p).scatter(1, inputs.rows.token_col[:, None], value[:, None])


def later_advantage(rows: Targets, discount: float, normalise: bool) -> Tensor:
    """Return [P] float64, R of ReturnToGo. Raises ObjectiveError for an incomplete sequence.

    The sums of 1, 2, 4, ... positions are made from each other, so that a response of n tokens
    needs log2 n steps, in float64.
    """
    _check_whole(rows)
    counted = rows.weight > 0
    a = (rows.teacher_logprobs.double() - rows.student_logprobs.double()).where(counted, 0.0)
    counted = counted & a.isfinite()  # an id that one side excludes leaves every advantage
    sums = torch.stack([a.where(counted, 0.0), counted.double()])  # [2, P]
    sums = _shifted(sums, rows.sequence, 1)
    step, longest = 1, int(rows.position.max()) + 1 if len(rows) else 0
    while step < longest:
        sums = sums + discount**step * _shifted(sums, rows.sequence, step)
        step *= 2
    total, weight = sums.unbind()
    return total / weight.clamp(min=torch.finfo(torch.float64).tiny) if normalise else total


def _shifted(values: Tensor, sequence: Tensor, step: int) -> Tensor:
    """Return the values [2, P] of `step` positions later in their sequence, 0 beyond its end."""
    out = torch.zeros_like(values)
    if step < len(sequence):
        same = sequence[step:] == sequence[:-step]
        out[:, :-step] = torch.where(same, values[:, step:], 0.0)
    return out


def _check_whole(rows: Targets) -> None:
    """Raise ObjectiveError unless every sequence has its rows from position 0 on, in order."""
    first = torch.ones_like(rows.position, dtype=torch.bool)
    first[1:] = rows.sequence[1:] != rows.sequence[:-1]
    before = torch.roll(rows.position, 1) + 1
    wrong = rows.position != torch.where(first, 0, before)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ObjectiveError(
            f"row {at} is position {int(rows.position[at])} of a response whose earlier rows are "
            "not there, and a return needs whole responses",
            hint="give the rows of whole sequences, in order",
        )
