"""Figures of bench_real.py from the sums over each held-out text in its rows.

A figure of a model is a ratio of sums over the texts, per token. Its standard error is over texts,
because positions of one text are not independent. Two models are compared by the differences on the
same texts.
"""

from typing import Any

import numpy as np

BEFORE, REPAIR = "student", "round2"
"""Models that the bars compare."""
MEASURES = ("kl_qp", "kl_pq", "top1", "overlap", "nll")
TEXTS = ("teacher", "student")
"""Samplers of the held-out texts."""
STAGES = ("rollout", "score", "train")
BAR_RATIO, BAR_Z, BAR_RIGHT, BAR_TEACHER, BAR_MINUTES = 0.80, -3.0, 0.45, 0.60, 20.0


def mean(row: dict[str, Any], model: str, text: str, measure: str) -> tuple[float, float]:
    """Return a measure per token, and its standard error over texts."""
    sums = row["models"][model]["sums"][text]
    return _ratio(sums[measure], sums["tokens"])


def paired(
    row: dict[str, Any], model: str, other: str, text: str, measure: str
) -> tuple[float, float]:
    """Return the difference of a measure from another model's on the same texts, and its error."""
    sums, base = (row["models"][name]["sums"][text] for name in (model, other))
    return _ratio(np.subtract(sums[measure], base[measure]), sums["tokens"])


def z_value(pair: tuple[float, float]) -> float:
    """Return a difference over its standard error."""
    return pair[0] / pair[1]


def right(row: dict[str, Any], model: str) -> float:
    """Return the share of right answers."""
    return float(np.mean(row["models"][model]["marks"]))


def minutes(row: dict[str, Any], *names: str) -> float:
    """Return the CPU minutes of these models' stages, by default of both rounds."""
    found = [
        row["cpu_s"][f"{name} {stage}"] for name in names or ("round1", REPAIR) for stage in STAGES
    ]
    return round(sum(found) / 60, 2)


def bars(row: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    """Return each bar of the repair by name: its figure, and whether it is met."""
    found = {}
    for text, measure, name in (
        ("teacher", "kl_qp", "KL(q ‖ p) on the teacher's text"),
        ("student", "kl_pq", "KL(p ‖ q) on the student's text"),
    ):
        ratio = mean(row, REPAIR, text, measure)[0] / mean(row, BEFORE, text, measure)[0]
        z = z_value(paired(row, REPAIR, BEFORE, text, measure))
        found[f"{name}, 2 rounds over before <= {BAR_RATIO:.2f}"] = (ratio, ratio <= BAR_RATIO)
        found[f"{name}, paired z <= {BAR_Z:.0f}"] = (z, z <= BAR_Z)
    for model, name, bar in (
        (REPAIR, "2 rounds", BAR_RIGHT),
        ("teacher", "the teacher", BAR_TEACHER),
    ):
        share = right(row, model)
        found[f"right answers of {name} >= {bar:.2f}"] = (share, share >= bar)
    spent = minutes(row)
    found[f"CPU minutes of both rounds < {BAR_MINUTES:.0f}"] = (spent, spent < BAR_MINUTES)
    return {name: (round(value, 4), met) for name, (value, met) in found.items()}


def seeds_summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return for each model the right answers and KL(q || p) on teacher text of every seed."""
    return {
        name: {
            "right": [round(right(row, name), 3) for row in rows],
            "kl_qp": [round(mean(row, name, "teacher", "kl_qp")[0], 4) for row in rows],
        }
        for name in rows[0]["models"]
    }


def _ratio(values: Any, tokens: Any) -> tuple[float, float]:
    values, tokens = np.asarray(values, np.float64), np.asarray(tokens, np.float64)
    ratio = values.sum() / tokens.sum()
    error = np.sqrt(((values - ratio * tokens) ** 2).sum()) / tokens.sum()
    return float(ratio), float(error)
