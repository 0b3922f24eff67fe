"""Section of the positions: where in the response teacher and student differ, and since when.

Values, their formulas and units are those of engine/probes/positions.py.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from logitcask.engine.errors import LogitcaskError
from logitcask.engine.exchange.positions import ROWS
from logitcask.engine.probes.positions import (
    PositionRows,
    Range,
    position_rows,
    ranges,
    ranges_of_versions,
    reading,
)
from logitcask.engine.report.panels import Absent, Axis, Heat, Lines, Panel, Section, Series
from logitcask.engine.report.runs import RunFacts
from logitcask.engine.report.sections.stored import MOST_ROWS, StoredRows, stored_rows

LINE_BINS, HEAT_BINS, HEAT_VERSIONS = 48, 24, 40
"""Ranges of positions in the lines and in the maps, and versions in the maps, at most."""
LEAST_ROWS = 20
"""Tokens of a range at least: a mean of fewer is noise."""
LEAST_SHARE = 0.05
"""Tokens of a quarter that is called the end, at least, as a share of those of the largest."""

_NATS, _SHARE = Axis(name="nats", unit="nats"), Axis(name="share", form="percent")
_POSITION = Axis(name="position in the response", unit="tokens")
_LINES = (
    (
        "entropy",
        "Entropy by position",
        _NATS,
        ("entropy/teacher", "entropy/student", "entropy/gap"),
        "Entropy of both models over the vocabulary, and the mean of |H(q) - H(p)|, which is good "
        "near 0.",
    ),
    (
        "kl",
        "KL by position",
        _NATS,
        ("kl/reverse_bound", "kl/forward_bound"),
        "Lower bounds from the stored ids: reverse is KL(student || teacher). {reading}.",
    ),
    (
        "overlap",
        "Overlap by position",
        _SHARE,
        ("overlap/ratio", "overlap/mass_student", "overlap/mass_teacher"),
        "Common ids of both top-{k} lists: their share of the list, and their mass under each "
        "model. Low mass is where the models think differently.",
    ),
)
_MAPS = (
    ("entropy/student", "Entropy of the student", "Bright is uncertain."),
    ("entropy/gap", "Entropy gap", "Dark is agreement in how certain both models are."),
    (
        "kl/reverse_bound",
        "Reverse KL",
        "Bright is disagreement. In the paper a failing run brightens at the end of the responses "
        "first, and the border moves towards the beginning.",
    ),
)


def positions_section(runs: Sequence[RunFacts], *, most: int = MOST_ROWS) -> Section:
    """Build the lines of all runs, and the maps by version of the first.

    Runs with the same rollouts and teacher in the same store are one line: these values are of the
    student that sampled. A store alone is a run with an empty record. Reads `most` positions of
    the first run, and as many of all others together; what a run lacks is an Absent.
    """
    found: dict[int, PositionRows] = {}
    notes: list[str] = []
    absent: list[Absent] = []
    seen = set[tuple[str, str, str]]()
    for number, facts in enumerate(runs):
        title = f"Positions of {facts.name}" if len(runs) > 1 else "Positions"
        try:
            budget = most // (1 if number == 0 else len(runs) - 1)
            of = stored_rows(facts, most=budget)
            if (key := (of.store.uuid, of.rollouts, of.teacher)) in seen:
                continue
            rows = position_rows(
                of.store,
                of.snapshot,
                rollouts=of.rollouts,
                teacher=of.teacher,
                most=_most_of_each(of, budget),
            )
        except LogitcaskError as error:
            absent.append(Absent(title=title, why=f"{error.cause}; {error.hint}"))
            continue
        seen.add(key)
        found[number] = rows
        notes.append(_note(of, budget))
    panels: list[Panel] = []
    if found:
        panels += _lines(found, notes[0])
        rows = next(iter(found.values()))
        maps = map_panels(ranges_of_versions(rows, HEAT_BINS), "positions", note=notes[0])
        panels += maps
        if not maps:
            absent.append(
                Absent(
                    title="Entropy by position and version",
                    why="these rollouts are of one version of the student; `logitcask distill` "
                    "makes one in each round",
                )
            )
    return Section(
        id="positions", title="By position", panels=tuple(panels), absent=tuple(absent)
    )  # fmt: skip


def _most_of_each(of: StoredRows, budget: int) -> int:
    """Return the rows of a segment that are read: a large one must not take all of the time."""
    return max(1, 2 * budget // of.segments)


def _note(of: StoredRows, budget: int) -> str:
    """Return the sentences on the rows that were chosen, after a space."""
    first = ROWS * math.ceil(_most_of_each(of, budget) / ROWS)
    longest = max(each.counts["P"] for each in of.snapshot.rollouts(of.rollouts))
    some = f" Of each segment its first {first:,} positions." if longest > first else ""
    return of.note + some


def _lines(found: Mapping[int, PositionRows], note: str) -> list[Panel]:
    first, *_ = found.values()
    quarters = ranges(first, 4)
    # A few responses that go on for long would stand for the end of all.
    least = max(LEAST_ROWS, LEAST_SHARE * max(each.rows for each in quarters))
    where = reading(tuple(each for each in quarters if each.rows >= least))
    panels = line_panels(
        {number: ranges(rows, LINE_BINS) for number, rows in found.items()},
        "positions",
        k=first.k,
        where=where,
        note=note,
    )
    panels.append(
        Lines(
            id="positions-responses",
            title="Responses that reach a position",
            how=f"Where it is low, means of the positions are noise: ranges with fewer than "
            f"{LEAST_ROWS} tokens are left out of the lines." + note,
            x=_POSITION,
            y=Axis(name="responses"),
            series=tuple(_reached(rows, number) for number, rows in found.items()),
        )
    )
    return panels


def line_panels(
    found: Mapping[int, Sequence[Range]], prefix: str, *, k: int, where: str, note: str
) -> list[Panel]:
    """Return the panels of _LINES; found: number of a run -> its ranges.

    prefix: of the ids of the panels; where: reading of the probe; note: sentence at the end.
    """
    return [
        Lines(
            id=f"{prefix}-{name}",
            title=title,
            how=how.format(reading=where[:1].upper() + where[1:], k=k) + note,
            x=_POSITION,
            y=axis,
            series=tuple(
                _series(_solid(each), number, measure)
                for number, each in found.items()
                for measure in measures
            ),
        )
        for name, title, axis, measures, how in _LINES
    ]


def map_panels(versions: Mapping[int, Sequence[Range]], prefix: str, *, note: str) -> list[Panel]:
    """Return a map for each of _MAPS, of some evenly chosen versions; none for one version."""
    if len(versions) < 2:
        return []
    numbers = sorted(versions)
    places = np.linspace(0, len(numbers) - 1, min(len(numbers), HEAT_VERSIONS)).round().astype(int)
    shown = [numbers[place] for place in places]
    some = "" if len(shown) == len(numbers) else f" {len(shown)} of {len(numbers)} versions."
    return [
        Heat(
            id=f"{prefix}-map-{measure.replace('/', '-')}",
            title=f"{title} by position and version",
            how=f"{how} Cells with fewer than {LEAST_ROWS} tokens are empty.{some}{note}",
            x=_POSITION,
            y=Axis(name="version of the student", unit="updates"),
            value=Axis(name=measure, unit="nats"),
            xs=tuple(_label(each) for each in versions[shown[0]]),
            ys=tuple(str(number) for number in shown),
            values=tuple(
                tuple(each.means[measure] if each.rows >= LEAST_ROWS else None for each in row)
                for row in (versions[number] for number in shown)
            ),
        )
        for measure, title, how in _MAPS
    ]


def _label(each: Range) -> str:
    return str(each.start) if each.end == each.start + 1 else f"{each.start}-{each.end - 1}"


def _solid(found: Iterable[Range]) -> tuple[Range, ...]:
    """Return the ranges with enough tokens."""
    return tuple(each for each in found if each.rows >= LEAST_ROWS)


def _series(found: Sequence[Range], run: int, measure: str) -> Series:
    return Series(
        of=measure,
        run=run,
        x=tuple((each.start + each.end - 1) / 2 for each in found),
        y=tuple(each.means[measure] for each in found),
    )


def _reached(rows: PositionRows, run: int) -> Series:
    """Return the number of responses with a token at each position, or at some of them."""
    counts = np.bincount(rows.position)
    some = np.unique(np.linspace(0, len(counts) - 1, min(len(counts), 2 * LINE_BINS)).round())
    shown = some.astype(int).tolist()
    return Series(
        of="responses",
        run=run,
        x=tuple(float(at) for at in shown),
        y=tuple(float(counts[at]) for at in shown),
    )
