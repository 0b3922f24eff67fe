"""Objective: support x divergence x tail x estimator, and modifiers, checked when it is made."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.divergences import (
    DIVERGENCES,
    OUTSIDE_COST,
    PARAMETERS,
    TRUNCATED,
)
from logitcask.engine.objectives.modifiers import (
    EXCLUDES,
    CrossEntropy,
    Importance,
    Modifier,
    Reward,
    Term,
)
from logitcask.engine.objectives.policy_gradient import WEIGHTS
from logitcask.engine.objectives.spans import SPAN_LOSSES, SPAN_PARAMETERS
from logitcask.engine.objectives.spans.losses import RANKED
from logitcask.engine.objectives.supports import (
    CURRENT_SUPPORTS,
    SAMPLED_SUPPORTS,
    SPANS,
    SUPPORTS,
)
from logitcask.engine.objectives.tail import TAILS

ESTIMATORS = ("divergence", "policy_gradient", SPANS)

ALLOWED_COMBINATIONS: frozenset[tuple[str, str, str, str]] = frozenset(
    [
        *product(
            ("teacher", "student", "overlap", "union", "non_overlap"),
            DIVERGENCES,
            ("renormalize", "bucket"),
            ("divergence",),
        ),
        # A teacher that is cut to its own top-k. On other supports the student would give up the
        # teacher's ids outside; in other divergences the minimum is elsewhere, or infinite.
        *product(("teacher",), OUTSIDE_COST, ("zero",), ("divergence",)),
        *product(("teacher",), TRUNCATED, ("ignore",), ("divergence",)),
        # The teacher's draws are a distribution of their own.
        ("teacher_mc", "forward_kl", "ignore", "divergence"),
        # An advantage compares raw log-probs, so it ignores the tail. It estimates the gradient of
        # reverse KL; its forward variant is reported as very poor (thunlp/OPD #21).
        *product(
            sorted({*SUPPORTS} - {"teacher_mc"}),
            ["reverse_kl"],
            ["ignore"],
            ["policy_gradient"],
        ),
    ]
)
"""(support, divergence, tail, estimator) of a loss of rows. A loss over spans has one tail."""

STORED_KEYS = {"tail": "outside", "estimator": "form"}
STORED_VALUES = {"bucket": "tail", "policy_gradient": "advantage"}
"""Names in run.json that differ from those of the code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """One loss. Raises ObjectiveError for an unknown name or a combination without meaning."""

    support: str
    """The ids that the loss compares: a key of SUPPORTS."""
    divergence: str
    """A key of DIVERGENCES, or with support `spans` of SPAN_LOSSES."""
    tail: str
    """The mass outside: `renormalize` both sides on the support, one `bucket`, `zero` of the
    teacher, which is renormalised on the support, or `ignore`."""
    estimator: str
    """`divergence`: its exact gradient. `policy_gradient`: -A grad log p, A held fixed. `spans`: a
    loss over spans, for a teacher with another tokenizer."""
    k: int
    """Largest number of ids in a top-k support; 1 for supports that are draws."""
    parameter: float | None = None
    """Parameter of the divergence, None if it has none. See divergences.PARAMETERS."""
    temperature: float = 1.0
    """Both sides are compared at p^(1 / temperature) and the loss is multiplied by its square."""
    weights: str = "student_p"
    """Weights of the ids in a policy gradient on a top-k: a key of WEIGHTS."""
    modifiers: tuple[Modifier, ...] = ()
    """In the order in which they are applied."""

    def __post_init__(self) -> None:
        known = SPAN_LOSSES if self.estimator == SPANS else DIVERGENCES
        for key, value, names in (
            ("support", self.support, (*SUPPORTS, SPANS)),
            ("divergence", self.divergence, known),
            ("tail", self.tail, TAILS),
            ("estimator", self.estimator, ESTIMATORS),
            ("weights", self.weights, WEIGHTS),
        ):
            _check_known(key, value, names)
        self._check_meaning()
        self._check_k()
        self._check_parameter()
        self._check_temperature()
        for modifier in self.modifiers:
            modifier.check(self)
        self._check_modifiers()

    @property
    def over_spans(self) -> bool:
        """Return whether it is a loss over spans."""
        return self.support == SPANS

    @property
    def is_ranked(self) -> bool:
        """Return whether k is the largest number of ids of a row that are compared."""
        if self.over_spans:
            return self.divergence in RANKED
        return self.support not in SAMPLED_SUPPORTS

    @property
    def current_topk(self) -> int:
        """Return how many of the current student's top ids the loss needs."""
        reads = self.is_ranked if self.over_spans else self.support in CURRENT_SUPPORTS
        own = self.k if reads else 0
        return max([own, *(modifier.current_topk for modifier in self.modifiers)])

    @property
    def needs_base(self) -> bool:
        return any(modifier.needs_base for modifier in self.modifiers)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Return the losses of the sampled token that are added."""
        return tuple(modifier for modifier in self.modifiers if isinstance(modifier, Term))

    def record(self) -> dict[str, Any]:
        """Return the objective as run.json stores it."""
        stored = {
            STORED_KEYS.get(key, key): STORED_VALUES.get(value, value)
            if key in STORED_KEYS
            else value
            for key, value in asdict(self).items()
        }
        if self.temperature == 1:
            del stored["temperature"]  # runs of before it had none
        if self.parameter == math.inf:
            stored["parameter"] = "inf"  # JSON has no such number
        stored["modifiers"] = [{"name": m.name, **asdict(m)} for m in self.modifiers]
        return stored

    def _check_meaning(self) -> None:
        if self.over_spans != (self.estimator == SPANS):
            raise ObjectiveError(
                f"support {self.support!r} with estimator {self.estimator!r}: a loss over spans "
                "joins several rows, and no other one does",
                hint="use support and estimator 'spans' together, or neither",
            )
        if self.over_spans:
            self._check_spans()
            return
        if self.support in SAMPLED_SUPPORTS - {"teacher_mc"} and self.estimator == "divergence":
            raise ObjectiveError(
                f"support {self.support!r} with estimator 'divergence': a drawn id is no "
                "distribution, and draws of p give no sum over p",
                hint="use estimator 'policy_gradient'",
            )
        if self.support == "teacher_mc" and (
            (self.divergence, self.tail, self.estimator) != ("forward_kl", "ignore", "divergence")
        ):
            raise ObjectiveError(
                f"support 'teacher_mc' with {self.divergence!r}, {self.tail!r}, "
                f"{self.estimator!r}: the teacher's draws estimate an average over q",
                hint="use divergence 'forward_kl', tail 'ignore', estimator 'divergence'",
            )
        if self.estimator == "divergence" and self.support != "teacher_mc":
            self._check_cut()
        combination = (self.support, self.divergence, self.tail, self.estimator)
        if combination not in ALLOWED_COMBINATIONS:
            raise ObjectiveError(
                f"estimator 'policy_gradient' with divergence {self.divergence!r} and tail "
                f"{self.tail!r}: it is defined by the raw log-ratio of reverse KL",
                hint="use divergence 'reverse_kl' and tail 'ignore', or estimator 'divergence'",
            )
        of_topk = self.estimator == "policy_gradient" and self.support not in SAMPLED_SUPPORTS
        if self.weights != "student_p" and not of_topk:
            raise ObjectiveError(
                f"weights {self.weights!r} with estimator {self.estimator!r} and support "
                f"{self.support!r}: only a policy gradient on a top-k has weights of ids",
                hint="leave weights out",
            )

    def _check_spans(self) -> None:
        """Raise ObjectiveError for what a loss over spans does not have."""
        for each in self.modifiers:
            drawn = isinstance(each, Importance) and self.divergence == "advantage"
            if drawn and self.parameter:
                raise ObjectiveError(
                    f"modifier {each.name!r} with gamma = {self.parameter}: it corrects the draw "
                    "of a span, not of those after it",
                    hint="use span_advantage(parameter=0), or leave it out",
                )
            if not drawn and not isinstance(each, CrossEntropy | Reward):
                raise ObjectiveError(
                    f"modifier {each.name!r} with a loss over spans, to which only the losses of "
                    "the sampled token 'ce' and 'reward' are added, and 'importance' to "
                    "span_advantage",
                    hint="leave it out; span_advantage(parameter=1) has a return of its own",
                )
        if self.temperature != 1:
            raise ObjectiveError(
                f"temperature = {self.temperature} with a loss over spans: sums over the tokens of "
                "a span are exact at 1 alone",
                hint="leave it out; x_token(parameter=2) compares ids at a temperature",
            )
        if self.tail != "ignore" or self.weights != "student_p":
            raise ObjectiveError(
                f"tail {self.tail!r} and weights {self.weights!r} with a loss over spans, which "
                "says for itself what it compares",
                hint="use tail 'ignore', and leave weights out",
            )

    def _check_cut(self) -> None:
        """Raise ObjectiveError for a teacher that is cut to the support and gives no target."""
        if self.tail == "ignore" and self.divergence not in TRUNCATED:
            raise ObjectiveError(
                f"divergence {self.divergence!r} with tail 'ignore': its sum over the support is "
                "not least at the teacher, that of reverse KL is where mass has left the support",
                hint="use tail 'renormalize' or 'bucket', or divergence 'forward_kl'",
            )
        if self.tail == "zero" and self.divergence not in OUTSIDE_COST:
            raise ObjectiveError(
                f"divergence {self.divergence!r} with tail 'zero': it is infinite where the "
                "student has mass and the teacher has none",
                hint=f"use one of {', '.join(OUTSIDE_COST)}, or tail 'renormalize' or 'bucket'",
            )
        if self.tail in ("zero", "ignore") and self.support != "teacher":
            raise ObjectiveError(
                f"support {self.support!r} with tail {self.tail!r}: the student would give up the "
                "teacher's ids outside the support",
                hint="use support 'teacher', or tail 'renormalize' or 'bucket'",
            )

    def _check_temperature(self) -> None:
        if self.temperature == 1:
            return
        if not 0 < self.temperature < math.inf:
            raise ObjectiveError(
                f"temperature = {self.temperature} is not in (0, inf)", hint="give a value in it"
            )
        if self.tail != "renormalize":
            raise ObjectiveError(
                f"temperature = {self.temperature} with tail {self.tail!r} and estimator "
                f"{self.estimator!r}: a cache of top ids at temperature 1 gives their ratios at "
                "another one, but not the mass outside",
                hint="use tail 'renormalize', which needs the ratios alone",
            )

    def _check_modifiers(self) -> None:
        names = [modifier.name for modifier in self.modifiers]
        for name in names:
            excluded, why = EXCLUDES.get(name, (frozenset(), ""))
            if found := [other for other in names if other in excluded]:
                raise ObjectiveError(
                    f"modifier {found[0]!r} with {name!r}: {why}", hint="leave one of them out"
                )

    def _check_k(self) -> None:
        if not self.is_ranked and self.k != 1:
            what = f"divergence {self.divergence!r}" if self.over_spans else ""
            raise ObjectiveError(
                f"k = {self.k} with {what or f'support {self.support!r}'}, which is no top-k",
                hint="leave --loss-topk out",
            )
        if self.tail == "renormalize" and self.k < 2:
            raise ObjectiveError(
                f"k = {self.k} with tail 'renormalize', which needs 2 or more: one id "
                "renormalises to 1 on both sides and the gradient is zero",
                hint="use --loss-topk 2 or more, or tail 'bucket', or estimator 'policy_gradient'",
            )
        if self.k < 1:
            raise ObjectiveError(
                f"k = {self.k} must be 1 or more", hint="use --loss-topk 1 or more"
            )

    def _check_parameter(self) -> None:
        known = SPAN_PARAMETERS if self.over_spans else _PARAMETERS
        if self.divergence not in known:
            if self.parameter is not None:
                raise ObjectiveError(
                    f"parameter = {self.parameter} with divergence {self.divergence!r}, which has "
                    "none",
                    hint=f"leave it out, or use one of {', '.join(known)}",
                )
            return
        name, usual, values = known[self.divergence]
        if self.parameter is None or not _is_in(self.parameter, values):
            ends = "" if self.over_spans else "; at the ends use forward_kl or reverse_kl"
            raise ObjectiveError(
                f"{name} = {self.parameter} of divergence {self.divergence!r} is not in {values}",
                hint=f"give a value in it, e.g. {usual}{ends}",
            )


_PARAMETERS = {key: (name, usual, "(0, 1)") for key, (name, usual) in PARAMETERS.items()}


def _is_in(value: float, values: str) -> bool:
    """Return whether a number lies in an interval such as `(0, 1]`."""
    low, high = (float(end) for end in values[1:-1].split(","))
    closed = (values[0] == "[" and value == low) or (values[-1] == "]" and value == high)
    return low < value < high or closed


def _check_known(key: str, value: str, known: Iterable[str]) -> None:
    names = ", ".join(known)
    if value not in names.split(", "):
        raise ObjectiveError(f"unknown {key} {value!r}", hint=f"known: {names}")
