"""Small changes to an objective, which any number of can be put together; p student, q teacher.

Each acts at one of four places, in the order in which a row's loss is made:

    target      what the student is held against
    advantage   A [C, S] of the advantage form, per id
    terms       -w A [C, S], as a loss and as a derivative by log p
    step        the finished loss of a row and its coefficients

or, with scope `sequence` or `batch`, weighs whole rows by what the store holds of them and their
neighbours: see row_factors.py. Add one as a class here and a line in MODIFIERS.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from logitcask.engine.metrics.metrics import renormalised
from logitcask.engine.objectives.divergences import forward_kl, reverse_kl
from logitcask.engine.objectives.modifier import (
    Modifier,
    Parts,
    advantage_only,
    ratio_of,
    refused,
    within,
)
from logitcask.engine.objectives.supports import LossTerms, SupportLogProbs
from logitcask.engine.objectives.tail import tail


@dataclass(frozen=True)
class Extrapolate(Modifier):
    """log q becomes factor log q + (1 - factor) log b, b the base model (G-OPD and ExOPD, arXiv
    2602.12125). Its optimum is proportional to q^factor b^(1 - factor); factor 1 changes nothing.
    """

    name: ClassVar[str] = "extrapolate"
    needs_base: ClassVar[bool] = True
    factor: float = 1.25

    def check(self, objective: Parts) -> None:
        within(self.name, "factor", self.factor, 0.0, math.inf)
        if objective.outside == "tail":
            raise refused(
                self.name,
                "outside 'tail'",
                "the base model's mass outside is not known",
                "use outside 'renormalize', or form 'advantage'",
            )

    def target(self, columns: SupportLogProbs) -> SupportLogProbs:
        log_b = columns.rows.held("base_log_p").to(columns.log_p.dtype)
        on = columns.on & log_b.isfinite()  # the base was not asked there, or excludes it
        log_q, log_b = (torch.where(on, x, 0.0) for x in (columns.log_q, log_b))
        mixed = self.factor * log_q + (1 - self.factor) * log_b
        return replace(columns, on=on).with_target(torch.where(on, mixed, columns.log_q))


@dataclass(frozen=True)
class AdaptiveTarget(Modifier):
    """q becomes q sg[p]^beta, normalised (Veto, arXiv 2601.07155). The student rests at
    q^(1 / (1 - beta)), normalised: sharper than q. beta is fixed here, the paper lets it decay.
    """

    name: ClassVar[str] = "adaptive_target"
    beta: float = 0.3

    def check(self, objective: Parts) -> None:
        within(self.name, "beta", self.beta, 0.0, 1.0, closed_below=True)
        if objective.form != "divergence":
            raise refused(
                self.name,
                "form 'advantage'",
                "a target that follows the student needs a law",
                "use form 'divergence'",
            )

    def target(self, columns: SupportLogProbs) -> SupportLogProbs:
        p = torch.where(columns.on, columns.log_p, 0.0)
        mass = torch.where(columns.on, columns.log_p.exp(), 0.0).sum(-1)
        left = torch.log((1 - mass).clamp(min=1e-30))
        # What is outside moves with its own mass. Both forms normalise what comes of it.
        return columns.with_target(
            columns.log_q + self.beta * p, columns.log_q_outside + self.beta * left
        )


@dataclass(frozen=True)
class Baseline(Modifier):
    """A gets + KL(p || q) of the row, which does not depend on the drawn id: the same mean with
    less variance (vOPD, arXiv 2605.07865). The KL is that on k ids of the live student which were
    scored, renormalised (`on = student`), or of the teacher's ids and a tail (`on = teacher`).
    """

    name: ClassVar[str] = "baseline"
    on: str = "student"
    k: int = 16

    @property
    def live_k(self) -> int:  # type: ignore[override]
        return self.k if self.on == "student" else 0

    def check(self, objective: Parts) -> None:
        within(self.name, "k", self.k, 1, math.inf, closed_below=True)
        if self.on not in ("student", "teacher"):
            raise refused(self.name, f"on = {self.on!r}", "it is 'student' or 'teacher'", "say so")
        if objective.support not in ("sampled", "mc"):
            raise refused(
                self.name,
                f"support {objective.support!r}",
                "it has no effect in the mean over draws, and a top-k is not drawn",
                "use it with support 'sampled' or 'mc'",
            )

    def advantage(self, a: Tensor, columns: SupportLogProbs) -> Tensor:
        rows = columns.rows
        if self.on == "student":
            of = columns.only(rows.cached & (columns.places < self.k))
            log_p, log_q = renormalised(of.log_p, of.on), renormalised(of.log_q, of.on)
            value = reverse_kl(log_p, log_q, of.on)
        else:
            value = tail(reverse_kl, columns.only(rows.q_rank < rows.kept[:, None])).loss
        return a + value[:, None]


@dataclass(frozen=True)
class Floor(Modifier):
    """A is at least `nats` (REOPOLD, arXiv 2603.11137, with log(0.2 / 0.8) = -1.386; its followers
    write log(0.2) / 0.8 = -2.012 instead).
    """

    name: ClassVar[str] = "floor"
    nats: float = math.log(0.25)

    def check(self, objective: Parts) -> None:
        within(self.name, "nats", self.nats, -math.inf, 0.0)
        advantage_only(self.name, objective)

    def advantage(self, a: Tensor, columns: SupportLogProbs) -> Tensor:
        return a.clamp(min=self.nats)


@dataclass(frozen=True)
class Importance(Modifier):
    """Terms get the ratio of the live student to the one that drew, at most `cap` where that is
    above 0 (AsyncOPD, arXiv 2606.24143, has no cap). It mends which id was drawn, not which prefix.
    The ratio is of the law that was really drawn from: tempered or truncated for the sampled token,
    the whole one for mc.
    """

    name: ClassVar[str] = "importance"
    cap: float = 0.0

    def check(self, objective: Parts) -> None:
        within(self.name, "cap", self.cap, 0.0, math.inf, closed_below=True)
        if objective.support not in ("sampled", "mc"):
            raise refused(
                self.name,
                f"support {objective.support!r}",
                "nothing was drawn from the student",
                "use support 'sampled' or 'mc'",
            )

    def terms(self, loss: Tensor, g: Tensor, columns: SupportLogProbs) -> tuple[Tensor, Tensor]:
        ratio = ratio_of(columns.log_p, columns.log_p_drawn(), columns.on)
        ratio = ratio.clamp(max=self.cap) if self.cap else ratio
        return loss * ratio, g * ratio


@dataclass(frozen=True)
class Clip(Modifier):
    """The clipped surrogate of PPO as the released code of arXiv 2604.13016 has it, per id: A and w
    come from the student that sampled, r = p / p_then, and the loss is max(-A r, -A clip(r, 1 -
    epsilon, 1 + epsilon)), where A < 0 at most -A dual. At r = 1, one update per rollout, it does
    nothing.
    """

    name: ClassVar[str] = "clip"
    epsilon: float = 0.2
    dual: float = 3.0

    def check(self, objective: Parts) -> None:
        within(self.name, "epsilon", self.epsilon, 0.0, 1.0)
        within(self.name, "dual", self.dual, 1.0, math.inf)
        advantage_only(self.name, objective)
        if objective.support not in ("sampled", "student"):
            raise refused(
                self.name,
                f"support {objective.support!r}",
                "the log-probs of the student that sampled are stored at its own ids",
                "use support 'sampled' or 'student'",
            )

    def target(self, columns: SupportLogProbs) -> SupportLogProbs:
        return replace(columns, log_p_then=columns.log_p_stored())

    def terms(self, loss: Tensor, g: Tensor, columns: SupportLogProbs) -> tuple[Tensor, Tensor]:
        assert columns.log_p_then is not None, "target comes first"
        ratio = ratio_of(columns.log_p, columns.log_p_then, columns.on)
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
    entropy is above `nats` (EOPD, arXiv 2603.07079: 0.8, k 16, coefficient 1). Where the entropy is
    an interval, its least must be above: a bound within it leaves the gate shut.
    """

    name: ClassVar[str] = "entropy_gate"
    keeps_sum: ClassVar[bool] = False
    nats: float = 0.8
    coefficient: float = 1.0
    k: int = 16

    def check(self, objective: Parts) -> None:
        within(self.name, "nats", self.nats, 0.0, math.inf, closed_below=True)
        within(self.name, "coefficient", self.coefficient, 0.0, math.inf)
        within(self.name, "k", self.k, 1, math.inf, closed_below=True)

    def step(self, step: LossTerms, columns: SupportLogProbs) -> LossTerms:
        rows = columns.rows
        open_ = (rows.q_entropy > self.nats).to(step.loss.dtype)
        added = tail(forward_kl, columns.only(rows.q_rank < self.k))
        return step.plus(added, self.coefficient * open_)


