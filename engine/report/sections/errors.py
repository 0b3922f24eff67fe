"""Section of errors: what failed, what was tried again, and which updates were beyond a bound."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logitcask.engine.config.runner import LOGS
from logitcask.engine.errors import LogitcaskError
from logitcask.engine.objectives import parse_objective
from logitcask.engine.objectives.bounds import COVERAGE, DRIFT, SKIPPED, Bounds, bounded_metric
from logitcask.engine.report.panels import Absent, Axis, Panel, Section, Table
from logitcask.engine.report.runs import RunFacts, step_of
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.store.log.claims import failed_units, failures_of
from logitcask.engine.training.run_dir.files import CHECKPOINTS
from logitcask.engine.workers.failures import first_line
from logitcask.engine.workers.timeline import read_timeline

_UNITS, _PROCESSES, _BOUNDS = "Failed units", "Processes", "Updates beyond a bound"
MOST_UNITS = 50
"""Failed units in the table."""
MOST_LOG_BYTES = 16 * 2**20
"""Of a log that is read, its end."""
_START = re.compile(rb"^--- \d{4}-\d\d-\d\dT", re.MULTILINE)
"""A line that the supervisor writes before it starts a process, see workers/processes.py."""


def errors_section(runs: Sequence[RunFacts]) -> Section:
    """Build failed units, processes that died, and updates beyond the bounds, of all runs.

    A store alone is a run with an empty record. A kind of error that has not come is a line of the
    last table, and one that nothing could show is an Absent.
    """
    panels: list[Panel] = []
    absent: list[Absent] = []
    none: list[tuple[str, str]] = []
    for title, made in (
        (_UNITS, _units(runs)),
        (_PROCESSES, _processes(runs)),
        (_BOUNDS, _bounds(runs)),
    ):
        if isinstance(made, str):
            none.append((title, made))
        elif isinstance(made, Absent):
            absent.append(made)
        else:
            panels.append(made)
    if none:
        panels.append(
            Table(
                id="errors-none",
                title="No errors" if len(panels) == 0 else "No errors of these kinds",
                how="Kinds of errors that were looked for, and did not come.",
                columns=(Axis(name="kind"), Axis(name="found")),
                rows=tuple(none),
            )
        )
    return Section(
        id="errors", title="Errors and retries", panels=tuple(panels), absent=tuple(absent)
    )


def _units(runs: Sequence[RunFacts]) -> Table | Absent | str:
    """Return the failed units; a sentence where none has failed."""
    stores: dict[str, tuple[Store, Snapshot]] = {}
    for facts in runs:
        if facts.store is not None and facts.snapshot is not None:
            stores.setdefault(facts.store.uuid, (facts.store, facts.snapshot))
    failed = [
        (store, snapshot, key, times)
        for store, snapshot in stores.values()
        for key, times in failed_units(store.storage).items()
    ]
    if not stores:
        return Absent(title=_UNITS, why="there is no store to look into")
    if not failed:
        return "none: the store has no note of a unit that failed"
    some = "" if len(failed) <= MOST_UNITS else f" {MOST_UNITS} of {len(failed):,} are shown."
    return Table(
        id="errors-units",
        title=_UNITS,
        how="Units of rollout or score that raised an error, with the last one. Workers try a unit "
        "again until it failed too often; `logitcask store retry-failed` lets them begin again."
        f"{some}",
        columns=(
            *(Axis(name="unit"), Axis(name="failures"), Axis(name="now")),
            *(Axis(name="error"), Axis(name="worker"), Axis(name="last time, UTC")),
        ),
        rows=tuple(_unit(*each) for each in failed[:MOST_UNITS]),
    )


def _unit(store: Store, snapshot: Snapshot, key: str, times: int) -> tuple[str | float | None, ...]:
    now = "made since" if key in snapshot.unit_keys() else "missing"
    short = key.removeprefix("sha256:")[:8]
    try:
        notes = failures_of(store.storage, key)
    except LogitcaskError as error:
        return short, times, now, error.cause, None, None
    if not notes:
        return short, times, now, "its note was removed meanwhile", None, None
    last = notes[-1]
    return short, times, now, f"{last.error}: {first_line(last.message)}", last.worker, last.time


def _processes(runs: Sequence[RunFacts]) -> Table | str:
    """Return processes that were started again, or that ended within a piece of work."""
    rows, logs = list[tuple[str | float | None, ...]](), 0
    for facts in runs:
        files = sorted((facts.path / LOGS).glob("*.log"))
        logs += len(files)
        spans = read_timeline(facts.path)
        newest = {(each.role, each.process): each for each in spans}
        # The newest span of a run that goes on is at work.
        open_now = set(newest.values()) if facts.locked else set()
        for file in files:
            role, _, process = file.stem.partition("-")
            ended = sum(
                each.end is None and each not in open_now
                for each in spans
                if (each.role, each.process) == (role, process)
            )
            starts, last = _log(file)
            if starts > 1 or ended:
                rows.append((facts.name, file.stem, starts, ended, last))
        damaged = len(list((facts.path / CHECKPOINTS).glob("damaged-*")))
        if damaged:
            words = f"{damaged} damaged checkpoints were kept aside, and not resumed from"
            rows.append((facts.name, "train", None, None, words))
    if not rows:
        why = "none was started again" if logs else "there is one, and no logs of others"
        return f"{why}; no checkpoint was damaged"
    return Table(
        id="errors-processes",
        title=_PROCESSES,
        how="Starts count restarts after a death, and commands that resumed. Work without an end "
        "is that in which a process died.",
        columns=(
            *(Axis(name="run"), Axis(name="process"), Axis(name="starts")),
            *(Axis(name="work without an end"), Axis(name="last line of its log")),
        ),
        rows=tuple(rows),
    )


def _log(file: Path) -> tuple[int, str]:
    """Return (starts, last line that says anything) of the log of a process."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - MOST_LOG_BYTES))
        data = opened.read(MOST_LOG_BYTES)
    lines = [line.rpartition(b"\r")[2].strip() for line in data.splitlines()]
    last = next((line for line in reversed(lines) if line), b"")
    return len(_START.findall(data)), last.decode(errors="replace")


