"""Figures of the probes, by matplotlib: SVG, PNG or PDF, by the name of the file."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logitcask.engine.errors import ConfigError

SUFFIXES = (".svg", ".png", ".pdf")
COLORS = {"correct": "#0072B2", "incorrect": "#D55E00"}
"""Of Okabe and Ito: they differ for colour-blind readers, and in gray."""
MOST_NAMES = 12
"""Versions that are named at an axis, at most."""
LINES = (
    ("entropy/teacher", "#0072B2", "-"),
    ("entropy/student", "#D55E00", "-"),
    ("kl/reverse", "#009E73", "--"),
    ("kl/forward", "#000000", ":"),
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
        axes, name = rows[1][0], "kl/reverse"
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
