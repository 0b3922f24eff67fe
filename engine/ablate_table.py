"""Result of an ablation: its table, as JSON, Markdown and text."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a reader of the table needs no trainer
    from logitcask.engine.training.run import TrainReport

FIGURES: "dict[str, Callable[[TrainReport, float | None], float | None]]" = {
    "loss": lambda run, _: run.last["loss"],
    "accuracy": lambda run, _: _evaluated(run, -1, "accuracy"),
    "avg_at_n": lambda run, _: _evaluated(run, -1, "avg_at_n"),
    "eval_loss": lambda run, _: _evaluated(run, -1, "loss"),
    "eval_overlap_ratio": lambda run, _: _evaluated(run, -1, "overlap/ratio"),
    "eval_kl_forward_bound": lambda run, _: _evaluated(run, -1, "kl/forward_bound"),
    "eval_kl_reverse_bound": lambda run, _: _evaluated(run, -1, "kl/reverse_bound"),
    "gap_recovery": lambda run, teacher: gap_recovery(
        _evaluated(run, 0, "avg_at_n"), _evaluated(run, -1, "avg_at_n"), teacher
    ),
    "overlap_ratio": lambda run, _: run.last["overlap/ratio"],
    "overlap_mass": lambda run, _: run.last["overlap/mass_student"],
    "seconds": lambda run, _: run_seconds(run),
}
"""Columns of the table: (run, teacher's avg@n) -> the value, None where it is unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Passes of several runs over the same scores."""

    seconds: float | None
    """Seconds of the teacher for these scores; None where the store does not record them."""
    runs: int
    epochs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AblateReport:
    out: Path
    snapshot: int
    """Snapshot id that all runs are trained from."""
    rows: tuple[Mapping[str, Any], ...]
    """Per combination: its values, n, mean and sample standard deviation over seeds of every
    figure, and the reason of a refusal."""
    runs_trained: int
    """Runs trained by this call; others were finished before."""
    seconds: float
    trainings_seconds: float
    """Seconds of trainings and their evaluations, part of `seconds`."""
    teacher_seconds_spent: float
    teacher_passes: tuple[Passes, ...]
    """Passes over the scores of the snapshot, by all runs of the table."""
    teacher_seconds_saved: float | None
    """Seconds of a teacher that scores again in every pass; None where the store does not record
    them."""


def table_row(
    values: Mapping[str, Any],
    runs: "Sequence[TrainReport]",
    refused: str = "",
    teacher: float | None = None,
) -> dict[str, Any]:
    """Return one row of the table.

    values: section.key -> value of a combination; refused: the reason why it cannot be trained;
    teacher: its avg@n.
    """
    found = {key.partition(".")[2]: value for key, value in values.items()} | {"n": len(runs)}
    for name, figure in FIGURES.items():
        known = [x for x in (figure(run, teacher) for run in runs) if x is not None]
        complete = bool(runs) and len(known) == len(runs)
        found[name] = fmean(known) if complete else None
        found[f"{name}_sd"] = stdev(known) if complete and len(known) > 1 else None
    return {**found, "refused": refused}


def gap_recovery(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """Return the recovered share of the gap to the teacher (arXiv 2604.13016, section 3.2)."""
    if before is None or after is None or teacher is None or teacher == before:
        return None
    return (after - before) / (teacher - before)


def run_seconds(run: "TrainReport") -> float:
    """Return the seconds of a whole run: loading, training, evaluation."""
    # The line of the last update precedes the last evaluation.
    last = float(run.evaluations[-1]["eval/seconds"]) if run.evaluations else 0.0
    return float(run.last["progress/seconds"]) + last


def saved_seconds(passes: Sequence[Passes]) -> float | None:
    """Return the sum of seconds x runs x epochs; None where the seconds of a pass are unknown."""
    known = [p.seconds * p.runs * p.epochs for p in passes if p.seconds is not None]
    return sum(known) if len(known) == len(passes) else None


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the rows as text, mean ± spread; without the columns that are empty everywhere."""
    names = [
        name
        for name in rows[0]
        if not name.endswith("_sd") and any(each[name] not in (None, "") for each in rows)
    ]
    return [{n: _cell(each[n], each.get(f"{n}_sd")) for n in names} for each in rows]


def _cell(value: Any, spread: float | None) -> str:
    if value in (None, ""):
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if spread is None else f"{text} ± {spread:.2g}"


def footnotes(report: AblateReport) -> list[str]:
    saved = "unknown: the store does not record the seconds of all these scores"
    if report.teacher_seconds_saved is not None:
        runs: Counter[tuple[float | None, int]] = Counter()
        for each in report.teacher_passes:
            runs[each.seconds, each.epochs] += each.runs
        terms = [f"{s or 0:.3g} s a pass x {n} runs x {e} epochs" for (s, e), n in runs.items()]
        total = f"{report.teacher_seconds_saved:.3g} s ({' + '.join(terms)})"
        saved = f"a live teacher would have added {total}"
    return [
        f"snapshot {report.snapshot}; mean ± sample standard deviation over n seeds; losses of "
        "different objectives do not compare",
        f"teacher seconds spent: {report.teacher_seconds_spent:.0f}; saved: {saved}",
    ]


def markdown(report: AblateReport) -> str:
    """Return table and footnotes as Markdown."""
    cells = table(report.rows)
    lines = [list(cells[0]), ["---"] * len(cells[0]), *(list(each.values()) for each in cells)]
    rows = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return rows + "\n" + "".join(f"- {note}\n" for note in footnotes(report))


def _evaluated(run: "TrainReport", index: int, name: str) -> float | None:
    found = run.evaluations[index].get(f"eval/{name}") if run.evaluations else None
    return None if found is None else float(found)
