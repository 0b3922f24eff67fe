"""The work of a loop over time, as a picture; and the tables of bench_pipeline.py.

Run: .venv/bin/python bench/report_pipeline.py RUN [--out FILE.svg]

RUN is the folder of a loop whose roles run in processes, or did: its timeline is drawn, a lane for
each process, a bar for each unit and update, numbered by its round. Needs matplotlib.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import results
from pipeline_spans import ROLES, WORK, picture
from report_pages import markdown
from results import RESULTS, Row

from logitcask.engine.workers.timeline import read_timeline

PICTURE = RESULTS / "pipeline.svg"
COLOURS = {"rollout": "C0", "score": "C1", "train": "C2"}
NAMES = {"rollout": "sampling", "score": "scoring", "train": "updates"}
OTHER = {"load": "0.35", "publish": "0.35", "save": "0.35", "wait": "0.9"}
"""Kind of a span that is no work -> its gray."""


def main(arguments: list[str]) -> None:
    """Draw the timeline of a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="Folder of the run.")
    parser.add_argument("--out", type=Path, default=Path("timeline.svg"), metavar="FILE")
    options = parser.parse_args(arguments)
    spans = read_timeline(options.run)
    if not any(each.kind == WORK.get(each.role) for each in spans):
        parser.error(f"{options.run} has no timeline with work of a loop in it")
    plt = _pyplot()
    shown = {options.run.name: picture(spans)}
    lanes = len({(role, process) for role, process, *_ in shown[options.run.name]})
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.35 * lanes), layout="constrained")
    _finish(axes, draw_work(axes, shown))
    axes.set(xlabel="seconds")
    figure.savefig(options.out, metadata={"Date": None})
    plt.close(figure)


def newest() -> Row | None:
    """Return the newest row, None without one."""
    rows = results.read(RESULTS / "pipeline.jsonl")
    return rows[-1] if rows else None


def tables() -> dict[str, str]:
    """Return the text of the marked block."""
    row = newest()
    return {} if row is None else {"pipeline": text(row)}


def text(row: Row) -> str:
    """Return bars, the loops, the ablations, and the setting."""
    bars = markdown(
        ["bar", "measured", ""],
        [
            [each["bar"], f"{each['value']:.4g}", "met" if each["met"] else "**missed**"]
            for each in row["bars"]
        ],
    )
    loops, live, cost = row["loops"], row["live"], row["ablations"]
    table = markdown(
        ["loop", "wall time", "slowest stage and fill", "sum of the stages",
         *(f"{NAMES[role]} at work" for role in ROLES), "two or three at once", "longest queue",
         "age, mean and largest", "with start and loading", "accuracy"],
        [
            *(_line(kind, loops[kind]) for kind in ("synchronous", "asynchronous")),
            [f"live teacher, {row['live_by']}", f"{live['wall_s']:.1f} s", *8 * [""],
             f"{live['whole_s']:.1f} s", f"{live['accuracy']:.3f}"],
        ],
    )  # fmt: skip
    rates = markdown(
        ["loop", *(f"{NAMES[role]}, positions a second" for role in ROLES),
         *(f"{NAMES[role]} waited" for role in ROLES)],
        [
            [kind, *(f"{_mean(loops[kind], 'positions_per_s', role):,.0f}" for role in ROLES),
             *(f"{_mean(loops[kind], 'waited_s', role):.1f} s" for role in ROLES)]
            for kind in ("synchronous", "asynchronous")
        ],
    )  # fmt: skip
    several = cost["trainings"]
    spent = cost["wall_s"]
    ablations = markdown(
        [f"{several} trainings", "seconds", "ratio"],
        [
            ["from one store, filled for them", f"{spent:.1f}", "1.00"],
            ["its stages alone: r + s + t, and t for each further one",
             f"{_stages(cost):.1f}", f"{_stages(cost) / spent:.2f}"],
            ["as many loops with a live teacher, as one takes", f"{several * live['whole_s']:.1f}",
             f"{several * live['whole_s'] / spent:.2f}"],
        ],
    )  # fmt: skip
    drawn = "![sampling, scoring and updates of three loops over time](results/pipeline.svg)"
    return "\n\n".join([bars, drawn, table, rates, ablations, _setting(row)])


