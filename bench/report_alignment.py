"""The table of the tokenizers against each other, from results/alignment.jsonl."""

import results
from report_pages import markdown
from results import RESULTS, Row

NONE = "No row yet: `python bench/bench_alignment.py FOLDER...` makes it."
BAR = 1_000_000


def tables() -> dict[str, str]:
    """Return the text of the marked block."""
    rows = results.read(RESULTS / "alignment.jsonl")
    return {"alignment": text(rows[-1]) if rows else NONE}


def text(row: Row) -> str:
    """Return the bar and the tokenizers of a row, the slowest first, and its source."""
    each = sorted(row["measured"], key=lambda one: int(one["tokens_a_minute"]))
    aligned = min(int(pair["tokens_a_minute"]) for pair in row["pairs"])
    # Rows before scores over spans have no responses.
    responses = [int(p["responses_a_minute"]) for p in row["pairs"] if "responses_a_minute" in p]
    least = min(aligned, int(each[0]["tokens_a_minute"]), *responses)
    bar = [f"tokens a minute of one core, encoded and aligned, least >= {BAR:,}", f"{least:,}",
           "met" if least >= BAR else "**missed**"]  # fmt: skip
    lines = [
        [one["tokenizer"], f"{one['ids']:,}", one["refused"], f"{one['patched']:,}",
         f"{one['tokens']:,}", f"{one['tokens_a_minute']:,}", one["table_seconds"]]
        for one in each
    ]  # fmt: skip
    head = ["tokenizer", "ids", "texts refused", "texts patched", "tokens", "tokens a minute",
            "seconds of its table"]  # fmt: skip
    source = (
        f"{row['texts']:,} texts, {len(row['pairs'])} ordered pairs, the slowest {aligned:,} "
        f"tokens a minute; each byte was in exactly one span of each pair. "
        f"`python bench/bench_alignment.py FOLDER...`, {row['machine']}, CPU seconds, "
        f"Python {row['python']}, transformers {row['transformers']}, commit {row['commit']}."
    )
    return "\n\n".join([markdown(["bar", "measured", ""], [bar]), markdown(head, lines), source])
