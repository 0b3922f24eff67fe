"""The table of the repaired real student: bench_real.py."""

from collections.abc import Callable

import results
from real_sums import BEFORE, MEASURES, REPAIR, bars, mean, minutes, paired, right, z_value
from report_pages import markdown
from results import RESULTS, Row

COLUMNS = {
    "kl_qp": "KL(q ‖ p)",
    "kl_pq": "KL(p ‖ q)",
    "top1": "same first id",
    "overlap": "common top-16",
    "nll": "NLL",
}
TITLES = {"teacher": "the teacher", "student": "the student before"}
"""Sampler of the held-out texts -> its name."""


def tables() -> dict[str, str]:
    """Return the text of each marked block, from the newest row of each seed; empty without."""
    rows = newest()
    return {"real": full(rows), "real summary": summary(rows)} if rows else {}


def newest() -> list[Row]:
    """Return the newest row of each seed."""
    rows = [row for row in results.read(RESULTS / "real.jsonl") if "seed" in row]
    return [row for _, row in sorted({row["seed"]: row for row in rows}.items())]


def full(rows: list[Row]) -> str:
    """Return the tables for bench/README.md: comparisons, both texts, bars, seconds."""
    parts = [
        f"Two rounds minus another model, paired differences in nats:\n\n{_comparisons(rows)}",
        *(f"On texts sampled by {TITLES[text]}:\n\n{_measures(rows, text)}" for text in TITLES),
        f"The bars, for each seed:\n\n{_bars(rows)}",
        f"{_seconds(rows)} {_source(rows)}",
    ]
    return "\n\n".join(parts)


def summary(rows: list[Row]) -> str:
    """Return the table for the front README."""
    table = markdown(
        [
            *("model", "updates", "KL(q ‖ p) on the teacher's text"),
            *("KL(p ‖ q) on the student's text", "right answers"),
        ],
        [
            [
                rows[0]["titles"][name],
                _updates(rows, name),
                _spread(rows, lambda row, n=name: mean(row, n, "teacher", "kl_qp")[0]),
                _spread(rows, lambda row, n=name: mean(row, n, "student", "kl_pq")[0]),
                _spread(rows, lambda row, n=name: right(row, n), "{:.0%}"),
            ]
            for name in _ordered(rows)
        ],
    )
    spent = max(minutes(row) for row in rows)
    return f"{table}\n\nBoth rounds took {spent:.0f} CPU minutes at most. {_source(rows)}"


def _ordered(rows: list[Row]) -> list[str]:
    """Return the models, that with the fewest KL(q || p) after the training first."""
    ends = (BEFORE, "teacher")
    trained = [name for name in rows[0]["models"] if name not in ends]
    trained.sort(key=lambda name: sum(mean(row, name, "teacher", "kl_qp")[0] for row in rows))
    return [BEFORE, *trained, "teacher"]


def _comparisons(rows: list[Row]) -> str:
    """Return differences of the repaired student from other models, the least flattering first."""
    cells = [(text, measure) for text in TITLES for measure in ("kl_qp", "kl_pq")]
    lines = []
    for other in (name for name in _ordered(rows) if name not in (REPAIR, "teacher")):
        found = [[paired(row, REPAIR, other, *cell) for row in rows] for cell in cells]
        shown = [
            f"{sum(value for value, _ in pairs) / len(pairs):+.3f} "
            f"(z {', '.join(f'{z_value(pair):.1f}' for pair in pairs)})"
            for pairs in found
        ]
        worst = max(value for pairs in found for value, _ in pairs)
        answers = _spread(rows, lambda row, n=other: right(row, REPAIR) - right(row, n), "{:+.0%}")
        lines.append((worst, [rows[0]["titles"][other], *shown, answers]))
    head = [
        f"{COLUMNS[measure]}, {'teacher' if text == 'teacher' else 'student'}'s text"
        for text, measure in cells
    ]
    ordered = [line for _, line in sorted(lines, key=lambda line: -line[0])]
    return markdown(["minus", *head, "right answers"], ordered)


def _measures(rows: list[Row], text: str) -> str:
    return markdown(
        ["model", *(COLUMNS[name] for name in MEASURES)],
        [
            [
                rows[0]["titles"][name],
                *(
                    _spread(rows, lambda row, n=name, m=measure: mean(row, n, text, m)[0])
                    for measure in MEASURES
                ),
            ]
            for name in _ordered(rows)
        ],
    )


def _bars(rows: list[Row]) -> str:
    found = [bars(row) for row in rows]
    return markdown(
        ["bar", *(f"seed {row['seed']}" for row in rows), ""],
        [
            [
                name,
                *(f"{each[name][0]:.2f}" for each in found),
                "met" if all(each[name][1] for each in found) else "**missed**",
            ]
            for name in found[0]
        ],
    )


def _seconds(rows: list[Row]) -> str:
    stages = [name for name in rows[0]["cpu_s"] if not name.endswith("measuring")]
    means = {name: sum(row["cpu_s"][name] for row in rows) / len(rows) for name in stages}
    measuring = sum(
        seconds
        for row in rows
        for name, seconds in row["cpu_s"].items()
        if name.endswith("measuring")
    )
    listed = ", ".join(f"{name} {value:.0f}" for name, value in means.items())
    each = measuring / len(rows) / len(rows[0]["models"])
    return f"CPU seconds, means over the seeds: {listed}, measuring a model {each:.0f}."


def _updates(rows: list[Row], name: str) -> str:
    made = [row["updates"] for row in rows]
    before = {"again": "round1", REPAIR: "round1", "text2": "text1"}.get(name)
    if name not in made[0]:
        return "-"
    counts = {each[name] + (each[before] if before else 0) for each in made}
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def _spread(rows: list[Row], value: Callable[[Row], float], form: str = "{:.3f}") -> str:
    """Return the mean over the seeds, and the lowest and highest where they differ."""
    found = [value(row) for row in rows]
    low, high = form.format(min(found)), form.format(max(found))
    middle = form.format(sum(found) / len(found))
    return middle if low == high else f"{middle} ({low} to {high})"


def _source(rows: list[Row]) -> str:
    row = rows[0]
    seeds = ", ".join(str(each["seed"]) for each in rows)
    command = row["command"].rpartition(" --seed")[0]
    return (
        f"`{command}`, seeds {seeds}, {row['machine']}, one thread, Python {row['python']}, torch "
        f"{row['torch']}, transformers {row['transformers']}, commit {row['commit']}."
    )