def _stages(cost: dict[str, Any]) -> float:
    return float(cost["rollout_s"] + cost["score_s"] + cost["trainings"] * cost["train_s"])


def _mean(loops: list[dict[str, Any]], *keys: str) -> float:
    """Return the mean over seeds of a value."""
    found = []
    for each in loops:
        value: Any = each
        for key in keys:
            value = value[key]
        found.append(value)
    return statistics.fmean(found)


def _line(kind: str, loops: list[dict[str, Any]]) -> list[str]:
    return [
        kind,
        f"{_mean(loops, 'wall_s'):.1f} s",
        f"{_mean(loops, 'floor_s'):.1f} s",
        f"{_mean(loops, 'sum_s'):.1f} s",
        *(f"{_mean(loops, 'use', role):.0%}" for role in ROLES),
        f"{_mean(loops, 'at_once', '2') + _mean(loops, 'at_once', '3'):.0%}",
        f"{max(size for each in loops for _, size in each['queue']):,} bytes",
        f"{_mean(loops, 'ages', 'mean'):.1f}, {max(each['ages']['max'] for each in loops)}",
        f"{_mean(loops, 'whole_s'):.1f} s",
        f"{_mean(loops, 'accuracy'):.3f}",
    ]


def _setting(row: Row) -> str:
    scale, real, added = row["scale"], row["real_s"], row["target_s"]
    stages = ", ".join(
        f"{NAMES[role]} {seconds:g} s, of which {real[role]:.2f} s are work"
        for role, seconds in zip(ROLES, added, strict=True)
    )
    return (
        f"{scale['rounds']} rounds of {scale['prompts'] * scale['samples']} responses, one update "
        f"each; a round: {stages}. Means over {scale['seeds']} seeds. `{row['command']}`, "
        f"{row['machine']}, Python {row['python']}, torch {row['torch']}, commit {row['commit']}."
    )


def draw(row: Row) -> None:
    """Plot the work over time: a bar a unit or update, numbered by its round."""
    plt = _pyplot()
    shown = {
        f"live teacher ({row['live_by']})": row["live"]["picture"],
        "synchronous": row["loops"]["synchronous"][0]["picture"],
        "asynchronous": row["loops"]["asynchronous"][0]["picture"],
    }
    figure, (axes, below) = plt.subplots(
        2, 1, figsize=(9, 5.2), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    _finish(axes, draw_work(axes, shown))
    for kind, style in (("synchronous", "--"), ("asynchronous", "-")):
        points = row["loops"][kind][0]["queue"]
        below.step(
            *zip((0.0, 0.0), *points, strict=True), style, where="post", color="C4", label=kind
        )
    below.set(xlabel="seconds", ylabel="bytes without scores")
    below.legend()
    below.grid(True, alpha=0.2)
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "logitcask", "font.size": 9})
    import matplotlib.pyplot as plt

    return plt


def _finish(axes: Any, lanes: list[str]) -> None:
    axes.set(
        yticks=range(len(lanes)),
        yticklabels=lanes,
        title="Sampling, scoring, updates (numbers: rounds; dark: loads and publications)",
    )
    axes.invert_yaxis()


def draw_work(axes: Any, shown: dict[str, list[list[Any]]]) -> list[str]:
    """Draw the spans of each loop in lanes of its processes, and return the names of the lanes.

    shown: name of a loop -> [role, process, kind, round, start, end] of each span.
    """
    lanes: dict[tuple[str, str, str], int] = {}
    for name, spans in shown.items():
        for role in ROLES:
            for process in sorted({each[1] for each in spans if each[0] == role}):
                lanes[name, role, process] = len(lanes)
    for name, spans in shown.items():
        for role, process, kind, number, start, end in spans:
            if role not in COLOURS:
                continue
            lane, work = lanes[name, role, process], kind == WORK[role]
            axes.barh(
                lane, end - start, left=start, height=0.8 if work else 0.3, linewidth=0,
                color=COLOURS[role] if work else OTHER.get(kind, "0.35"),
                alpha=0.55 + 0.35 * ((number or 0) % 2) if work else 1.0,
            )  # fmt: skip
            if work and role == "train":
                axes.text((start + end) / 2, lane, str(number), ha="center", va="center", size=6)
    return [
        f"{name}: {NAMES[role]}" if role == ROLES[0] else NAMES[role] for name, role, _ in lanes
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
