"""Modifiers of the target, the advantage or the gradient of single rows."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from logitcask.engine.metrics.metrics import renormalised
from logitcask.engine.objectives.divergences import forward_kl, reverse_kl
from logitcask.engine.objectives.modifiers.base import Combination, Modifier, policy_ratio
from logitcask.engine.objectives.supports import SPANS, LossTerms, SupportLogProbs
from logitcask.engine.objectives.tail import bucket


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
    the sampled token, the whole one for mc. Over spans it is the ratio of a whole span: see
    spans/advantage.py.
    """

    name: ClassVar[str] = "importance"
    cap: float = 0.0

    def check(self, objective: Combination) -> None:
        self.require_range("cap", 0.0, math.inf, "[)")
        if objective.support != SPANS:
            why = "its ids are not drawn from the student"
            self.require_support(objective, why, "sampled", "mc")

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
