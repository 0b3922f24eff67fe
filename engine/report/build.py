"""A report of a run, of several, or of a store: its sections, built by each call."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from logitcask.engine.errors import ConfigError, StoreError
from logitcask.engine.report.panels import SEQUENCES, Report, Section, Sentence
from logitcask.engine.report.runs import RunFacts, find_runs, open_runs, store_alone
from logitcask.engine.report.sections.ablation import ablation_section
from logitcask.engine.report.sections.dynamics import dynamics
from logitcask.engine.report.sections.errors import errors_section
from logitcask.engine.report.sections.live import live_section
from logitcask.engine.report.sections.positions import positions_section
from logitcask.engine.report.sections.probes.section import file_panels, probes_section
from logitcask.engine.report.sections.provenance import provenance
from logitcask.engine.report.sections.sizes import store_section
from logitcask.engine.report.sections.state import FINISHED, run_state
from logitcask.engine.report.sections.stored import names_of
from logitcask.engine.report.sections.summary import summary
from logitcask.engine.report.sections.timeline import timeline_section
from logitcask.engine.report.viewer.data import viewer_data
from logitcask.engine.report.viewer.sources import Source

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
    none of these and for a file of no probe, and IntegrityError for damaged files of a run.
    """
    for file in probes:
        file_panels(file, "")  # a wrong file is refused before the rest is read
    own = find_runs(target)
    others = [path for each in compare for path in _runs_only(each)]
    if others and not own:
        raise ConfigError(
            f"{target} is a store, and --compare lays runs over a run",
            hint="give the folder of a run, or leave --compare out",
        )
    paths = [*own, *others]
    for at, path in enumerate(paths):
        if path.resolve() in {each.resolve() for each in paths[:at]}:
            raise ConfigError(f"--compare {path}: it is there twice", hint="give every run once")
    runs = open_runs(paths[:MOST_RUNS]) if paths else (store_alone(target),)
    viewer, not_shown = _viewer(runs, tokenizer, sequences)
    return Report(
        title=runs[0].name if len(own) < 2 else Path(target).resolve().name,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version("logitcask"),
        runs=tuple(run.name for run in runs if run.record),
        summary=(
            *summary(runs, own=max(1, len(own)), teacher_accuracy=teacher_accuracy),
            *_left_out(len(paths) - len(runs)),
            *not_shown,
        ),
        sections=(
            *((ablation_section(Path(target)),) if len(own) > 1 else ()),
            *_sections(runs, probes),
        ),
        viewer=viewer,
    )


def _sections(runs: Sequence[RunFacts], probes: Sequence[Path]) -> tuple[Section, ...]:
    """Return the sections in the order of the page."""
    first = runs[0]
    goes_on = first.record and run_state(first.path).name != FINISHED
    now = (live_section(first),) if goes_on else ()
    learned = (dynamics(runs),) if first.record else ()
    return (
        *now,
        *learned,
        positions_section(runs),
        probes_section(runs, probes),
        store_section(runs),
        timeline_section(runs),
        errors_section(runs),
        provenance(runs),
    )


def _viewer(
    runs: Sequence[RunFacts], tokenizer: str, sequences: int
) -> tuple[Mapping[str, Any] | None, tuple[Sentence, ...]]:
    """Return the data of the token viewer, or the reason why there is none."""
    if not sequences:
        return None, ()
    sources = [source for run in runs if (source := _source(run)) is not None]
    try:
        return viewer_data(sources, tokenizer=tokenizer, sequences=sequences), ()
    except StoreError as error:  # a damaged segment, or one that gc has just removed
        text = f"The token viewer is not shown: {error.cause}."
        return None, (Sentence(text=text, state="warning"),)


def _source(run: RunFacts) -> Source | None:
    """Return the rollouts and scores that a run read; None where its store has none of them yet."""
    if run.store is None or run.snapshot is None:
        return None
    rollouts, teachers = names_of(run.record)
    if rollouts and rollouts not in run.snapshot.names("rollout"):
        return None
    scored = {*run.snapshot.names("score")}
    return Source(
        name=run.name,
        store=run.store,
        snapshot=run.snapshot,
        rollouts=rollouts or None,
        teachers=tuple(each for each in teachers if each in scored),
        folders=(str(run.path),) if run.record else (),
    )


def _left_out(count: int) -> tuple[Sentence, ...]:
    if count <= 0:
        return ()
    which = "1 more run is" if count == 1 else f"{count} more runs are"
    text = f"{which} left out, because a page shows {MOST_RUNS}."
    return (Sentence(text=text, state="warning"),)


def _runs_only(target: str | Path) -> tuple[Path, ...]:
    if found := find_runs(target):
        return found
    raise ConfigError(
        f"--compare {target} is a store", hint="give the folder of a run or of an ablation"
    )
