"""A report of a run, of several, or of a store: its sections, built by each call."""

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from logitcask.engine.errors import ConfigError
from logitcask.engine.report.panels import Report
from logitcask.engine.report.runs import RunFacts, find_runs, open_runs
from logitcask.engine.report.sections.dynamics import dynamics
from logitcask.engine.store import open_store

MOST_RUNS = 12
"""Runs that are laid over each other; more colours look alike."""


def build_report(
    target: str | Path,
    compare: Sequence[str | Path] = (),
    *,
    probes: Sequence[Path] = (),
    tokenizer: str = "",
    sequences: int = 200,
) -> Report:
    """Read a run, an ablation or a store, and return everything that its page shows.

    target: the folder of a run or of an ablation, or the URL of a store; compare: runs that are
    laid over it; probes: JSON files of `logitcask probe ... --format json`; tokenizer: folder of
    the tokenizer of the tokens, if that of the run is not there; sequences: rollouts in the viewer,
    at most.

    Nothing is kept between calls, and no model is loaded. Raises ConfigError for a target that is
    none of these, and IntegrityError for damaged files of a run.
    """
    paths = [*find_runs(target), *(path for each in compare for path in _runs_only(each))]
    if compare and len(paths) and not find_runs(target):
        raise ConfigError(
            f"{target} is a store, and --compare lays runs over a run",
            hint="give the folder of a run, or leave --compare out",
        )
    runs = open_runs(paths[:MOST_RUNS])
    return _of_runs(runs) if runs else _of_store(target)


def _runs_only(target: str | Path) -> tuple[Path, ...]:
    if found := find_runs(target):
        return found
    raise ConfigError(
        f"--compare {target} is a store", hint="give the folder of a run or of an ablation"
    )


def _of_runs(runs: Sequence[RunFacts]) -> Report:
    return Report(
        title=runs[0].name,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version("logitcask"),
        runs=tuple(run.name for run in runs),
        summary=(),
        sections=(dynamics(runs),),
    )


def _of_store(target: str | Path) -> Report:
    open_store(target)
    return Report(
        title=str(target),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version("logitcask"),
        runs=(),
        summary=(),
        sections=(),
    )