@dataclass(frozen=True)
class EntropyBonus(Modifier):
    """Adds -`coefficient` H(p), the live student's entropy over the whole vocabulary, so that it is
    not pulled to a point. dH/dz_v = -p_v (log p_v + H): a gradient at every id.
    """

    name: ClassVar[str] = "entropy_bonus"
    keeps_sum: ClassVar[bool] = False
    coefficient: float = 0.01

    def check(self, objective: Parts) -> None:
        within(self.name, "coefficient", self.coefficient, 0.0, math.inf)

    def step(self, step: LossTerms, columns: SupportLogProbs) -> LossTerms:
        h = columns.entropy
        zero, one = torch.zeros_like(step.at_ids), torch.ones_like(h)
        added = LossTerms(-h, zero, h, h[:, None].expand_as(zero), dense_log=one)
        return step.plus(added, self.coefficient * one)


@dataclass(frozen=True)
class Prune(Modifier):
    """Rows weigh clip(1 - drop n, 0, 1) + floor, n the rows so far in their response in which the
    stored top-k of student and teacher share less than `overlap` (Prune-OPD, arXiv 2605.07804, its
    code's defaults). What it shortens rollouts by is left out: these are made already.
    """

    name: ClassVar[str] = "prune"
    scope: ClassVar[str] = "sequence"
    overlap: float = 0.9
    drop: float = 0.02
    floor: float = 0.0
    k: int = 16

    def check(self, objective: Parts) -> None:
        within(self.name, "overlap", self.overlap, 0.0, 1.0, closed_above=True)
        within(self.name, "drop", self.drop, 0.0, 1.0, closed_above=True)
        within(self.name, "floor", self.floor, 0.0, math.inf, closed_below=True)
        within(self.name, "k", self.k, 1, math.inf, closed_below=True)


