"""Panels of the probes that read a store alone.

A builder raises KeyError, TypeError or AttributeError where the values are not those of its probe.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from logitcask.engine.probes.positions import MEASURES, Range
from logitcask.engine.report.panels import Axis, Bar, Bars, Panel, Table
from logitcask.engine.report.sections.positions import line_panels, map_panels
from logitcask.engine.report.sections.probes.output import (
    SHARE,
    ProbeOutput,
    estimate,
    number,
    text_of,
)


def reward_panels(of: ProbeOutput) -> list[Panel]:
    """Return a table of the two groups."""
    v = of.values
    area, error = number(v["auroc"]), number(v["auroc_se"])
    rows = tuple(
        (group, *(number(v[key]) for key in (group, f"mean_{group}", f"mean_{group}_se")))
        for group in ("correct", "incorrect")
    )
    spread = "" if error is None else f" ± {error:.3f}"
    return [
        Table(
            id=f"{of.prefix}-groups",
            title=f"Reward and correctness: AUROC {area:.3f}{spread}",
            how=of.how(
                "Mean of log q - log p of a response. AUROC is the probability that a correct "
                "response has the larger one: 0.5 tells nothing."
            ),
            columns=(
                *(Axis(name="responses that are"), Axis(name="responses")),
                *(Axis(name="mean", unit="nats a token"), Axis(name="standard error")),
            ),
            rows=rows,
        )
    ]


def position_panels(of: ProbeOutput) -> list[Panel]:
    """Return the panels of the section of positions."""
    v = of.values
    versions = {int(name): _ranges(found) for name, found in v["versions"].items()}
    lines = line_panels(
        {0: _ranges(v["ranges"])},
        of.prefix,
        k=v["k"],
        where=text_of(v["reading"]),
        note=of.source,
    )
    return [*lines, *map_panels(versions, of.prefix, note=of.source)]


def _ranges(found: Iterable[Mapping[str, Any]]) -> tuple[Range, ...]:
    return tuple(
        Range(
            start=int(each["start"]),
            end=int(each["end"]),
            rows=int(each["rows"]),
            means={name: number(each["means"][name]) for name in MEASURES},
        )
        for each in found
    )


def correctness_panels(of: ProbeOutput) -> list[Panel]:
    """Return a table of the measures in both groups."""
    v = of.values
    groups = ("correct", "incorrect", "difference")
    return [
        Table(
            id=f"{of.prefix}-groups",
            title="Measures of correct and incorrect responses",
            how=of.how(
                f"Means of {v['correct']} correct and {v['incorrect']} incorrect responses, ± "
                f"standard errors over prompts; overlap at k = {v['k']}."
            ),
            columns=(Axis(name="measure"), *(Axis(name=name) for name in groups)),
            rows=tuple(
                (
                    text_of(name),
                    *(
                        estimate({"mean": each[group], "se": each[f"{group}_se"]})
                        for group in groups
                    ),
                )
                for name, each in v["measures"].items()
            ),
        )
    ]


def region_panels(of: ProbeOutput) -> list[Panel]:
    """Return bars of the regions that share out all ids, and a table of all regions."""
    v, regions = of.values, of.values["regions"]
    objectives = list(next(iter(regions.values()))["share"])
    parts = {name: regions[name] for name in ("overlap", "student_only", "teacher_only")}
    quantities = {
        "mass of the student": {name: each["student_mass"] for name, each in parts.items()},
        "mass of the teacher": {name: each["teacher_mass"] for name, each in parts.items()},
        **{
            f"gradient of {objective}": {
                name: each["share"][objective] for name, each in parts.items()
            }
            for objective in objectives
        },
    }
    bars = [
        Bar(name=quantity, group=region, value=number(value) or 0.0)
        for quantity, found in quantities.items()
        for region, value in found.items()
    ]
    return [
        Bars(
            id=f"{of.prefix}-shares",
            title="Mass and gradient of each region of ids",
            how=of.how(
                f"Regions of the top {v['k']} of both models, {v['rows']:,} rows; the rest to 100 "
                "% is outside of both. Of a gradient the share of its squared norm."
            ),
            value=SHARE,
            bars=tuple(bars),
        ),
        Table(
            id=f"{of.prefix}-regions",
            title="Regions of ids",
            how=of.how("Means over the rows.", reading=False),
            columns=(
                *(Axis(name="region"), Axis(name="ids")),
                *(Axis(name=f"mass of the {who}") for who in ("student", "teacher")),
                *(Axis(name=f"gradient of {name}", unit="nats") for name in objectives),
            ),
            rows=tuple(
                (
                    text_of(name),
                    *(number(each[key]) for key in ("ids", "student_mass", "teacher_mass")),
                    *(number(each["gradient"][objective]) for objective in objectives),
                )
                for name, each in regions.items()
            ),
        ),
    ]
