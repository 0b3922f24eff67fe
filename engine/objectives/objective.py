"""An objective is data, checked when it is made: only combinations with a meaning exist."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.divergences import DIVERGENCES, PARAMETERS
from logitcask.engine.objectives.modifier import Modifier
from logitcask.engine.objectives.policy_gradient import WEIGHTS
from logitcask.engine.objectives.supports import DRAWN, LIVE, SUPPORTS
from logitcask.engine.objectives.tail import OUTSIDE

FORMS = ("divergence", "advantage")

CELLS: frozenset[tuple[str, str, str, str]] = frozenset(
    [
        # A divergence must know what to do with the mass outside the support: on its own,
        # sum_S p log(p / q) falls when mass leaves S.
        *product(
            ("teacher", "student", "overlap", "union", "non_overlap"),
            DIVERGENCES,
            ("renormalize", "tail"),
            ("divergence",),
        ),
        # The teacher's draws are a law of their own.
        ("teacher_mc", "forward_kl", "ignore", "divergence"),
        # The advantage compares raw log-probs, so nothing is done outside. It estimates the
        # gradient of reverse KL; its forward form is reported as very poor (thunlp/OPD #21).
        *product(sorted({*SUPPORTS} - {"teacher_mc"}), ["reverse_kl"], ["ignore"], ["advantage"]),
    ]
)
"""Allowed (support, divergence, outside, form)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Raises ObjectiveError for an unknown name or a combination without meaning."""

    support: str
    """Which ids the loss looks at: a key of SUPPORTS."""
    divergence: str
    """What it compares there: a key of DIVERGENCES."""
    outside: str
    """The mass elsewhere: `renormalize` both sides on the support, one `tail` bucket, `ignore`."""
    form: str
    """`divergence`: the gradient of the divergence. `advantage`: -A grad log p, A held fixed."""
    k: int
    """Ids in a top-k support at most; 1 for supports that are draws."""
    parameter: float | None = None
    """Of a divergence that has one; None elsewhere. See divergences.PARAMETERS."""
    weights: str = "student_p"
    """Of the ids in an advantage on a top-k: a key of WEIGHTS."""
    modifiers: tuple[Modifier, ...] = ()
    """In the order in which they act."""

    def __post_init__(self) -> None:
        for key, value, known in (
            ("support", self.support, SUPPORTS),
            ("divergence", self.divergence, DIVERGENCES),
            ("outside", self.outside, OUTSIDE),
            ("form", self.form, FORMS),
            ("weights", self.weights, WEIGHTS),
        ):
            _check_known(key, value, known)
        self._check_meaning()
        self._check_k()
        self._check_parameter()
        for modifier in self.modifiers:
            modifier.check(self)

    @property
    def live_k(self) -> int:
        """Ids of the live student's top-k that its loss looks at."""
        own = self.k if self.support in LIVE else 0
        return max([own, *(modifier.live_k for modifier in self.modifiers)])

    @property
    def needs_base(self) -> bool:
        return any(modifier.needs_base for modifier in self.modifiers)

    def record(self) -> dict[str, Any]:
        """What a run's folder holds of it."""
        held = asdict(self)
        held["modifiers"] = [{"name": m.name, **asdict(m)} for m in self.modifiers]
        return held

    def _check_meaning(self) -> None:
        if self.support in DRAWN - {"teacher_mc"} and self.form != "advantage":
            raise ObjectiveError(
                f"support {self.support!r} with form {self.form!r}: one id is no distribution, and "
                "draws of p are no sum over p",
                hint="use form 'advantage'",
            )
        if self.support == "teacher_mc" and (
            (self.divergence, self.outside, self.form) != ("forward_kl", "ignore", "divergence")
        ):
            raise ObjectiveError(
                f"support 'teacher_mc' with {self.divergence!r}, {self.outside!r}, {self.form!r}: "
                "the teacher's draws estimate an average over q",
                hint="use divergence 'forward_kl', outside 'ignore', form 'divergence'",
            )
        if self.form == "divergence" and self.outside == "ignore" and self.support != "teacher_mc":
            raise ObjectiveError(
                "form 'divergence' with outside 'ignore': the loss would fall when mass leaves the "
                "support",
                hint="use outside 'renormalize' or 'tail', or form 'advantage'",
            )
        if (self.support, self.divergence, self.outside, self.form) not in CELLS:
            raise ObjectiveError(
                f"form 'advantage' with divergence {self.divergence!r} and outside "
                f"{self.outside!r}: it is defined by the raw log-ratio of reverse KL",
                hint="use divergence 'reverse_kl' and outside 'ignore', or form 'divergence'",
            )
        if self.weights != "student_p" and (self.form != "advantage" or self.support in DRAWN):
            raise ObjectiveError(
                f"weights {self.weights!r} with form {self.form!r} and support {self.support!r}: "
                "only an advantage on a top-k weighs its ids",
                hint="leave weights out",
            )

    def _check_k(self) -> None:
        if self.support in DRAWN and self.k != 1:
            raise ObjectiveError(
                f"k = {self.k} with support {self.support!r}, which is no top-k",
                hint="leave --loss-topk out",
            )
        if self.outside == "renormalize" and self.k < 2:
            raise ObjectiveError(
                f"k = {self.k} with outside 'renormalize', which needs 2 or more: one id "
                "renormalises to 1 on both sides and the gradient is zero",
                hint="use --loss-topk 2 or more, or outside 'tail', or form 'advantage'",
            )
        if self.k < 1:
            raise ObjectiveError(
                f"k = {self.k} must be 1 or more", hint="use --loss-topk 1 or more"
            )

    def _check_parameter(self) -> None:
        if self.divergence not in PARAMETERS:
            if self.parameter is not None:
                raise ObjectiveError(
                    f"parameter = {self.parameter} with divergence {self.divergence!r}, which has "
                    "none",
                    hint=f"leave it out, or use one of {', '.join(PARAMETERS)}",
                )
            return
        name, usual = PARAMETERS[self.divergence]
        if self.parameter is None or not 0 < self.parameter < 1:
            raise ObjectiveError(
                f"{name} = {self.parameter} of divergence {self.divergence!r} is not in (0, 1)",
                hint=f"give one in it; {usual} is usual. At the ends use forward_kl or reverse_kl",
            )


def _check_known(key: str, value: str, known: Iterable[str]) -> None:
    names = ", ".join(known)
    if value not in names.split(", "):
        raise ObjectiveError(f"unknown {key} {value!r}", hint=f"known: {names}")
