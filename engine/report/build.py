"""A report of a run, of several, or of a store: its sections, built by each call."""

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from logitcask.engine.errors import ConfigError
from logitcask.engine.report.panels import SEQUENCES, Report, Section, Sentence
from logitcask.engine.report.runs import RunFacts, find_runs, open_runs, store_alone
from logitcask.engine.report.sections.dynamics import dynamics
from logitcask.engine.report.sections.positions import positions_section
from logitcask.engine.report.sections.provenance import provenance
from logitcask.engine.report.sections.summary import summary

MOST_RUNS = 12
"""Runs that are laid over each other; more colours look alike."""


def build_report(
    target: str | Path,
    compare: Sequence[str | Path] = (),
    *,
    probes: Sequence[Path] = (),
    tokenizer: str = "",
    sequences: int = SEQUENCES,
    teacher_accuracy: float | None = None,
) -> Report:
    """Read a run, an ablation or a store, and return everything that its page shows.

    target: the folder of a run or of an ablation, or the URL of a store; compare: runs that are
    laid over it; probes: JSON files of `logitcask probe ... --format json`; tokenizer: folder of
    the tokenizer of the tokens, if that of the run is not there; sequences: rollouts in the viewer,
    at most; teacher_accuracy: mean reward of the teacher on the prompts of the evaluation.

    Nothing is kept between calls, and no model is loaded. Raises ConfigError for a target that is
    none of these, and IntegrityError for damaged files of a run.
    """
    own = find_runs(target)
    others = [path for each in compare for path in _runs_only(each)]
    if others and not own:
        raise ConfigError(
            f"{target} is a store, and --compare lays runs over a run",
            hint="give the folder of a run, or leave --compare out",
        )
    paths = [*own, *others]
    runs = open_runs(paths[:MOST_RUNS]) if paths else (store_alone(target),)
    return Report(
        title=runs[0].name if len(own) < 2 else Path(target).resolve().name,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version("logitcask"),
        runs=tuple(run.name for run in runs if run.record),
        summary=(
            *summary(runs, teacher_accuracy=teacher_accuracy),
            *_left_out(len(paths) - len(runs)),
        ),
        sections=_sections(runs),
    )


def _sections(runs: Sequence[RunFacts]) -> tuple[Section, ...]:
    """Return the sections in the order of the page."""
    learned = (dynamics(runs),) if runs[0].record else ()
    return (*learned, positions_section(runs), provenance(runs))


def _left_out(count: int) -> tuple[Sentence, ...]:
    if count <= 0:
        return ()
    text = f"{count} more runs are left out, because a page shows {MOST_RUNS}."
    return (Sentence(text=text, state="warning"),)


def _runs_only(target: str | Path) -> tuple[Path, ...]:
    if found := find_runs(target):
        return found
    raise ConfigError(
        f"--compare {target} is a store", hint="give the folder of a run or of an ablation"
    )
