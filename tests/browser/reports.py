"""Small reports that have every kind of panel."""

from dataclasses import replace

from logitcask.engine.report.panels import (
    Absent,
    Axis,
    Bar,
    Bars,
    Heat,
    Lines,
    Panel,
    Report,
    Section,
    Sentence,
    Series,
    Stretch,
    Table,
    Timeline,
)

STEP = Axis(name="step")

NO_VALUE = "\N{EN DASH}"
"""Text of a page where there is no value."""


def lines(text: str = "loss", **changes: object) -> Lines:
    """Return two lines of five points; the second has a gap and a band."""
    steps = (1.0, 2.0, 3.0, 4.0, 5.0)
    made = Lines(
        id="lines",
        title=f"Lines of {text}",
        how=f"The {text} should fall.",
        x=STEP,
        y=Axis(name=text, unit="nats"),
        series=(
            Series(of=text, x=steps, y=(0.5, 0.25, 0.125, 0.0625, 0.03125)),
            Series(
                of=f"{text} of held-out rows",
                x=steps,
                y=(0.75, None, 0.375, 0.3125, 0.25),
                low=(0.7, None, 0.35, 0.3, 0.2),
                high=(0.8, None, 0.4, 0.35, 0.3),
            ),
        ),
    )
    return replace(made, **changes)


def panels(text: str = "loss") -> tuple[Panel, ...]:
    """Return one panel of each kind, with `text` in every place that takes text."""
    name = Axis(name=text)
    return (
        lines(text),
        Heat(
            id="heat",
            title=f"Heat of {text}",
            how=f"Bright {text} is large.",
            x=Axis(name=text, unit="tokens"),
            y=name,
            value=Axis(name=text, unit="nats"),
            xs=("0-15", "16-31", text),
            ys=(text, "step 2"),
            values=((0.1, 0.2, None), (0.3, 0.4, 0.5)),
        ),
        Bars(
            id="bars",
            title=f"Bars of {text}",
            how=f"Long {text} is much.",
            value=Axis(name=text, form="bytes"),
            bars=(
                Bar(name="topk_ids", value=1_500_000, group="score"),
                Bar(name="topk_ids", value=500_000, group=text),
                Bar(name=text, value=250_000, group="score"),
            ),
        ),
        Timeline(
            id="timeline",
            title=f"Timeline of {text}",
            how=f"Gaps of {text} are waiting.",
            stretches=(
                Stretch(lane="sampler", group="rollout", start=0.0, end=2.0, label=text),
                Stretch(lane=text, group=text, start=2.0, end=5.0),
            ),
        ),
        Table(
            id="table",
            title=f"Table of {text}",
            how=f"One row a {text}.",
            columns=(name, Axis(name="tokens"), Axis(name="size", form="bytes"), Axis(name="note")),
            rows=(
                ("b", 1200.0, 2_500_000.0, text),
                (
                    "a",
                    30.5,
                    1_000_000.0,
                    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822c",
                ),
                (text, None, 500_000.0, None),
            ),
        ),
    )


def report(text: str = "loss", *, runs: tuple[str, ...] = ("first",)) -> Report:
    """Return a report of all kinds, with `text` in every place that takes text."""
    every = panels(text)
    return Report(
        title=f"Report of {text}",
        made="2026-11-30T14:40:00Z",
        version="0.1.0",
        runs=runs,
        summary=(
            Sentence(text=f"The {text} fell.", state="good"),
            Sentence(text=f"The {text} is old.", state="warning"),
        ),
        sections=(
            Section(
                id="dynamics",
                title=f"Dynamics of {text}",
                panels=every[:3],
                absent=(Absent(title=f"Accuracy of {text}", why=f"No {text} was evaluated."),),
            ),
            Section(id="timings", title="Timings", panels=every[3:]),
        ),
    )


def with_panels(*made: Panel, runs: tuple[str, ...] = ("first",)) -> Report:
    """Return a report with one section of these panels."""
    sections = (Section(id="dynamics", title="Dynamics", panels=made),)
    return replace(report(runs=runs), sections=sections)
