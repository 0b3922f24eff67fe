"""The output of a probe as `logitcask probe ... --format json` prints it, and its values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logitcask.engine.report.panels import Axis, Series

SHARE = Axis(name="share", form="percent")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeOutput:
    """The values that a probe printed."""

    values: Any
    """A mapping; of `metrics` a list of rows."""
    prefix: str
    """Of the ids of its panels."""
    source: str
    """Sentence on where the values are from, after a space."""

    def how(self, text: str, *, reading: bool = True) -> str:
        """Return a text with the reading of the probe, and the source."""
        said = text_of(self.values["reading"]) if reading else ""
        return f"{text}{f' {said[:1].upper()}{said[1:]}.' if said else ''}{self.source}"


def number(value: object) -> float | None:
    """Return a number, None for none and for NaN. Raises TypeError for another value."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r:.60} is no number")
    return value if math.isfinite(value) else None


def text_of(value: object) -> str:
    """Return a text. Raises TypeError for another value."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    return value


def estimate(value: Mapping[str, Any] | None) -> str | None:
    """Return `mean ± standard error` of an estimate."""
    if value is None or (mean := number(value["mean"])) is None:
        return None
    error = number(value["se"])
    return f"{mean:.4g}" + ("" if error is None else f" ± {error:.2g}")


def column(rows: Sequence[Mapping[str, Any]], x: str, y: str, name: str) -> Series:
    """Return the line of one column over another."""
    return Series(
        of=name,
        x=tuple(number(each[x]) or 0.0 for each in rows),
        y=tuple(number(each[y]) for each in rows),
    )
