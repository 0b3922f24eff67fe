"""The table and the picture of the workers that commit to one store."""

from itertools import groupby
from typing import Any

import results
from report_pages import markdown
from results import RESULTS, Row

PICTURE = RESULTS / "scale.svg"
NAMES = {
    ("S3", "race"): "S3, format 1",
    ("S3", "group"): "S3",
    ("disk", "race"): "disk, format 1",
    ("disk", "group"): "disk",
}
COLOURS = {"S3": "C0", "disk": "C2"}


def newest() -> Row | None:
    """Return the newest row, None without one."""
    rows = results.read(RESULTS / "scale.jsonl")
    return rows[-1] if rows else None


def tables() -> dict[str, str]:
    """Return the text of the marked block."""
    row = newest()
    return {} if row is None else {"scale": text(row)}


def text(row: Row) -> str:
    """Return bars, the simulations, and the check of the model."""
    bars = markdown(
        ["bar", "measured", ""],
        [
            [bar["bar"], f"{bar['value']:.4g}", "met" if bar["met"] else "**missed**"]
            for bar in row["bars"]
        ],
    )
    table = markdown(
        ["medium", "workers", "at work", "commits a second", "p50", "p99", "lost creates a commit",
         "commits a record", "GET, LIST, PUT, DELETE a second"],
        [[NAMES[each["medium"], each["protocol"]], *_cells(each)] for each in row["table"]],
    )  # fmt: skip
    short = markdown(
        ["", "workers", "unit", "at work", "commits a second", "p50", "p99", "commits a record"],
        [
            ["the store's own code" if each["protocol"] == "real" else "the model",
             each["workers"], f"{each['unit_s']:g} s", f"{each['worker_use']:.1%}",
             f"{each['commits_per_s']:.1f}", f"{each['p50_s']:.2f} s", f"{each['p99_s']:.2f} s",
             f"{each['commits_per_record']:.1f}"]
            for each in row["short"]
        ],
    )  # fmt: skip
    disk, cpu = row["costs"]["disk"], row["costs"]["S3"]
    measured = (
        f"Measured before: to put a segment of 100 kB on this disk {disk['put'] * 1e3:.1f} ms, to "
        f"create a record {disk['create'] * 1e3:.1f} ms, CPU of a head in a bundle "
        f"{cpu['head'] * 1e6:.0f} us, of a record {cpu['record'] * 1e6:.0f} us, of one more commit "
        f"in a record {cpu['add'] * 1e6:.0f} us."
    )
    source = (
        f"`{row['command']}`, {row['machine']}, Python {row['python']}, commit {row['commit']}."
    )
    return "\n\n".join([bars, table, short, f"{measured} {source}"])


def _cells(each: dict[str, Any]) -> list[str]:
    sent = each["requests_per_s"]
    return [
        f"{each['workers']:,}",
        f"{each['worker_use']:.1%}",
        f"{each['commits_per_s']:.1f}",
        f"{each['p50_s']:.2f} s",
        f"{each['p99_s']:.2f} s",
        f"{each['lost_creates_per_commit']:.1f}",
        f"{each['commits_per_record']:.1f}",
        ", ".join(f"{sent.get(kind, 0):,.0f}" for kind in ("GET", "LIST", "PUT", "DELETE")),
    ]


def draw(row: Row) -> None:
    """Plot the share of time at work over the number of workers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "logitcask", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for (service, protocol), found in groupby(
        row["table"], key=lambda each: (each["medium"], each["protocol"])
    ):
        points = [(each["workers"], 100 * each["worker_use"]) for each in found]
        style = "-o" if protocol == "group" else "--o"
        axes.plot(
            *zip(*points, strict=True),
            style,
            color=COLOURS[service],
            label=NAMES[service, protocol],
            alpha=1.0 if protocol == "group" else 0.5,
        )
    axes.set(
        xscale="log",
        ylim=(0, 102),
        xlabel="workers on one store, units of 60 s",
        ylabel="time at work",
        title="What committing and claiming leaves of the workers' time (simulated)",
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.set_xticks([100, 300, 1000, 3000, 10000], ["100", "300", "1,000", "3,000", "10,000"])
    axes.set_xticks([], minor=True)
    axes.grid(True, alpha=0.2)
    axes.legend()
    figure.savefig(PICTURE, metadata={"Date": None})
