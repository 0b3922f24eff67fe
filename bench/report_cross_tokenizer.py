"""The tables of bench_cross_tokenizer.py: objectives over spans, and two experts at once."""

import math
from statistics import fmean, stdev

import results
from report_pages import markdown
from results import RESULTS, Row

NONE = "No row yet: `python bench/bench_cross_tokenizer.py` makes it."
BAR = 0.5
"""Least gap recovery of the best objective over spans."""
ERRORS = 2
"""Standard errors by which the student of both experts must beat that of either."""


def tables() -> dict[str, str]:
    """Return the text of the marked blocks, from the newest row of each variant."""
    newest = {
        (row["part"], row["variant"]): row
        for row in results.read(RESULTS / "cross_tokenizer.jsonl")
    }
    parts = {
        part: [row for (of, _), row in newest.items() if of == part]
        for part in ("spans", "experts")
    }
    return {
        "cross tokenizer": spans(parts["spans"]) if parts["spans"] else NONE,
        "experts": experts(parts["experts"]) if parts["experts"] else NONE,
    }


def spans(rows: list[Row]) -> str:
    """Return the bar, gap recovery by objective, the lowest first, and its source."""
    rows = sorted(rows, key=lambda row: fmean(recoveries(row)))
    trained = [row for row in rows if row["after"]]
    best = max(fmean(recoveries(row)) for row in rows if row["teacher"].startswith("merged"))
    rule = f"gap recovery of the best objective over spans >= {BAR:.0%}"
    bar = [rule, f"{best:.1%}", met(best >= BAR)]
    table = [
        [
            "other tokenizer" if row["teacher"].startswith("merged") else "the student's",
            f"`{row['objective']}`",
            *(figures(row) if row["after"] else ["none", *untrained(row)]),
            "yes" if row["after"] and fmean(recoveries(row)) >= BAR else "**no**",
        ]
        for row in rows
    ]
    head = ["teacher's tokenizer", "objective", "learning rate", "accuracy after",
            "gap recovery", f"{BAR:.0%}"]  # fmt: skip
    before = spread([each["all"] for each in trained[0]["before"]])
    teachers = {
        row["teacher"]: spread([each[row["teacher"]]["all"] for each in row["teachers"]])
        for row in trained
        if not row["teacher"].endswith("-ends")
    }
    known = "; ".join(
        f"the teacher with {'another' if name == 'merged' else 'the same'} tokenizer {text}"
        for name, text in sorted(teachers.items(), reverse=True)
    )
    return (
        f"{markdown(['bar', 'measured', ''], [bar])}\n\n{markdown(head, table)}\n\n"
        f"Accuracy of the student before: {before}; {known}. Rate `none`: no rate was better than "
        f"no training, and the figures are the best of seed 3 alone. {source(trained)}"
    )


def figures(row: Row) -> list[str]:
    """Return rate, accuracy and gap recovery of a variant that was trained with each seed."""
    accuracies = [each["all"] for each in row["after"]]
    return [f"{row['rate']:g}", spread(accuracies), spread(recoveries(row))]


def untrained(row: Row) -> list[str]:
    """Return accuracy and gap recovery of the best rate that was tried."""
    return [f"{max(row['validation'].values()):.1%}", f"{recoveries(row)[0]:.1%}"]


def experts(rows: list[Row]) -> str:
    """Return the bar, accuracies by teachers, the lowest first, and the source."""
    rows = sorted(rows, key=lambda row: fmean(each["all"] for each in row["after"]))
    of = {row["variant"]: [each["all"] for each in row["after"]] for row in rows}
    both = [row for row in rows if "+" in row["teacher"] or row["teacher"] == "routed"]
    lines = [
        [
            f"{label(row)} over either expert alone, {how}: standard errors > {ERRORS}",
            f"{least:.1f}",
            met(least > ERRORS),
        ]
        for row in both
        if (singles := [x for x in rows if x not in both and x["objective"] == row["objective"]])
        for how, measure in (("as independent seeds", independent), ("paired by seed", paired))
        for least in [min(measure(of[row["variant"]], of[x["variant"]]) for x in singles)]
    ]
    table = [
        [
            label(row),
            f"`{row['objective']}`",
            f"{row['rate']:g}",
            *(spread([each[kind] for each in row["after"]]) for kind in ("all", *KINDS)),
        ]
        for row in rows
    ]
    models = {"student before": [each for row in rows[:1] for each in row["before"]]} | {
        f"expert in {name}": [each[name] for each in row["teachers"]]
        for row in both[:1]
        for name in row["teachers"][0]
    }
    table += [
        [name, "", "", *(spread([each[kind] for each in found]) for kind in ("all", *KINDS))]
        for name, found in models.items()
    ]
    head = ["taught by", "objective", "learning rate", *("all", *KINDS)]
    return (
        f"{markdown(['bar', 'measured', ''], lines)}\n\n{markdown(head, table)}\n\n{source(rows)}"
    )


KINDS = ("sums", "differences")


def label(row: Row) -> str:
    """Return the teachers of a row in words."""
    if row.get("weighting", "fixed") != "fixed":
        return f"both experts, weights by {row['weighting']}"
    words = {"routed": "each expert on its kind", "sums+differences": "both experts, equal weights"}
    return words.get(row["teacher"], f"the expert in {row['teacher']}")


def recoveries(row: Row) -> list[float]:
    """Return (after - before) / (teacher - before) of each seed; of the best rate that was tried
    where none was better than no training."""
    if not row["after"]:
        start, teacher = row["choice"]["before"], row["choice"]["teachers"][row["teacher"]]["all"]
        return [(max(row["validation"].values()) - start) / (teacher - start)]
    return [
        (after["all"] - before["all"]) / (teacher[row["teacher"]]["all"] - before["all"])
        for before, after, teacher in zip(row["before"], row["after"], row["teachers"], strict=True)
    ]


def independent(a: list[float], b: list[float]) -> float:
    """Return the difference of two means over its standard error, as of unrelated values."""
    return (fmean(a) - fmean(b)) / math.hypot(standard_error(a), standard_error(b))


def paired(a: list[float], b: list[float]) -> float:
    """Return the same of the differences: a seed has the same student, samples and problems."""
    found = [x - y for x, y in zip(a, b, strict=True)]
    return fmean(found) / standard_error(found)


def standard_error(values: list[float]) -> float:
    """Return the standard error of a mean."""
    return stdev(values) / math.sqrt(len(values))


def spread(values: list[float]) -> str:
    """Return a mean with its standard error, in percent."""
    return f"{fmean(values):.1%} ± {standard_error(values):.1%}"


def met(good: bool) -> str:
    """Return the word of a bar."""
    return "met" if good else "**missed**"


def source(rows: list[Row]) -> str:
    """Return command, seeds and machine of rows."""
    row = rows[-1]
    commits = sorted({each["commit"] for each in rows})
    return (
        f"Means ± standard errors over the seeds {', '.join(map(str, row['seeds']))}. "
        f"`{row['command']}`, {row['machine']}, one thread, Python {row['python']}, "
        f"torch {row['torch']}, commit {', '.join(commits)}."
    )
