"""Contents of a page as data: sections of panels, each with units and a sentence how to read it.

Sections are built in engine/report/sections from runs and stores. The page draws the kinds below
and knows nothing of training, so a new measurement is a new builder and nothing else.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

SEQUENCES = 200
"""Rollouts in the token viewer of a page by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A quantity: its name, its unit ('' = a count or a ratio), and how it is written."""

    name: str
    unit: str = ""
    form: str = ""
    """'' = plain, percent = shares in [0, 1] as percents, log = a logarithmic axis, bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line: n points, y None where there is no value."""

    of: str
    """Name of the quantity; lines of the same quantity look alike in all runs."""
    run: int = 0
    """Number among the runs of the report; lines of the same run have the same colour."""
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    """A band, such as a mean and its standard error; () = none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """Lines over one axis."""

    kind: ClassVar[str] = "lines"
    id: str
    title: str
    how: str
    """One or two sentences: what it is, and what is good, bad or usual."""
    x: Axis
    y: Axis
    series: tuple[Series, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Heat:
    """A map of values [len(ys), len(xs)] by two axes; None = no value."""

    kind: ClassVar[str] = "heat"
    id: str
    title: str
    how: str
    x: Axis
    y: Axis
    value: Axis
    xs: tuple[str, ...]
    ys: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One bar; bars of a name stack by their groups."""

    name: str
    value: float
    group: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """Horizontal bars in the order of `bars`."""

    kind: ClassVar[str] = "bars"
    id: str
    title: str
    how: str
    value: Axis
    bars: tuple[Bar, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """A piece of work or of waiting in one lane, seconds since the beginning."""

    lane: str
    group: str
    start: float
    end: float
    label: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """The work of each process over time; seconds."""

    kind: ClassVar[str] = "timeline"
    id: str
    title: str
    how: str
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of text and numbers; a column is an Axis, so numbers have units."""

    kind: ClassVar[str] = "table"
    id: str
    title: str
    how: str
    columns: tuple[Axis, ...]
    rows: tuple[tuple[str | float | None, ...], ...]


Panel = Lines | Heat | Bars | Timeline | Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Absent:
    """A panel that a reader would expect, and why it is not there and how to get it."""

    title: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Panels under one heading."""

    id: str
    title: str
    panels: tuple[Panel, ...]
    absent: tuple[Absent, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """A line of the summary in plain language."""

    text: str
    state: str = "neutral"
    """good, neutral or warning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that a page shows."""

    title: str
    made: str
    """Time in UTC, ISO 8601."""
    version: str
    """Of logitcask."""
    runs: tuple[str, ...]
    """Names of the runs, the first is the one that the report is about; () for a store alone."""
    summary: tuple[Sentence, ...]
    sections: tuple[Section, ...]
    viewer: Mapping[str, Any] | None = None
    """Data of the token viewer, see viewer/; None = no rollouts, or none that can be read."""

    def as_json(self) -> dict[str, Any]:
        """Return what json.dumps takes; each panel has its `kind`."""
        found = asdict(self)
        for section, made in zip(self.sections, found["sections"], strict=True):
            for panel, row in zip(section.panels, made["panels"], strict=True):
                row["kind"] = panel.kind
        return found
