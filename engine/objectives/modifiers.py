"""Modifiers: small changes to an objective, any number of which can be combined.

p is the student, q the teacher. Each modifier acts at one of four places, in the order in which the
loss of a row is made:

    adjust_target      the target that the student is compared with
    adjust_advantage   A [C, S] of the policy gradient, per id
    adjust_gradient    -w A [C, S], as a loss and as a derivative by log p
    adjust_terms       the finished loss of a row and its coefficients

or, with scope `sequence` or `batch`, weights whole rows by the stored values of them and their
neighbours: see loss_weights.py. Add one as a class here and a line in MODIFIERS.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.metrics.metrics import renormalised
from logitcask.engine.objectives.divergences import forward_kl, reverse_kl
from logitcask.engine.objectives.supports import LossTerms, SupportLogProbs
from logitcask.engine.objectives.tail import bucket

RATIO_BOUND = 20.0
"""Largest |log ratio|, as in the released code of arXiv 2604.13016."""


class Combination(Protocol):
    """The parts of an objective that decide if a modifier has a meaning in it."""

    @property
    def support(self) -> str: ...
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


@dataclass(frozen=True)
class Extrapolate(Modifier):
    """log q becomes factor log q + (1 - factor) log b, b the base model (G-OPD and ExOPD, arXiv
    2602.12125). Its optimum is proportional to q^factor b^(1 - factor); factor 1 changes nothing.
    """

    name: ClassVar[str] = "extrapolate"
    needs_base: ClassVar[bool] = True
    factor: float = 1.25

    def check(self, objective: Combination) -> None:
        self.require_range("factor", 0.0, math.inf)
        if objective.tail == "bucket":
            raise self.reject(
                "tail 'bucket'",
                "the base model's mass outside the support is not known",
                "use tail 'renormalize', or estimator 'policy_gradient'",
            )

    def adjust_target(self, inputs: SupportLogProbs) -> SupportLogProbs:
        log_b = inputs.rows.require("base_log_p").to(inputs.log_p.dtype)
        mask = inputs.mask & log_b.isfinite()  # no base score there, or it excludes the id
        log_q, log_b = (torch.where(mask, x, 0.0) for x in (inputs.log_q, log_b))
        mixed = self.factor * log_q + (1 - self.factor) * log_b
        return replace(inputs, mask=mask).with_target(torch.where(mask, mixed, inputs.log_q))


@dataclass(frozen=True)
class AdaptiveTarget(Modifier):
    """q becomes q sg[p]^beta, normalised (Veto, arXiv 2601.07155). The student rests at
    q^(1 / (1 - beta)), normalised: sharper than q. beta is fixed here, the paper lets it decay.
    """

    name: ClassVar[str] = "adaptive_target"
    beta: float = 0.3

    def check(self, objective: Combination) -> None:
        self.require_range("beta", 0.0, 1.0, "[)")
        if objective.estimator != "divergence":
            raise self.reject(
                "estimator 'policy_gradient'",
                "a target that follows the student must be a distribution",
                "use estimator 'divergence'",
            )

    def adjust_target(self, inputs: SupportLogProbs) -> SupportLogProbs:
        p = torch.where(inputs.mask, inputs.log_p, 0.0)
        mass = torch.where(inputs.mask, inputs.log_p.exp(), 0.0).sum(-1)
        left = torch.log((1 - mass).clamp(min=1e-30))
        # The tail moves with its own mass. Every tail that a divergence allows normalises later.
        return inputs.with_target(
            inputs.log_q + self.beta * p, inputs.log_q_tail + self.beta * left
        )


@dataclass(frozen=True)
class Baseline(Modifier):
    """A gets + KL(p || q) of the row, which does not depend on the drawn id: the same mean with
    less variance (vOPD, arXiv 2605.07865). The KL is over the scored ids of the current student's
    top-k, renormalised (`on = student`), or over the teacher's ids and a bucket (`on = teacher`).
    """

    name: ClassVar[str] = "baseline"
    on: str = "student"
    k: int = 16

    @property
    def current_topk(self) -> int:  # type: ignore[override]
        return self.k if self.on == "student" else 0

    def check(self, objective: Combination) -> None:
        self.require_range("k", 1, math.inf, "[)")
        if self.on not in ("student", "teacher"):
            raise self.reject(
                f"on = {self.on!r}", "it is 'student' or 'teacher'", "give one of them"
            )
        self.require_support(
            objective,
            "it has no effect in the mean over draws, and a top-k is not drawn",
            *("sampled", "mc"),
        )

    def adjust_advantage(self, a: Tensor, inputs: SupportLogProbs) -> Tensor:
        rows = inputs.rows
        if self.on == "student":
            top = inputs.on(rows.cached & (inputs.topk_index < self.k))
            log_p, log_q = renormalised(top.log_p, top.mask), renormalised(top.log_q, top.mask)
            value = reverse_kl(log_p, log_q, top.mask)
        else:
            value = bucket(reverse_kl, inputs.on(rows.q_rank < rows.n_kept[:, None])).loss
        return a + value[:, None]


@dataclass(frozen=True)
class Floor(Modifier):
    """A is at least `nats` (REOPOLD, arXiv 2603.11137, with log(0.2 / 0.8) = -1.386; its followers
    write log(0.2) / 0.8 = -2.012 instead).
    """

    name: ClassVar[str] = "floor"
    nats: float = math.log(0.25)

    def check(self, objective: Combination) -> None:
        self.require_range("nats", -math.inf, 0.0)
        self.require_policy_gradient(objective)

    def adjust_advantage(self, a: Tensor, inputs: SupportLogProbs) -> Tensor:
        return a.clamp(min=self.nats)


@dataclass(frozen=True)
class Importance(Modifier):
    """Terms get the ratio of the current policy to the behaviour policy, at most `cap` if that is
    above 0 (AsyncOPD, arXiv 2606.24143, has no cap). It corrects the draw of an id, not of its
    prefix. The behaviour policy is the distribution that was drawn from: tempered or truncated for
    the sampled token, the whole one for mc.
    """

    name: ClassVar[str] = "importance"
    cap: float = 0.0

    def check(self, objective: Combination) -> None:
        self.require_range("cap", 0.0, math.inf, "[)")
        self.require_support(objective, "its ids are not drawn from the student", "sampled", "mc")

    def adjust_gradient(
        self, loss: Tensor, g: Tensor, inputs: SupportLogProbs
    ) -> tuple[Tensor, Tensor]:
        ratio = policy_ratio(inputs.log_p, inputs.behavior_log_p(), inputs.mask)
        ratio = ratio.clamp(max=self.cap) if self.cap else ratio
        return loss * ratio, g * ratio


@dataclass(frozen=True)
class Clip(Modifier):
    """The clipped surrogate of PPO per id, as in the released code of arXiv 2604.13016: A and w are
    those of the behaviour policy b, r = p / b, and the loss is max(-A r, -A clip(r, 1 - epsilon,
    1 + epsilon)), at most -A dual if A < 0. At r = 1, one update per rollout, it does nothing.
    """

    name: ClassVar[str] = "clip"
    epsilon: float = 0.2
    dual: float = 3.0

    def check(self, objective: Combination) -> None:
        self.require_range("epsilon", 0.0, 1.0)
        self.require_range("dual", 1.0, math.inf)
        self.require_policy_gradient(objective)
        self.require_support(
            objective,
            "the log-probs of the behaviour policy are stored at its own ids",
            *("sampled", "student"),
        )

    def adjust_target(self, inputs: SupportLogProbs) -> SupportLogProbs:
        return replace(inputs, log_p_old=inputs.old_log_p())

    def adjust_gradient(
        self, loss: Tensor, g: Tensor, inputs: SupportLogProbs
    ) -> tuple[Tensor, Tensor]:
        assert inputs.log_p_old is not None, "adjust_target comes first"
        ratio = policy_ratio(inputs.log_p, inputs.log_p_old, inputs.mask)
        plain, low = loss * ratio, 1 - self.epsilon
        clipped = loss * ratio.clamp(low, 1 + self.epsilon)
        value = torch.maximum(plain, clipped)
        moves = plain >= clipped
        bound = loss * self.dual  # loss = -A > 0 where A < 0
        capped = (loss > 0) & (value > bound)
        value = torch.where(capped, bound, value)
        return value, torch.where(moves & ~capped, g * ratio, 0.0)


@dataclass(frozen=True)
class EntropyGate(Modifier):
    """Adds `coefficient` KL(q || p) on the teacher's top-k and one bucket where the teacher's
    entropy is above `nats` (EOPD, arXiv 2603.07079: 0.8, k 16, coefficient 1). Of an interval, the
    lower end must be above it.
    """

    name: ClassVar[str] = "entropy_gate"
    keeps_sum: ClassVar[bool] = False
    nats: float = 0.8
    coefficient: float = 1.0
    k: int = 16

    def check(self, objective: Combination) -> None:
        self.require_range("nats", 0.0, math.inf, "[)")
        self.require_range("coefficient", 0.0, math.inf)
        self.require_range("k", 1, math.inf, "[)")

    def adjust_terms(self, terms: LossTerms, inputs: SupportLogProbs) -> LossTerms:
        rows = inputs.rows
        is_open = (rows.q_entropy > self.nats).to(terms.loss.dtype)
        added = bucket(forward_kl, inputs.on(rows.q_rank < self.k))
        return terms.plus(added, self.coefficient * is_open)


@dataclass(frozen=True)
class EntropyBonus(Modifier):
    """Adds -`coefficient` H(p), the current student's entropy over the whole vocabulary.

    dH/dz_v = -p_v (log p_v + H): a gradient at every id.
    """

    name: ClassVar[str] = "entropy_bonus"
    keeps_sum: ClassVar[bool] = False
    coefficient: float = 0.01

    def check(self, objective: Combination) -> None:
        self.require_range("coefficient", 0.0, math.inf)

    def adjust_terms(self, terms: LossTerms, inputs: SupportLogProbs) -> LossTerms:
        h = inputs.entropy
        zero, one = torch.zeros_like(terms.at_ids), torch.ones_like(h)
        added = LossTerms(-h, zero, h, h[:, None].expand_as(zero), dense_log=one)
        return terms.plus(added, self.coefficient * one)


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
    `tokens` response tokens. The advantage of the outcome reward is left out.
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
        Prune,
        Stepwise,
        KeepEntropy,
    )
}
