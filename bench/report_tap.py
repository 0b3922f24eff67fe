"""The table of the tap, from bench/results/tap.jsonl."""

import results
from report_pages import markdown
from results import RESULTS, Row

NONE = "No row yet: `python bench/bench_tap.py` makes them."
PARTS = {"new": "requests to the server", "hit": "answers from records", "hit again": "once more"}


def tables() -> dict[str, str]:
    """Return the text of the marked block, from the newest row of each setting."""
    rows = results.read(RESULTS / "tap.jsonl")
    newest = {(row["tokens"], row["k"]): row for row in rows}
    return {"tap": text(list(newest.values())) if newest else NONE}


def text(rows: list[Row]) -> str:
    """Return the table of the settings, and the source of its rows."""
    lines = [
        [each["tokens"], each["k"], words, f"{each[f'{part}, requests a core-second']:.1f}",
         f"{each[f'{part}, positions a core-second']:,.0f}", _mb(each[f"{part}, peak MB"])]
        for each in rows
        for part, words in PARTS.items()
    ]  # fmt: skip
    head = ["tokens", "k", "", "requests a core-second", "positions a core-second", "peak MB"]
    notes = [
        f"L = {each['tokens']:,}, K = {each['k']}: {each['sequences']} sequences, an answer of "
        f"{each['bytes of an answer'] / 1e6:.2f} MB, "
        f"{each['bytes a position on the disk']:.0f} bytes a position on the disk, "
        f"{_mb(each['idle, MB'])} MB before the first request{_ratio(each)}."
        for each in rows
    ]
    last = rows[-1]
    source = (
        f"`python bench/bench_tap.py`, {last['machine']}, Python {last['python']}, aiohttp "
        f"{last['aiohttp']}, numpy {last['numpy']}, commit {last['commit']}."
    )
    return "\n\n".join([markdown(head, lines), " ".join([*notes, source])])


def _mb(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f}"


def _ratio(row: Row) -> str:
    ratio = row.get("hits over the prototype's")
    return "" if ratio is None else f", {ratio:.1f} times the prototype's answers (bar: 2)"
