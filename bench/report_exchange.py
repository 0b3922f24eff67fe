"""The table of import and export: bench_exchange.py."""

import results
from report_pages import markdown
from results import RESULTS, Row


def tables() -> dict[str, str]:
    """Return the text of the marked block, from the newest row; empty without rows."""
    rows = results.read(RESULTS / "exchange.jsonl")
    return {"exchange": text(rows[-1])} if rows else {}


def text(row: Row) -> str:
    """Return the table and its source."""
    table = markdown(
        ["", "positions a CPU second", "CPU seconds of a million", "bytes a position", "bar of 60"],
        [
            [
                "`store export` to Parquet" if each["name"] == "export" else each["name"],
                f"{each['positions_per_cpu_s']:,.0f}",
                f"{1e6 / each['positions_per_cpu_s']:.1f}",
                f"{each['bytes']:.0f}",
                "met" if bar["met"] else "**missed**",
            ]
            for each, bar in zip(row["rates"], row["bars"], strict=True)
        ],
    )
    return (
        f"{table}\n\n{row['positions']:,} positions of responses, medians of {row['runs']} runs; "
        f"{row['machine']}, Python {row['python']}, pyarrow {row['pyarrow']}, "
        f"commit {row['commit'][:12]}."
    )
