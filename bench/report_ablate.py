"""The table of bench_ablate.py for bench/README.md; report.py writes it."""

from itertools import combinations
from typing import Any

import results
from report_pages import markdown

FIGURES = {
    "accuracy": "accuracy",
    "gap_recovery": "gap recovery",
    "overlap_ratio": "overlap ratio",
    "overlap_mass": "overlap mass",
}
Row = dict[str, Any]


def tables() -> dict[str, str]:
    """Of the newest row; none before there is one."""
    rows = results.read("ablate")
    return {"ablate objectives": objectives(rows[-1])} if rows else {}


def objectives(row: Row) -> str:
    table = markdown(
        ["objective", "n", *FIGURES.values()],
        [
            [f"`{each['objective']}`", each["n"], *(cell(each, name) for name in FIGURES)]
            for each in row["rows"]
        ],
    )
    alike = [
        f"`{a['objective']}` and `{b['objective']}`"
        for a, b in combinations(row["rows"], 2)
        if not separate(a, b, "accuracy")
    ]
    told = f"Accuracy does not separate {', '.join(alike)}" if alike else "Accuracy separates all"
    if row["rows"][0]["n"] < 2:
        told = "One seed has no spread, so nothing is said of which separate"
    return (
        f"{table}\n\nMean ± sample standard deviation over seeds; two separate where their means "
        f"are further apart than both spreads together. {told}. The teacher's accuracy is "
        f"{row['teacher']:.1%}. `{row['command']}`, {row['wall_s']:.0f} s, {row['machine']}, "
        f"threads {row['threads']}, Python {row['python']}, torch {row['torch']}, commit "
        f"{row['commit']}."
    )


def cell(each: Row, name: str) -> str:
    value, spread = each[name], each[f"{name}_sd"]
    if value is None:
        return "-"
    return f"{value:.3f}" if spread is None else f"{value:.3f} ± {spread:.3f}"


def separate(a: Row, b: Row, name: str) -> bool:
    spread = (a[f"{name}_sd"] or 0.0) + (b[f"{name}_sd"] or 0.0)
    return bool(abs(a[name] - b[name]) > spread)
