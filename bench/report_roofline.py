"""The picture of the kernels below the limits of their machine.

A roofline: operations a second over operations a byte. Bytes are the least of the task, read and
written once unless kernel_limits says more; operations are

  logits         8 a logit: shift, exponential and two sums; shift, exponential, product, store
  topk           1 a logit
  hidden         3 products of T H V
  teacher        3 products of T K H, 2 with a frozen head
  live           1 product of T H V besides

Where bytes are the limit, the count of operations moves a point along the roof, not nearer to it.
"""

from itertools import groupby
from pathlib import Path
from typing import Any

from kernel_limits import TASKS, least
from kernel_machine import machine
from kernel_shapes import Shape
from results import Row

NAMES = {
    "logits": "loss from logits",
    "topk": "top-k alone",
    "hidden": "loss from hidden states",
    "teacher": "listed ids",
    "teacher rows": "listed ids, head's gradient as rows",
    "teacher frozen": "listed ids, frozen head",
    "live": "listed ids and live top-k",
    "live frozen": "the same, frozen head",
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def work(task: str, shape: Shape, element: int) -> tuple[int, int]:
    """Return (bytes, operations) of a task for the picture, both above 0."""
    T, V, H, K = shape.T, shape.V, shape.H, shape.K
    moved, operations = least(task, shape, element)
    if task == "logits":
        return moved, 8 * T * V
    if task == "topk":
        return moved, T * V
    if task == "hidden":
        return 2 * (T + V) * H * element, operations
    products = 4 if task.endswith("frozen") else 6
    head = V * H * element if task.startswith("live") else 0
    return moved + head, operations + products * T * K * H


def points(rows: list[Row]) -> list[dict[str, Any]]:
    """Return {task, ours, x, y, roof} of all measured rows: op/byte, op/s, and the most op/s."""
    found = []
    for row in rows:
        if row["status"] != "ok" or "provider" not in row or "copy_gb_s" not in row:
            continue
        moved, operations = work(row["task"], Shape(**row["shape"]), BYTES[row["dtype"]])
        x = operations / moved
        roof = min(x * row["copy_gb_s"] * 1e9, row["gemm_tflop_s"] * 1e12)
        point = {
            "task": row["task"],
            "ours": row["ours"],
            "x": x,
            "y": operations / row["ms"] * 1e3,
        }
        found.append(point | {"roof": roof})
    return sorted(found, key=lambda point: TASKS.index(point["task"]))


def draw(rows: list[Row], picture: Path) -> None:
    """Plot the rows of one device: ours filled, all others as rings."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "logitcask", "font.size": 9})
    import matplotlib.pyplot as plt

    found = points(rows)
    if not found:
        raise ValueError("no row with a time: there is nothing to draw")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    newest = [row for row in rows if "copy_gb_s" in row][-1]
    copy, product = newest["copy_gb_s"] * 1e9, newest["gemm_tflop_s"] * 1e12
    low, high = min(p["x"] for p in found) / 3, max(*(p["x"] for p in found), product / copy) * 3
    axes.plot([low, product / copy, high], [low * copy, product, product], color="0.2", lw=1.2)
    for i, (task, group) in enumerate(groupby(found, key=lambda p: p["task"])):
        of_task = list(group)
        shares = [p["y"] / p["roof"] for p in of_task if p["ours"]]
        label = NAMES[task] + (f": {max(shares):.0%} of the limit" if shares else "")
        for ours in (False, True):
            some = [p for p in of_task if p["ours"] == ours]
            axes.plot(
                [p["x"] for p in some],
                [p["y"] for p in some],
                "o",
                color=f"C{i}",
                markersize=7 if ours else 5,
                markerfacecolor=f"C{i}" if ours else "none",
                label=label if ours else None,
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        xlabel="operations a byte, at least",
        ylabel="operations a second",
        title=f"{machine(newest)}, {newest['dtype']}: {newest['copy_gb_s']:,.0f} GB/s, "
        f"{newest['gemm_tflop_s']:.3g} TFLOP/s",
    )
    axes.grid(True, alpha=0.2)
    axes.legend(title="ours filled, at best, others as rings", fontsize=8, title_fontsize=8)
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)
