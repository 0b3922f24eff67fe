"""Panels of the probes that may load models.

A builder raises KeyError, TypeError or AttributeError where the values are not those of its probe.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from logitcask.engine.report.panels import Axis, Lines, Panel, Series, Table
from logitcask.engine.report.sections.probes.output import (
    SHARE,
    ProbeOutput,
    column,
    estimate,
    number,
    text_of,
)

_K = Axis(name="k", form="log")


def k_panels(of: ProbeOutput) -> list[Panel]:
    """Return lines of the mass by k, and of the errors of the estimators where both models were."""
    v = of.values
    names = (
        *("student_on_student", "teacher_on_teacher", "teacher_on_student", "coverage"),
        "overlap_ratio",
    )
    panels: list[Panel] = [
        Lines(
            id=f"{of.prefix}-mass",
            title="Mass of the top-k",
            how=of.how(
                "X_on_Y is the mass of model X on the top-k of model Y. Take the k from which more "
                "ids add little."
            ),
            x=_K,
            y=SHARE,
            series=tuple(column(v["table"], "k", name, name) for name in names),
        )
    ]
    if v["estimators"] is not None:
        found = v["estimators"]
        kinds = dict.fromkeys(text_of(each["estimator"]) for each in found["table"])
        said = text_of(found["reading"])
        panels.append(
            Lines(
                id=f"{of.prefix}-estimators",
                title="Error of the gradient estimators",
                how=f"Root of the mean squared error as a share of the true gradient, by top-k or "
                f"draws. {said[:1].upper()}{said[1:]}.{of.source}",
                x=_K,
                y=Axis(name="relative error", form="log"),
                series=tuple(
                    column(
                        [each for each in found["table"] if each["estimator"] == kind],
                        *("k", "rms_error", kind),
                    )
                    for kind in kinds
                ),
            )
        )
    return panels


def drift_panels(of: ProbeOutput) -> list[Panel]:
    """Return a table of students by lag, and lines of coverage and overlap with several lags."""
    lines = sorted(of.values["lines"], key=lambda each: each["lag"])
    names = list(lines[0]["means"]) if lines else []
    panels: list[Panel] = []
    students = [each for each in lines if each["student"] != "sampler"]
    if len({each["lag"] for each in students}) > 1:
        of_lag = [{"lag": each["lag"], **each["means"]} for each in students]
        panels.append(
            Lines(
                id=f"{of.prefix}-lag",
                title="Age of the rollouts",
                how=of.how("Share of the student's mass that has a score, and overlap."),
                x=Axis(name="updates since the rollouts", unit="updates"),
                y=SHARE,
                series=tuple(
                    column(of_lag, "lag", name, name)
                    for name in ("cache/coverage", "overlap/ratio")
                ),
            )
        )
    panels.append(
        Table(
            id=f"{of.prefix}-students",
            title="Drift of students from the rollouts",
            how=of.how(
                "One line for each student and version of the rollouts; approx_kl is in nats. Of "
                "the sampler itself the lag is 0."
            ),
            columns=(
                *(Axis(name="student"), Axis(name="version"), Axis(name="version of the rollouts")),
                *(Axis(name="lag", unit="updates"), Axis(name="rows")),
                *(Axis(name=name) for name in names),
            ),
            rows=tuple(
                (
                    text_of(each["student"]),
                    *(number(each[key]) for key in ("version", "rollouts_version", "lag", "rows")),
                    *(number(each["means"][name]) for name in names),
                )
                for each in lines
            ),
        )
    )
    return panels


def compatibility_panels(of: ProbeOutput) -> list[Panel]:
    """Return the assessments by rank, and a table of all measures."""
    v, teachers = of.values, of.values["teachers"]
    names = dict.fromkeys(name for each in teachers for name in each["measures"])
    known = [name for name in names if any(each["measures"].get(name) for each in teachers)]
    right = estimate(v["student_accuracy"])
    student = "" if right is None else f" The student itself is right in {right} of its responses."
    return [
        Table(
            id=f"{of.prefix}-ranks",
            title="Candidate teachers",
            how=of.how(f"By rank, on {v['prompts']} prompts.{student}"),
            columns=tuple(
                Axis(name=name) for name in ("rank", "teacher", "model", "assessment", "because")
            ),
            rows=tuple(
                (
                    number(each["rank"]),
                    *(text_of(each[key]) for key in ("name", "model", "assessment", "because")),
                )
                for each in teachers
            ),
        ),
        Table(
            id=f"{of.prefix}-measures",
            title="Measures of the candidates",
            how=of.how(
                f"Means ± standard errors over prompts; overlap at k = {v['k']}.",
                reading=False,
            ),
            columns=(Axis(name="measure"), *(Axis(name=text_of(t["name"])) for t in teachers)),
            rows=tuple(
                (name, *(estimate(each["measures"].get(name)) for each in teachers))
                for name in known
            ),
        ),
        Table(
            id=f"{of.prefix}-paper",
            title="Teachers of the paper",
            how=of.how("Levels at k = 16 on math, and the gap that was closed.", reading=False),
            columns=(Axis(name="teacher"), Axis(name="level")),
            rows=tuple((text_of(what), text_of(level)) for what, level in v["references"]),
        ),
    ]


def continuation_panels(of: ProbeOutput) -> list[Panel]:
    """Return lines of both accuracies by the length of the prefix."""
    cuts = [each for each in of.values["cuts"] if each["student"] is not None]
    return [
        Lines(
            id=f"{of.prefix}-accuracy",
            title="Accuracy of continuations",
            how=of.how("Bands are one standard error over prompts."),
            x=Axis(name="response before the continuation", unit="tokens"),
            y=Axis(name="accuracy", form="percent"),
            series=tuple(
                _band([each["at"] for each in cuts], [each[who] for each in cuts], who)
                for who in ("student", "teacher")
            ),
        )
    ]


def _band(x: Sequence[float], found: Sequence[Mapping[str, Any]], name: str) -> Series:
    means = [number(each["mean"]) or 0.0 for each in found]
    errors = [number(each["se"]) or 0.0 for each in found]
    return Series(
        of=name,
        x=tuple(number(at) or 0.0 for at in x),
        y=tuple(means),
        low=tuple(mean - error for mean, error in zip(means, errors, strict=True)),
        high=tuple(mean + error for mean, error in zip(means, errors, strict=True)),
    )


def metric_panels(of: ProbeOutput) -> list[Panel]:
    """Return the table of means by range of positions."""
    rows = of.values
    heads = [name for name in rows[0] if name != "metric"]
    return [
        Table(
            id=f"{of.prefix}-means",
            title="Metrics of a checkpoint",
            how=of.how(
                "Means over all rows, and over ranges of positions in the response.", reading=False
            ),
            columns=(Axis(name="metric"), *(Axis(name=text_of(name)) for name in heads)),
            rows=tuple(
                (text_of(each["metric"]), *(number(each[name]) for name in heads)) for each in rows
            ),
        )
    ]


def compare_panels(of: ProbeOutput) -> list[Panel]:
    """Return the paired differences of two checkpoints."""
    v = of.values
    keys = ("a", "b", "difference", "se", "z")
    return [
        Table(
            id=f"{of.prefix}-differences",
            title="Two checkpoints on the same sequences",
            how=of.how(
                f"a is {text_of(v['a']['model'])}, b is {text_of(v['b']['model'])}; "
                f"{v['sequences']:,} sequences of {v['prompts']:,} prompts. A |z| of 2 or less is "
                "within the noise.",
                reading=False,
            ),
            columns=(
                *(Axis(name="metric"), Axis(name="a"), Axis(name="b"), Axis(name="b - a")),
                *(Axis(name="standard error"), Axis(name="z")),
            ),
            rows=tuple(
                (text_of(each["metric"]), *(number(each[key]) for key in keys))
                for each in v["differences"]
            ),
        )
    ]
