"""The kernels' first table: each of our rows over the best plain torch, over peers and over eager.

Time and peak memory of each, over ours. The line whose best plain torch is fastest comes first.
"""

from collections.abc import Iterable
from itertools import groupby

from kernel_bars import mean_of_train
from kernel_machine import short
from report_pages import markdown
from results import Row

PEERS = {
    "verl": ("verl",),
    "TRL": ("trl",),
    "DistillKit": ("distillkit",),
    "eager": ("eager", "dense", "dense-frozen", "dense-live", "dense-live-frozen"),
}
TASKS = {
    "logits": "from logits, all metrics",
    "hidden": "whole rows from hidden states, all metrics",
    "topk": "top-k alone",
    "teacher": "known support, loss alone",
    "teacher rows": "known support, loss alone, head's gradient as rows",
    "teacher frozen": "known support, loss alone, frozen head",
    "live": "live support, all metrics",
    "live frozen": "live support, all metrics, frozen head",
}
TRAINED = {
    "teacher": "known support, as `train` runs it, with its metrics",
    "teacher frozen": "known support, as `train` runs it, with its metrics, frozen head",
}
SHORT = {TASKS["logits"], TASKS["hidden"], TASKS["live"], TRAINED["teacher"]}
"""Lines of the short table: what reads all of the vocabulary, and what `train` runs."""
HEADER = ["", "ours", "best plain torch", *PEERS]


def ratio_table(rows: list[Row]) -> str:
    """Return the table; '' without a row of ours that has a plain form."""
    lines = ratio_lines(rows)
    return markdown(HEADER, lines) if lines else ""


def short_table(rows: list[Row]) -> str:
    """Return the lines of the tasks of SHORT, of each the one that flatters least."""
    of_task: dict[str, list[object]] = {}
    for line in ratio_lines(rows):
        of_task.setdefault(str(line[0]).partition("; ")[0], line)
    return markdown(HEADER, [line for task, line in of_task.items() if task in SHORT])


def ratio_lines(rows: list[Row]) -> list[list[object]]:
    """Return the cells of each line, that with the fastest plain form first."""
    lines: list[tuple[float, list[object]]] = []
    ran = [row for row in rows if row["status"] == "ok" and "task" in row]
    for _, group in groupby(ran, key=lambda row: (row["section"], row["shape"], row["dtype"])):
        of_shape = list(group)
        for task in dict.fromkeys(row["task"] for row in of_shape):
            same = [row for row in of_shape if row["task"] == task]
            ours = [row for row in same if row["ours"] and not row["provider"].startswith("train")]
            lines += _line(TASKS[task], ours[:1], same)
            if task in TRAINED:
                lines += _line(TRAINED[task], _trained(same), same)
    return [cells for _, cells in sorted(lines, key=lambda line: line[0])]


def _trained(rows: list[Row]) -> list[Row]:
    """Return the mean update of `train`, the peak that of one with metrics."""
    suffix = "-frozen" if rows[0]["task"].endswith("frozen") else ""
    pair = [
        next((row for row in rows if row["provider"] == f"train{suffix}{end}"), None)
        for end in ("", "-metrics")
    ]
    mean = mean_of_train(*pair)
    return [] if mean is None or pair[1] is None else [{**pair[1], "ms": mean}]


def _line(text: str, ours: list[Row], same: list[Row]) -> Iterable[tuple[float, list[object]]]:
    best = [row for row in same if row.get("best")]
    if not ours or not best:
        return []
    one, plain = ours[0], min(best, key=lambda row: row["ms"])
    s = one["shape"]
    title = f"{text}; {s['T']:,} rows, K = {s['K']}"
    cells: list[object] = [title, f"{short(one['ms'])} ms, {_megabytes(one)}", _over(plain, one)]
    for names in PEERS.values():
        found = [row for row in same if row["provider"] in names]
        cells.append(_over(found[0], one) if found else "")
    return [(plain["ms"] / one["ms"], cells)]


def _megabytes(row: Row) -> str:
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f} MB"


def _over(row: Row, ours: Row) -> str:
    """Return time and memory over ours."""
    time = _times(row["ms"] / ours["ms"])
    if not row["peak_bytes"] or not ours["peak_bytes"]:
        return time
    return f"{time}, {_times(row['peak_bytes'] / ours['peak_bytes'])} memory"


def _times(ratio: float) -> str:
    """Return a ratio with two digits after the point below 10: near 1 they matter."""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:,.0f}x"
