"""Workers that commit to one store: share of their time at work, from 100 to 10,000 of them.

Run: .venv/bin/python bench/bench_scale.py [--workers 100,1000] [--no-before]     (some ten minutes)

A discrete-event simulation (scale_model.py), from costs that are measured first: storage calls on
this disk, the CPU of a record, of a head, and of one more commit in a record. Latencies of the
object store are stated: PUT and LIST 60 ms (120 ms with a segment), GET 30 ms, DELETE 40 ms. A unit
is 60 s of work. `before` is the protocol of format 1, where all writers race for the next number,
with the costs measured at its commit c0dedd4; it takes most of the time. Nothing is throttled, and
a disk serves all workers alike: compare the requests a second with what yours allows.

`real` runs the store's own code for the log in threads, on the same requests and a virtual clock
(scale_clock.py), with few workers and short units that offer as many commits a second, and stands
next to the model of the same. A lost or doubled commit ends it.

Appends a row to bench/results/scale.jsonl; `python bench/report.py` draws it.
"""

import sys
import time
from dataclasses import asdict
from typing import Any

import results
from scale_costs import costs_of_media
from scale_model import simulate
from scale_real import run_real
from store_common import bar, fresh

WORKERS = (100, 300, 1000, 3000, 10_000)
UNIT_S = 60.0
BARS = {1000: 0.95, 10_000: 0.85}
"""Workers -> least share of their time at work, on the object store."""
SHORT = ((100, 6.0), (300, 1.8))
"""Workers and seconds of a unit that offer as much as 1,000 and 10,000 with long units."""
NEAR = 0.05
"""Allowed difference of the shares at work, real and model."""


def main(arguments: list[str]) -> None:
    """Measure, simulate, and append the row."""
    parser = results.option_parser(__doc__, "scale")
    parser.add_argument("--workers", default=",".join(map(str, WORKERS)), help="Numbers of them.")
    parser.add_argument("--no-before", action="store_true", help="Leave the old protocol out.")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    with fresh("scale") as folder:
        media = costs_of_media(folder)
    for name, costs in media.items():
        print(name, {key: f"{value:.2g}" for key, value in asdict(costs["group"]).items()})
    short = [run for workers, unit_s in SHORT for run in compared(workers, unit_s, media)]
    table = []
    for protocol in ("group",) if options.no_before else ("group", "race"):
        for name, costs in media.items():
            for workers in map(int, options.workers.split(",")):
                found = simulate(protocol, workers, costs[protocol], **span(protocol, workers))
                table.append({"medium": name, **found})
                print(line(table[-1]), flush=True)
    row = {
        "bench": "scale",
        "command": "python bench/bench_scale.py",
        "seconds": round(time.monotonic() - start),
        "costs": {name: asdict(costs["group"]) for name, costs in media.items()},
        "table": table,
        "short": short,
        "bars": bars(table, short),
        **results.environment(),
    }
    for each in row["bars"]:
        print(f"{'met ' if each['met'] else 'MISSED'}  {each['bar']}: {each['value']:.4g}")
    results.append(options.out, row)


def span(protocol: str, workers: int) -> dict[str, float]:
    """Return the times of a simulation: shorter where a race of thousands costs minutes."""
    if protocol == "race" and workers > 1000:
        return {"unit_s": UNIT_S, "warm_s": UNIT_S, "end_s": UNIT_S + 4}
    return {"unit_s": UNIT_S, "warm_s": 2 * UNIT_S, "end_s": 5 * UNIT_S}


def compared(workers: int, unit_s: float, media: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the store's own code, and the model of the same."""
    costs = media["S3"]["group"]
    times = {"unit_s": unit_s, "warm_s": 2 * unit_s, "end_s": 2 * unit_s + 20}
    made = [run_real(workers, costs, **times), simulate("group", workers, costs, **times)]
    for each in made:
        print(line({"medium": "S3", **each}), flush=True)
    return made


def bars(table: list[dict[str, Any]], short: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the bars of the object store, and of the model against the real code."""
    made = []
    for row in table:
        least = BARS.get(row["workers"])
        if least and (row["medium"], row["protocol"]) == ("S3", "group"):
            text = f"S3, {row['workers']:,} workers: share of time at work >= {least}"
            made.append(bar(text, row["worker_use"], row["worker_use"] >= least))
    gaps = [
        abs(real["worker_use"] - model["worker_use"])
        for real, model in zip(short[::2], short[1::2], strict=True)
    ]
    text = f"share at work, the store's own code against the model: difference <= {NEAR}"
    return [*made, bar(text, max(gaps), max(gaps) <= NEAR)]


def line(row: dict[str, Any]) -> str:
    """Return one simulation as text."""
    return (
        f"{row['medium']:<5} {row['protocol']:<6} {row['workers']:>6} workers: at work "
        f"{row['worker_use']:.1%}, {row['commits_per_s']:.1f} commits/s, p50 {row['p50_s']:.2f} s, "
        f"p99 {row['p99_s']:.2f} s, {row['commits_per_record']:.1f} a record"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
