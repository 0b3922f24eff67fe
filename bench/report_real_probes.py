"""The table of the probes of the real pair: bench_real_probes.py."""

from typing import Any

import results
from report_pages import markdown
from results import RESULTS, Row

SHOWN = ("sampled 1", "student_topk 1", "student_topk 16", "student_released 1", "overlap 16")
"""Estimators of the table, with their k."""


def tables() -> dict[str, str]:
    """Return the text of the marked block, from the newest row; empty without."""
    rows = results.read(RESULTS / "real_probes.jsonl")
    return {"real probes": _table(rows[-1])} if rows else {}


def _table(row: Row) -> str:
    found = row["probes"]
    measures, reward = found["compatibility"]["measures"], found["reward"]
    regions, cuts = found["regions"]["regions"], found["continuation"]["cuts"]
    estimators = {f"{e['estimator']} {e['k']}": e for e in found["estimators"]["table"]}
    advantages = ", ".join(
        f"{_plain(c['advantage'])} after {c['at']}" for c in cuts if c["advantage"]
    )
    errors = ", ".join(f"{n} {estimators[n]['rms_error']:.2f}" for n in SHOWN if n in estimators)
    lines = [
        ["E1", "first overlap ratio", _plain(measures["overlap/ratio"])],
        ["E1", "overlap mass of the student, of the teacher", _masses(measures)],
        ["", "teacher's accuracy less the student's", _plain(measures["accuracy/gain"])],
        ["", "`probe compatibility`", found["compatibility"]["assessment"]],
        ["E7", "share of the gradient of `opd` on the overlap", _share(regions["overlap"])],
        ["E13", "teacher's advantage from responses cut after tokens", advantages],
        ["E14", "AUROC of the reward", f"{reward['auroc']:.3f} ± {reward['auroc_se']:.3f}"],
        ["E15", "error of a gradient over its norm (root mean square)", errors],
    ]
    table = markdown(["", "measure", "value"], lines)
    return (
        f"{table}\n\n`{row['command']}`, {row['machine']}, one thread, Python {row['python']}, "
        f"torch {row['torch']}, transformers {row['transformers']}, commit {row['commit']}."
    )


def _plain(each: dict[str, Any]) -> str:
    return f"{each['mean']:.3f} ± {each['se']:.3f}"


def _masses(measures: dict[str, Any]) -> str:
    return ", ".join(_plain(measures[f"overlap/mass_{of}"]) for of in ("student", "teacher"))


def _share(region: dict[str, Any]) -> str:
    return f"{region['share']['opd']:.3f}"