@dataclass(frozen=True)
class Stepwise(Modifier):
    """Rows of step j weigh min((d_1 + e) / (d_j + e), 1 + delta), d the mean |log p - log q| of the
    sampled ids of a step when they were sampled, e = 1e-6 (SOD, arXiv 2605.07725; its product of
    ratios telescopes). A store has no step boundaries: a step is `tokens` response tokens. The
    outcome reward's own advantage is left out.
    """

    name: ClassVar[str] = "stepwise"
    scope: ClassVar[str] = "sequence"
    tokens: int = 64
    delta: float = 0.5

    def check(self, objective: Parts) -> None:
        within(self.name, "tokens", self.tokens, 1, math.inf, closed_below=True)
        within(self.name, "delta", self.delta, 0.0, math.inf, closed_below=True)


@dataclass(frozen=True)
class KeepEntropy(Modifier):
    """Only the `share` of an update's rows in which the student that sampled was least sure is
    trained on (REOPOLD's second stage, arXiv 2603.11137; TIP, arXiv 2604.14084, by its entropy).
    """

    name: ClassVar[str] = "keep_entropy"
    scope: ClassVar[str] = "batch"
    share: float = 0.5

    def check(self, objective: Parts) -> None:
        within(self.name, "share", self.share, 0.0, 1.0, closed_above=True)


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
