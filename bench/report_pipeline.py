"""The tables and the picture of the loops whose stages run at once."""

import statistics
from typing import Any

import results
from pipeline_spans import ROLES
from report_pages import markdown
from results import RESULTS, Row

PICTURE = RESULTS / "pipeline.svg"
COLOURS = {"rollout": "C0", "score": "C1", "train": "C2"}
NAMES = {"rollout": "sampling", "score": "scoring", "train": "updates"}


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
            ["as many loops with a live teacher", f"{several * live['whole_s']:.1f}",
             f"{several * live['whole_s'] / spent:.2f}"],
        ],
    )  # fmt: skip
    return "\n\n".join([bars, table, rates, ablations, _setting(row)])


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
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "logitcask", "font.size": 9})
    import matplotlib.pyplot as plt

    shown = {
        f"live teacher ({row['live_by']})": row["live"]["work"],
        "synchronous": row["loops"]["synchronous"][0]["work"],
        "asynchronous": row["loops"]["asynchronous"][0]["work"],
    }
    figure, (axes, below) = plt.subplots(
        2, 1, figsize=(9, 5.2), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    lanes = draw_work(axes, shown)
    axes.set(
        yticks=range(len(lanes)),
        yticklabels=lanes,
        title="A loop of sampling, scoring and updates: its work over time (numbers: rounds)",
    )
    axes.invert_yaxis()
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


def draw_work(axes: Any, shown: dict[str, list[list[Any]]]) -> list[str]:
    """Draw the work of each loop in lanes of its own, and return the names of the lanes.

    shown: name of a loop -> [role, process, round, start, end] of each piece of work.
    """
    lanes: dict[tuple[str, str, str], int] = {}
    for name, work in shown.items():
        for role in ROLES:
            for process in sorted({each[1] for each in work if each[0] == role}):
                lanes[name, role, process] = len(lanes)
    for name, work in shown.items():
        for role, process, number, start, end in work:
            lane = lanes[name, role, process]
            axes.barh(
                lane, end - start, left=start, height=0.8, color=COLOURS[role],
                alpha=0.55 + 0.35 * (number % 2), linewidth=0,
            )  # fmt: skip
            if role == "train":
                axes.text((start + end) / 2, lane, str(number), ha="center", va="center", size=6)
    return [
        f"{name}: {NAMES[role]}" if role == ROLES[0] else NAMES[role] for name, role, _ in lanes
    ]
