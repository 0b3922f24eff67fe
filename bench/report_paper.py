"""The table of the paper's experiments in miniature: bench_paper.py."""

import math
from statistics import fmean
from typing import Any

import results
from paper_claims import AGREES, CLAIMS, NEEDS, Claim, mean, outcome, together
from paper_probes import CANDIDATES
from paper_published import PAPER, WHY
from report_pages import markdown
from results import RESULTS, Row

FIGURES = ("before", "after", "teacher")
MODELS = {
    "base": "the student",
    "post": "the student after rejection sampling",
    "big": "larger, same corpus",
    "big_post": "larger, after rejection sampling",
    "huge": "still larger, same corpus",
    "other": "larger, other notation",
    "cold": "the student after a cold start on it",
}


def tables() -> dict[str, str]:
    """Return the text of each marked block, from the newest rows of each seed; empty without."""
    newest = {(r["experiment"], r["seed"]): r for r in results.read(RESULTS / "paper.jsonl")}
    rows = list(newest.values())
    if not rows:
        return {}
    return {"paper": claims(rows), "paper runs": runs(rows), "paper teachers": teachers(rows)}


def claims(rows: list[Row]) -> str:
    """Return the table of verdicts, and why some are no agreement."""
    lines, notes = [], []
    for name in dict.fromkeys(claim.experiment for claim in CLAIMS):
        of = [row for row in rows if row["experiment"] == name]
        if not of:
            continue
        own = [claim for claim in CLAIMS if claim.experiment == name]
        verdicts = [_outcome(claim, of) for claim in own]
        whole = together(verdicts)
        lines.append([f"**{name}**", PAPER[name], "", str(len(of)), f"**{whole}**"])
        for claim, each in zip(own, verdicts, strict=True):
            value, error = mean([row["claims"][claim.text] for row in of])
            aim = "> 0" if claim.margin is None else f"within {claim.margin:g}"
            digits = 3 if abs(value) > 0.01 else 4
            ours = f"{value:+.{digits}f}"
            if not math.isnan(error):
                ours += f" ± {error:.{digits}f}"
            lines.append(["", claim.text, f"{ours} ({aim})", "", each])
        if whole != AGREES and name in WHY:
            notes.append(f"- {name}: {WHY[name]}")
    table = markdown(["", "claim", "ours", "seeds", "verdict"], lines)
    return "\n\n".join([table, *(["\n".join(notes)] if notes else []), _source(rows[-1], rows)])


def _outcome(claim: Claim, rows: list[Row]) -> str:
    return outcome([tuple(row["claims"][claim.text]) for row in rows], claim.margin)


def runs(rows: list[Row]) -> str:
    """Return the tables of the models and of the runs, means over seeds."""
    accuracies: dict[int, dict[str, float]] = {}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        accuracies.setdefault(row["seed"], {}).update(row["figures"]["accuracy"])
        for name in NEEDS[row["experiment"]]:
            found.setdefault(name, {})[row["seed"]] = row["figures"][name]
    models = markdown(
        ["model", "", "right answers of each seed"],
        [
            [f"`{name}`", title, ", ".join(f"{a[name]:.1%}" for a in accuracies.values())]
            for name, title in MODELS.items()
            if all(name in a for a in accuracies.values())
        ],
    )
    names = ["run", "seeds", "right before", "after", "teacher"]
    table = markdown(
        [*names, "overlap ratio", "advantage", "entropy gap"],
        [
            [
                f"`{name}`",
                str(len(of)),
                *(f"{fmean(r[key] for r in of.values()):.1%}" for key in FIGURES),
                *(_arrow(list(of.values()), key) for key in ("ratio", "advantage", "gap")),
            ]
            for name, of in found.items()
        ],
    )
    return f"{models}\n\n{table}"


def teachers(rows: list[Row]) -> str:
    """Return what `probe compatibility` finds of each teacher, and what it then teaches."""
    of = sorted(
        (row for row in rows if row["experiment"] == "compatibility"), key=lambda row: row["seed"]
    )
    figures = [row["figures"] for row in of]
    lines = [
        [
            f"`{name}`",
            "; ".join(each["probes"]["assessments"][name] for each in figures),
            ", ".join(f"{each[run]['after'] - each[run]['before']:+.1%}" for each in figures),
        ]
        for name, run in CANDIDATES.items()
    ]
    seconds = fmean(row["cpu_s"]["runs"]["probes"] for row in of)
    seeds = ", ".join(str(row["seed"]) for row in of)
    table = markdown(["teacher", f"before, of seeds {seeds}", "right answers it adds"], lines)
    return f"{table}\n\n64 prompts, 4 responses each, four teachers: {seconds:.0f} CPU seconds."


def _arrow(found: list[dict[str, Any]], key: str) -> str:
    first, last = (fmean(each[when][key] for each in found) for when in ("first", "last"))
    return f"{first:.3f} to {last:.3f}" if key == "ratio" else f"{first:.4f} to {last:.4f}"


def minutes(rows: list[Row]) -> float:
    """Return the mean CPU minutes of a seed: its models, runs and probes, each once."""
    spent: dict[int, dict[str, float]] = {}
    for row in rows:
        own = spent.setdefault(row["seed"], {})
        for kind, seconds in row["cpu_s"].items():
            for name, value in seconds.items():
                own[f"{row['experiment'] if name == 'probes' else kind} {name}"] = value
    return fmean(sum(each.values()) for each in spent.values()) / 60


def _source(row: Row, rows: list[Row]) -> str:
    commits = sorted({each["commit"] for each in rows})
    seeds = sorted({each["seed"] for each in rows})
    return (
        f"Mean ± standard error. Seeds {', '.join(map(str, seeds))}, {minutes(rows):.0f} CPU "
        f"minutes a seed. `{row['command']}`, {row['machine']}, one thread, Python "
        f"{row['python']}, torch {row['torch']}, transformers {row['transformers']}, commit "
        f"{', '.join(commits)}."
    )
