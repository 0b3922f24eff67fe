"""The table of the scores of rows, from results/scoring.jsonl; report.py writes it."""

import results
from report_pages import markdown
from results import RESULTS, Row

NONE = "No row yet: `python bench/bench_scoring.py` makes it."
BAR = 1.0


def tables() -> dict[str, str]:
    """Return the text of the marked block."""
    rows = results.read(RESULTS / "scoring.jsonl")
    return {"scoring": text(rows[-1]) if rows else NONE}


def text(row: Row) -> str:
    """Return the bar and the cases of a row, that with the least ratio first, and its source."""
    cases = sorted(row["cases"], key=lambda case: float(case["plain over ours"]))
    least = cases[0]["plain over ours"]
    bar = [f"the best plain loop over ours, least of all cases >= {BAR:g}", least,
           "met" if least >= BAR else "**missed**"]  # fmt: skip
    lines = []
    for case in cases:
        plain = {name: ns for name, ns in case["ns_a_logit"].items() if name != "ours"}
        best = min(plain, key=lambda name: float(plain[name]))
        lines.append(
            [f"{case['n_vocab']:,}", case["k"], case["plain over ours"], case["ns_a_logit"]["ours"],
             plain[best], best.removeprefix("plain, "), max(plain.values())]
        )  # fmt: skip
    head = ["V", "K", "plain over ours", "ours", "best plain", "its batch", "slowest plain"]
    source = (
        f"CPU nanoseconds a logit. `python bench/bench_scoring.py`, {row['machine']}, one thread, "
        f"Python {row['python']}, torch {row['torch']}, commit {row['commit']}."
    )
    return "\n\n".join([markdown(["bar", "measured", ""], [bar]), markdown(head, lines), source])
