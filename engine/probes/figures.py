"""Figures of the probes, by matplotlib: SVG, PNG or PDF, by the name of the file."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logitcask.engine.errors import ConfigError

SUFFIXES = (".svg", ".png", ".pdf")
COLORS = {"correct": "#0072B2", "incorrect": "#D55E00"}
"""Of Okabe and Ito: they differ for colour-blind readers, and in gray."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Of Okabe and Ito too, for up to four lines."""
MOST_NAMES = 12
"""Versions that are named at an axis, at most."""
LINES = (
    ("entropy/teacher", "#0072B2", "-"),
    ("entropy/student", "#D55E00", "-"),
    ("kl/reverse_bound", "#009E73", "--"),
    ("kl/forward_bound", "#000000", ":"),
)
"""Value -> color and style of its line."""


def check_file(file: Path) -> None:
    """Raise ConfigError for a file that no figure can be, before anything is computed."""
    if file.suffix not in SUFFIXES:
        raise ConfigError(
            f"a figure cannot be written as {file.name!r}", hint=f"use {', '.join(SUFFIXES)}"
        )
    if not file.parent.is_dir():
        raise ConfigError(f"there is no folder {file.parent}", hint="make it, or write elsewhere")
    _pyplot()


def draw_rewards(file: Path, groups: dict[str, Any], *, title: str) -> None:
    """Draw the distribution of a value, nats a token, in each of two groups of responses.

    groups: a key of COLORS -> [N] values.
    """
    import numpy as np

    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    both = np.concatenate(list(groups.values()))
    # A few responses far away would leave one bar for all others.
    low, high = np.quantile(both, (0.005, 0.995))
    edges = np.linspace(low, high if high > low else low + 1, 41)
    for name, values in groups.items():
        weights = np.full(len(values), 1 / len(values))
        label = f"{name}: {len(values):,}, mean {values.mean():.3f}"
        axes.hist(
            np.clip(values, low, high), edges, weights=weights, color=COLORS[name], alpha=0.45
        )
        axes.hist(
            np.clip(values, low, high),
            edges,
            weights=weights,
            color=COLORS[name],
            histtype="step",
            linewidth=1.5,
            label=label,
        )
        axes.axvline(values.mean(), color=COLORS[name], linestyle="--", linewidth=1)
    axes.set_xlabel("sequence mean reward, nats a token")
    axes.set_ylabel("share of the responses")
    axes.set_title(title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, file)


def draw_positions(file: Path, ranges: Sequence[Any], versions: Mapping[int, Any]) -> None:
    """Draw entropies and KL by position; with several versions a map of the reverse KL too.

    ranges, versions: of a PositionReport.
    """
    plt = _pyplot()
    panels = 2 if len(versions) > 1 else 1
    figure, rows = plt.subplots(
        panels, figsize=(7, 4 * panels), layout="constrained", squeeze=False
    )
    middle = [(each.start + each.end - 1) / 2 for each in ranges]
    axes = rows[0][0]
    for name, color, style in LINES:
        values = [math.nan if v is None else v for v in (each.means[name] for each in ranges)]
        axes.plot(middle, values, style, color=color, marker="o", markersize=4, label=name)
    axes.set_xlabel("position in the response, tokens")
    axes.set_ylabel("nats")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    if panels > 1:
        axes, name = rows[1][0], "kl/reverse_bound"
        grid = [
            [math.nan if each.means[name] is None else each.means[name] for each in versions[v]]
            for v in sorted(versions)
        ]
        edges = [*(each.start for each in ranges), ranges[-1].end]
        drawn = axes.pcolormesh(edges, range(len(grid) + 1), grid, cmap="viridis", vmin=0)
        named = list(enumerate(sorted(versions)))[:: math.ceil(len(grid) / MOST_NAMES)]
        axes.set_yticks([i + 0.5 for i, _ in named], [str(version) for _, version in named])
        axes.set_xlabel("position in the response, tokens")
        axes.set_ylabel("version of the student")
        figure.colorbar(drawn, ax=axes, label=f"{name}, nats")
    _save(figure, file)


