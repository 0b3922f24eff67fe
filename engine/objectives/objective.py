"""An objective is data, checked when it is made: only combinations with a meaning exist."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.divergences import DIVERGENCES
from logitcask.engine.objectives.supports import SUPPORTS

OUTSIDES = ("renormalize", "tail", "ignore")
FORMS = ("divergence", "advantage")

CELLS: frozenset[tuple[str, str, str, str]] = frozenset(
    [
        # A divergence must know what to do with the mass outside the support: on its own,
        # sum_S p log(p / q) falls when mass leaves S.
        *product(
            ("teacher", "student", "overlap"),
            ("reverse_kl", "forward_kl"),
            ("renormalize", "tail"),
            ("divergence",),
        ),
        # The advantage compares raw log-probs, so nothing is done outside. It estimates the
        # gradient of reverse KL; its forward form is reported as very poor (thunlp/OPD #21).
        *product(SUPPORTS, ("reverse_kl",), ("ignore",), ("advantage",)),
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
    """Ids in a top-k support at most; 1 for `sampled`."""

    def __post_init__(self) -> None:
        for key, value, known in (
            ("support", self.support, SUPPORTS),
            ("divergence", self.divergence, DIVERGENCES),
            ("outside", self.outside, OUTSIDES),
            ("form", self.form, FORMS),
        ):
            _check_known(key, value, known)
        self._check_meaning()
        self._check_k()

    def _check_meaning(self) -> None:
        if self.support == "sampled" and self.form != "advantage":
            raise ObjectiveError(
                f"support 'sampled' with form {self.form!r}: one id is no distribution",
                remedy="use form 'advantage'",
            )
        if self.form == "divergence" and self.outside == "ignore":
            raise ObjectiveError(
                "form 'divergence' with outside 'ignore': the loss would fall when mass leaves the "
                "support",
                remedy="use outside 'renormalize' or 'tail', or form 'advantage'",
            )
        if (self.support, self.divergence, self.outside, self.form) not in CELLS:
            raise ObjectiveError(
                f"form 'advantage' with divergence {self.divergence!r} and outside "
                f"{self.outside!r}: it is defined by the raw log-ratio of reverse KL",
                remedy="use divergence 'reverse_kl' and outside 'ignore', or form 'divergence'",
            )

    def _check_k(self) -> None:
        if self.support == "sampled" and self.k != 1:
            raise ObjectiveError(
                f"k = {self.k} with support 'sampled', which has one id", remedy="leave --k out"
            )
        if self.outside == "renormalize" and self.k < 2:
            raise ObjectiveError(
                f"k = {self.k} with outside 'renormalize', which needs 2 or more: one id "
                "renormalises to 1 on both sides and the gradient is zero",
                remedy="use --k 2 or more, or outside 'tail', or form 'advantage'",
            )
        if self.k < 1:
            raise ObjectiveError(f"k = {self.k} must be 1 or more", remedy="use --k 1 or more")


def _check_known(key: str, value: str, known: Iterable[str]) -> None:
    names = ", ".join(known)
    if value not in names.split(", "):
        raise ObjectiveError(f"unknown {key} {value!r}", remedy=f"known: {names}")