def _bounds(runs: Sequence[RunFacts]) -> Table | Absent | str:
    """Return for each bound the updates beyond it; a sentence where there are none."""
    rows = [row for facts in runs if facts.updates for row in _beyond(facts)]
    if not any(facts.updates for facts in runs):
        return Absent(title=_BOUNDS, why="there are no lines of updates")
    if not rows:
        return "no bound counts: the objective is exact however old the rollouts are"
    if not any(row[3] for row in rows):
        return f"none; looked at {', '.join(sorted({str(row[1]) for row in rows}))}"
    return Table(
        id="errors-bounds",
        title=_BOUNDS,
        how="Updates whose student was too far from the one that sampled their rows. The action is "
        "--staleness-action: off changes nothing.",
        columns=(
            *(Axis(name="run"), Axis(name="metric"), Axis(name="bound")),
            *(Axis(name="updates beyond"), Axis(name="of updates with it"), Axis(name="worst")),
            *(Axis(name="at update"), Axis(name="action")),
        ),
        rows=tuple(rows),
    )


def _beyond(facts: RunFacts) -> list[tuple[str | float | None, ...]]:
    recorded = (facts.record.get("settings") or {}).get("bounds") or {}
    defaults = Bounds()
    coverage = float(recorded.get("min_coverage", defaults.min_coverage))
    drift = float(recorded.get("max_drift", defaults.max_drift))
    action = str(recorded.get("action", "off"))
    watched = _watched(facts)
    rows: list[tuple[str | float | None, ...]] = []
    for metric, bound in ((COVERAGE, coverage), (DRIFT, drift)):
        # Coverage counts downwards.
        sign = -1 if metric == COVERAGE else 1
        found = [(sign * line[metric], step_of(line)) for line in _with(facts, metric)]
        if found and watched in (metric, ""):
            worst, at = max(found)
            beyond = sum(value > sign * bound for value, _ in found)
            text = f"{'at least' if sign < 0 else 'at most'} {bound:g}"
            rows.append(
                (facts.name, metric, text, beyond, len(found), sign * worst, at, action)
            )  # fmt: skip
    skipped = [(line[SKIPPED], step_of(line)) for line in _with(facts, SKIPPED)]
    if skipped:
        beyond, (worst, at) = sum(share > 0 for share, _ in skipped), max(skipped)
        rows.append((facts.name, SKIPPED, "0", beyond, len(skipped), worst, at, action))
    again = [(len(line["resampled"]), int(line["update"])) for line in facts.ledger
             if line.get("resampled")]  # fmt: skip
    if again:
        worst, at = max(again)
        name = "units sampled again"
        rows.append((facts.name, name, "0", len(again), len(facts.ledger), worst, at, action))
    return rows


def _watched(facts: RunFacts) -> str | None:
    """Return the metric whose bound counts for the objective, '' where that is not known.

    None = the objective is exact at any age.
    """
    try:
        return bounded_metric(parse_objective(str(facts.record.get("preset", ""))).objective)
    except LogitcaskError:
        return ""  # a run of another version may have a preset that is not known here: show both


def _with(facts: RunFacts, metric: str) -> list[Mapping[str, Any]]:
    """Return the lines of updates with a value of a metric."""
    return [line for line in facts.updates if _is_number(line.get(metric))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
