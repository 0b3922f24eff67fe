"""The tables of other projects: their tests with our ops put in, and their spans of real texts."""

import results
from report_pages import markdown
from results import RESULTS, Row

NONE = "No row yet: `python bench/peers/run.py` makes them."
NO_SPANS = "No row yet: `python bench/peers/spans_texts.py` makes it."
ALIGNERS = ("SimCT", "NeMo-RL")


def tables() -> dict[str, str]:
    """Return the text of the marked blocks."""
    newest = {(row["peer"], row["device"]): row for row in results.read(RESULTS / "peers.jsonl")}
    spans = results.read(RESULTS / "peer_spans.jsonl")
    return {
        "peers": text(list(newest.values())) if newest else NONE,
        "peer spans": spans_text(spans[-1]) if spans else NO_SPANS,
    }


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


def spans_text(row: Row) -> str:
    """Return the tables of spans and of matched ids, and their source."""
    found, matched = list[list[object]](), list[list[object]]()
    for pair in row["pairs"]:
        both = f"{pair['student']}, {pair['teacher']}"
        for name in ALIGNERS:
            found += [
                [both, name, each["texts"], f"{each['spans_found']:.1%}",
                 f"{each['segments_of_other_bytes']:,}", f"{each['bytes_in_right_segments']:.1%}"]
                for each in pair[name]
            ]  # fmt: skip
        for name in ("TRL", "SimCT"):
            ids = pair[f"{name}, ids by string"]
            matched.append(
                [both, name, f"{ids['equal_bytes']:,}", f"{ids['of_equal_bytes']:,}",
                 f"{ids['of_other_bytes']:,}"]
            )  # fmt: skip
    flags = row["pairs"][-1]
    said, kinds = flags["NeMo-RL flags"], flags["rllm, texts without a loss"]
    both = f"{flags['student']} and {flags['teacher']}"
    bytes_ = row["byte_map"]
    notes = (
        f"NeMo-RL's map of bytes has {bytes_['entries']} entries, {bytes_['wrong']} of them of "
        f"another byte than GPT-2's. Of {both} it flags {said['said wrong, is True']:,} pairs of "
        f"equal bytes as wrong and {said['said right, is False']:,} of other bytes as right; "
        f"{said['tokens in right pairs'] / said['tokens']:.0%} of the student's tokens are in "
        "pairs that are right and flagged so. rllm gives "
        + ", ".join(f"{share:.1%} of the texts of {kind}" for kind, share in kinds.items())
        + " an advantage of 0, with a line in its log."
    )
    peers = ", ".join(f"{name} {commit}" for name, commit in row["peers"].items())
    source = (
        f"`python bench/peers/spans_texts.py`, {peers}, trl {row['trl']}, {row['machine']}, Python "
        f"{row['python']}, transformers {row['transformers']}, commit {row['commit']}."
    )
    head = ["student, teacher", "project", "texts", "of our spans", "segments of other bytes",
            "bytes in right segments"]  # fmt: skip
    ids_head = ["student, teacher", "project", "ids of equal bytes", "matched", "of other bytes"]
    return "\n\n".join([markdown(head, found), notes, markdown(ids_head, matched), source])
