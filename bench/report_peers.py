"""The table of other projects' tests with our ops put in, from bench/results/peers.jsonl."""

import results
from report_pages import markdown
from results import RESULTS, Row

NONE = "No row yet: `python bench/peers/run.py` makes them."


def tables() -> dict[str, str]:
    """Return the text of the marked block."""
    newest = {(row["peer"], row["device"]): row for row in results.read(RESULTS / "peers.jsonl")}
    return {"peers": text(list(newest.values())) if newest else NONE}


def text(rows: list[Row]) -> str:
    """Return the table of the suites, and the source of its rows."""
    lines: list[list[object]] = [
        [row["project"], row["peer_version"], row["device"], row["cases"], row["hold"], row["fail"],
         "; ".join(f"{each['cases']} {each['reason']}" for each in row["left_out"])]
        for row in rows
    ]  # fmt: skip
    head = ["project", "commit", "on", "cases", "hold", "fail", "left out"]
    last = rows[-1]
    source = (
        f"`python bench/peers/run.py`, {last['machine']}, Python {last['python']}, torch "
        f"{last['torch']}, triton {last['triton']}, commit {last['commit']}."
    )
    return f"{markdown(head, lines)}\n\n{source}"
