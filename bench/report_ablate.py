"""The tables and the picture of the toy models' results: bench_ablate.py and bench_demo.py."""

from itertools import combinations
from pathlib import Path
from statistics import median

import results
from report_pages import markdown
from results import RESULTS, Row

PICTURE = RESULTS / "objectives.svg"
FIGURES = {
    "accuracy": "accuracy",
    "gap_recovery": "gap recovery",
    "overlap_ratio": "overlap ratio",
    "overlap_mass": "overlap mass",
}


def tables() -> dict[str, str]:
    """Return the text of each marked block, from the newest rows; empty without rows."""
    rows, demos = (results.read(RESULTS / f"{name}.jsonl") for name in ("ablate", "demo"))
    made = {"demo seeds": seeds(demos)} if demos else {}
    if rows:
        made["ablate objectives"] = objectives(rows[-1])
    return made


def objectives(row: Row) -> str:
    """Return the table for bench/README.md, and which accuracies separate."""
    alike = [
        f"`{a['objective']}` and `{b['objective']}`"
        for a, b in combinations(row["rows"], 2)
        if not separate(a, b, "accuracy")
    ]
    separation = (
        f"Accuracy does not separate {', '.join(alike)}" if alike else "Accuracy separates all"
    )
    if row["rows"][0]["n"] < 2:
        separation = "One seed has no spread, so no two can be separated"
    return (
        f"{_table(row['rows'])}\n\nMean ± sample standard deviation over seeds; two separate where "
        f"their means are further apart than both spreads together. {separation}. The teacher's "
        f"accuracy is {row['teacher']:.1%}. `{row['command']}`, {row['wall_s']:.0f} s, "
        f"{row['machine']}, threads {row['threads']}, Python {row['python']}, "
        f"torch {row['torch']}, commit {row['commit']}."
    )


def _table(rows: list[Row]) -> str:
    return markdown(
        ["objective", "n", *FIGURES.values()],
        [
            [f"`{each['objective']}`", each["n"], *(cell(each, name) for name in FIGURES)]
            for each in rows
        ],
    )


def seeds(rows: list[Row]) -> str:
    """Return gap recovery by objective and seed of the demo."""
    by = {(row["objective"], row["seed"]): row for row in rows}
    names = list(dict.fromkeys(row["objective"] for row in rows))
    numbers = sorted({row["seed"] for row in rows})
    table = markdown(
        ["objective", *(f"seed {n}" for n in numbers), "median"],
        [
            [f"`{name}`", *(f"{value:.1%}" for value in values), f"{median(values):.1%}"]
            for name in names
            if (values := [by[name, n]["gap_recovery"] for n in numbers if (name, n) in by])
        ],
    )
    row = rows[-1]
    return (
        f"{table}\n\n`{row['command'].split(' --')[0]}`, {row['machine']}, threads "
        f"{row['threads']}, torch {row['torch']}, commit {row['commit']}."
    )


def cell(each: Row, name: str) -> str:
    """Return a mean with its spread if it has one."""
    value, spread = each[name], each[f"{name}_sd"]
    if value is None:
        return "-"
    return f"{value:.3f}" if spread is None else f"{value:.3f} ± {spread:.3f}"


def separate(a: Row, b: Row, name: str) -> bool:
    """Return True if two means are further apart than both spreads together."""
    spread = (a[f"{name}_sd"] or 0.0) + (b[f"{name}_sd"] or 0.0)
    return bool(abs(a[name] - b[name]) > spread)


LEFT, RIGHT, TOP, STEP = 130, 610, 58, 26
LOW, HIGH = -0.8, 1.0


def draw(row: Row, file: Path = PICTURE) -> None:
    """Write gap recovery by objective as SVG: mean, and one standard deviation to each side."""
    rows = sorted(row["rows"], key=lambda each: each["gap_recovery"])
    bottom = TOP + STEP * len(rows)

    def x(value: float) -> float:
        return round(LEFT + (value - LOW) / (HIGH - LOW) * (RIGHT - LEFT), 1)

    parts = [
        f'<rect width="640" height="{bottom + 46}" fill="white"/>',
        '<text x="16" y="22" font-size="14">Gap recovery of six objectives, trained from one store'
        "</text>",
        f'<text x="16" y="40" fill="#555">share of the accuracy gap from student to teacher that '
        f"training closed; {rows[0]['n']} seeds, mean ± sd</text>",
    ]
    for tick in (-0.8, -0.4, 0.0, 0.4, 0.8, 1.0):
        colour = "#333" if tick in (0.0, 1.0) else "#ddd"
        parts += [
            f'<line x1="{x(tick)}" y1="{TOP}" x2="{x(tick)}" y2="{bottom}" stroke="{colour}"/>',
            f'<text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle">{tick:.0%}</text>',
        ]
    for n, each in enumerate(rows):
        y, mean, spread = TOP + STEP * n + STEP / 2, each["gap_recovery"], each["gap_recovery_sd"]
        start, end = sorted((x(0.0), x(mean)))
        colour = "#3569a8" if mean >= 0 else "#b4483c"
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{each["objective"]}</text>',
            f'<rect x="{start}" y="{y - 8}" width="{end - start:.1f}" height="16" '
            f'fill="{colour}"/>',
            f'<line x1="{x(mean - (spread or 0))}" y1="{y}" x2="{x(mean + (spread or 0))}" '
            f'y2="{y}" stroke="black" stroke-width="2"/>',
        ]
    parts.append(
        f'<text x="16" y="{bottom + 36}" fill="#555">0% = student before training, 100% = teacher; '
        f"toy task, one learning rate for all, commit {row['commit']}</text>"
    )
    body = "\n".join(parts)
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {bottom + 46}" '
        f'font-family="sans-serif" font-size="12">\n{body}\n</svg>\n'
    )
