"""The table of the repaired real student: bench_real.py."""

from typing import Any

import results
from report_pages import markdown
from results import RESULTS, Row

COLUMNS = {
    "kl_qp": "KL(q ‖ p)",
    "kl_pq": "KL(p ‖ q)",
    "top1": "same first id",
    "overlap": "common top-16",
    "nll": "NLL",
}


def tables() -> dict[str, str]:
    """Return the text of each marked block, from the newest row; empty without rows."""
    rows = results.read(RESULTS / "real.jsonl")
    return {"real": full(rows[-1]), "real summary": summary(rows[-1])} if rows else {}


def full(row: Row) -> str:
    """Return the table for bench/README.md: both texts, with the changes and their errors."""
    parts = []
    for text, title in (("teacher", "the teacher"), ("student", "the student before")):
        table = markdown(
            ["model", *COLUMNS.values(), "change of KL(q ‖ p)", "change of KL(p ‖ q)"],
            [
                [
                    each["model"],
                    *(_value(each[text][name]) for name in COLUMNS),
                    *(_value(each[f"{text}_change"][name]) for name in ("kl_qp", "kl_pq")),
                ]
                for each in row["rows"]
            ],
        )
        parts.append(f"On texts sampled by {title}:\n\n{table}")
    graded = ", ".join(f"{each['model']} {_graded(each)}" for each in row["rows"])
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in row["cpu_s"].items())
    parts.append(
        f"Right answers of {row['rows'][0]['graded']} graded chats: {graded}. CPU seconds: "
        f"{seconds}. {_source(row)}"
    )
    return "\n\n".join(parts)


def summary(row: Row) -> str:
    """Return the table for the front README."""
    table = markdown(
        ["model", "updates", "KL(q ‖ p), nats", "same first id", "right answers"],
        [
            [
                each["model"],
                updates,
                _value(each["teacher"]["kl_qp"]),
                _value(each["teacher"]["top1"]),
                _graded(each),
            ]
            for each, updates in zip(row["rows"], _updates(row), strict=True)
        ],
    )
    minutes = sum(row["cpu_s"].values()) / 60
    return f"{table}\n\n{minutes:.0f} CPU minutes of rollout, score and train. {_source(row)}"


def _updates(row: Row) -> list[Any]:
    first, again, second = (row["updates"][name] for name in ("round1", "again", "round2"))
    return ["-", first, first + again, first + second, "-"]


def _graded(each: Row) -> str:
    return f"{each['right'] / each['graded']:.0%}"


def _value(pair: tuple[float, float]) -> str:
    value, error = pair
    return f"{value:.3f} ± {error:.3f}" if error else f"{value:.3f}"


def _source(row: Row) -> str:
    return (
        f"`{row['command']}`, {row['machine']}, one thread, Python {row['python']}, torch "
        f"{row['torch']}, transformers {row['transformers']}, commit {row['commit']}."
    )