def draw_correctness(file: Path, measures: Mapping[str, Any]) -> None:
    """Draw each measure in both groups, with standard errors; measures: of a CorrectnessReport."""
    plt = _pyplot()
    names = [name for name, each in measures.items() if each.difference is not None]
    columns = 4
    figure, grid = plt.subplots(
        math.ceil(len(names) / columns),
        columns,
        figsize=(10, 8),
        layout="constrained",
        squeeze=False,
    )
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, names, strict=False):
        each = measures[name]
        for at, group in enumerate(COLORS):
            value, error = getattr(each, group), getattr(each, f"{group}_se")
            axes.bar(at, value, yerr=error, color=COLORS[group], capsize=3)
        axes.set_xticks(range(len(COLORS)), COLORS)
        axes.set_title(name, fontsize=9)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, file)


def draw_regions(file: Path, regions: Mapping[str, Any], k: int) -> None:
    """Draw mass and share of the gradient of each region; regions: of a RegionReport at k."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    bars = {
        "mass of the student": [each.student_mass for each in regions.values()],
        "mass of the teacher": [each.teacher_mass for each in regions.values()],
        **{
            f"gradient of {name}": [each.share[name] or 0.0 for each in regions.values()]
            for name in next(iter(regions.values())).share
        },
    }
    width = 0.8 / len(bars)
    for i, ((label, values), color) in enumerate(zip(bars.items(), PALETTE, strict=True)):
        places = [at + (i - (len(bars) - 1) / 2) * width for at in range(len(regions))]
        axes.bar(places, values, width, label=label, color=color)
    axes.set_xticks(range(len(regions)), regions)
    axes.set_ylabel(f"share, top {k} of both models")
    _finish(axes)
    # Bars may be tall anywhere.
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)
    _save(figure, file)


def draw_topk(file: Path, table: Sequence[Any], estimators: Sequence[Any]) -> None:
    """Draw mass against k, and the error of each estimator if there are any.

    table, estimators: of a TopKReport and an EstimatorReport.
    """
    plt = _pyplot()
    panels = 2 if estimators else 1
    figure, rows = plt.subplots(
        panels, figsize=(7, 4 * panels), layout="constrained", squeeze=False
    )
    axes = rows[0][0]
    names = ("student_on_student", "teacher_on_teacher", "teacher_on_student", "coverage")
    for name, color in zip(names, PALETTE, strict=True):
        axes.plot(
            [t.k for t in table], [getattr(t, name) for t in table], "o-", color=color, label=name
        )
    axes.plot([t.k for t in table], [t.overlap_ratio for t in table], "k:", label="overlap_ratio")
    axes.set_ylabel("share")
    axes.set_ylim(0, 1.02)
    if estimators:
        axes = rows[1][0]
        kinds = dict.fromkeys(each.estimator for each in estimators)
        for kind, style in zip(
            kinds, itertools.product(("-", "--"), (*PALETTE, "black")), strict=False
        ):
            of = [each for each in estimators if each.estimator == kind]
            axes.plot(
                *([e.k for e in of], [e.rms_error for e in of]),
                linestyle=style[0],
                color=style[1],
                marker="o",
                markersize=4,
                label=kind,
            )
        axes.set_yscale("log")
        axes.set_ylabel("error of the gradient, relative")
    for each in rows[:, 0]:
        each.set_xscale("log", base=2)
        each.xaxis.set_major_formatter("{x:g}")
        each.set_xlabel("k: ids of the top-k, or draws")
        _finish(each)
    _save(figure, file)


def draw_drift(file: Path, lines: Sequence[Any], samplers: Sequence[Any], bounds: Any) -> None:
    """Draw coverage, overlap and approx_kl against the lag, with the bounds of a training.

    lines, samplers: those of a DriftReport of students, and of the students that sampled.
    """
    plt = _pyplot()
    figure, (upper, lower) = plt.subplots(2, figsize=(7, 8), layout="constrained", sharex=True)
    for axes, name, color in (
        (upper, "cache/coverage", PALETTE[0]),
        (upper, "overlap/ratio", PALETTE[1]),
        (lower, "cache/approx_kl", PALETTE[2]),
    ):
        for of, label, style in (
            (lines, name, {}),
            # Its coverage is a lower bound.
            (samplers, f"{name} of the sampler", {"marker": "^", "markerfacecolor": "none"}),
        ):
            if of:
                x, y = [each.lag for each in of], [each.means[name] for each in of]
                axes.plot(
                    x, y, **{"marker": "o", "linestyle": "", "color": color, **style}, label=label
                )
    upper.axhline(bounds.min_coverage, color="black", linestyle=":", label="--min-coverage")
    lower.axhline(bounds.max_drift, color="black", linestyle=":", label="--max-drift")
    upper.set_ylim(0, 1.02)
    lower.set_ylabel("nats")
    lower.set_xlabel("updates since the rollouts")
    _finish(upper)
    _finish(lower)
    _save(figure, file)


def _finish(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_compatibility(file: Path, report: Any) -> None:
    """Draw overlap and accuracy of each teacher of a CompatibilityReport, by rank."""
    plt = _pyplot()
    names = [f"{each.rank}. {each.name}\n{each.assessment}" for each in report.teachers]
    graded = report.student_accuracy is not None
    panels = 2 if graded else 1
    figure, columns = plt.subplots(
        1, panels, figsize=(6 * panels, 1.6 + 0.7 * len(names)), layout="constrained", squeeze=False
    )
    shown: list[tuple[Any, str, tuple[str, ...]]] = [
        (
            columns[0][0],
            f"overlap at k = {report.k}",
            ("overlap/ratio", "overlap/mass_student", "overlap/mass_teacher"),
        )
    ]
    if graded:
        shown.append((columns[0][1], "accuracy", ("accuracy/teacher",)))
    for axes, title, measures in shown:
        for offset, (name, color) in enumerate(zip(measures, PALETTE, strict=False)):
            at = [row + 0.25 * (offset - (len(measures) - 1) / 2) for row in range(len(names))]
            found = [each.measures.get(name) for each in report.teachers]
            axes.barh(
                at,
                [0.0 if each is None else each.mean for each in found],
                0.22,
                xerr=[0.0 if each is None else each.se or 0.0 for each in found],
                color=color,
                label=name,
            )
        axes.set_yticks(range(len(names)), [_plain(each) for each in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.05)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    if graded:
        columns[0][1].axvline(
            report.student_accuracy.mean, color="black", linestyle="--", label="accuracy/student"
        )
    for axes, _, _ in shown:
        axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.12))
    _save(figure, file)


def draw_continuations(file: Path, report: Any) -> None:
    """Draw the accuracies of a ContinuationReport by the length of the prefix."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    cuts = [each for each in report.cuts if each.student is not None]
    for name, color in zip(("student", "teacher"), PALETTE, strict=False):
        found = [getattr(each, name) for each in cuts]
        axes.errorbar(
            [each.at for each in cuts],
            [each.mean for each in found],
            yerr=[each.se or 0.0 for each in found],
            color=color,
            marker="o",
            capsize=3,
            label=name,
        )
    axes.set_xlabel("tokens of the student's response before the continuation")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, file)


def _plain(text: str) -> str:
    """Return a text that matplotlib draws as it is: a dollar sign begins a formula."""
    return text.replace("$", r"\$")


def _save(figure: Any, file: Path) -> None:
    """Write a figure; the file appears when it is complete."""
    part = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        figure.savefig(part, dpi=150)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
        _pyplot().close(figure)


def _pyplot() -> Any:
    """Import pyplot without a screen; ConfigError where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "a figure needs the package matplotlib", hint='pip install -e ".[figures]"'
        ) from error
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
