"""The table of the report page, from bench/results/report.jsonl."""

import results
from bench_report import SLOW_FRAME_MS, bars
from report_pages import markdown
from results import RESULTS, Row

NONE = "No row yet: `python bench/bench_report.py` makes them."


def tables() -> dict[str, str]:
    """Return the text of the marked block, from the newest row."""
    rows = results.read(RESULTS / "report.jsonl")
    return {"report": text(rows[-1]) if rows else NONE}


def text(row: Row) -> str:
    """Return the table of the bars, and the source of the row."""
    forms = (".2f", ",.0f", ".2f", ".1%")
    lines = [
        [what, format(value, form), format(most, form), "yes" if value <= most else "no"]
        for (what, value, most), form in zip(bars(row), forms, strict=True)
    ]
    return (
        f"{markdown(['', 'measured', 'at most', 'met'], lines)}\n\n"
        f"A page of {row['panels']} panels and {row['responses']} responses; made again it takes "
        f"{row['build_s'] + row['write_s']:.2f} s (median of {row['runs']}). Scrolling: a response "
        f"of {row['long_tokens']:,} made-up tokens, page of {row['long_bytes']:,} bytes, "
        f"{row['frames']:,} frames, median {row['frame_ms_median']:.1f} ms, 95 % under "
        f"{row['frame_ms_p95']:.1f} ms; a frame over {SLOW_FRAME_MS:g} ms is seen as a stutter. "
        f"`{row['command']}`, {row['machine']}, Chromium {row['chromium']}, Python "
        f"{row['python']}, commit {row['commit']}."
    )
