"""Evaluation during a training: its versions as they appear, each once.

OUT/evaluations.jsonl   a line for each evaluated version: version, progress/step and eval/ entries;
                        eval/teacher_accuracy where that of the teacher is known
OUT/.evaluator/         of the process that evaluates: a lock, and the versions that it wants

A trainer never waits for an evaluation, and removes versions that no sampler needs. It keeps those
that an evaluator wants, as long as that process shows life.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from logitcask.engine.errors import IntegrityError
from logitcask.engine.events import EventHandler
from logitcask.engine.models.digests import replace_text
from logitcask.engine.models.identity import read_metadata
from logitcask.engine.training.run_dir.files import (
    EVALUATIONS,
    EVALUATOR,
    VERSIONS,
    locked,
    writing,
)

DUE = "due"
LEASE_S = 600.0
"""Seconds after the last sign of life for which the due versions are kept."""


def is_due(out: Path, number: int) -> bool:
    """Return whether a living evaluator is still to evaluate this version of the run in `out`."""
    file = out / EVALUATOR / DUE
    try:
        every, start = map(int, file.read_text().split())
        alive = time.time() - file.stat().st_mtime < LEASE_S
    except (OSError, ValueError):  # none, or one that is just ending
        return False
    due = alive and every > 0 and (number - start) % every == 0
    return due and all(line["version"] != number for line in read_evaluations(out))


def published(out: Path) -> dict[int, Path]:
    """Return number -> folder of the whole versions of a run, its final student included."""
    found: dict[int, Path] = {}
    for folder in (out, *(out / VERSIONS).glob("v*")):
        try:
            metadata = read_metadata(folder)
        except FileNotFoundError:  # removed in between
            continue
        if metadata is not None:
            # The final student comes first, in the type in which it was saved.
            found.setdefault(int(metadata["version"]), folder)
    return found


def read_evaluations(out: Path) -> list[dict[str, Any]]:
    """Return the lines of evaluations.jsonl, without a last one that a kill cut off."""
    file = out / EVALUATIONS
    text = file.read_text(errors="replace") if file.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        found = [json.loads(line) for line in lines]
        if any(type(line["version"]) is not int for line in found):
            raise ValueError("a line has no version")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{file} is damaged: {error}", hint="remove the wrong line, or the file"
        ) from error
    return found


@contextmanager
def evaluating(
    out: Path, every: int, start: int, on_event: EventHandler
) -> Iterator[tuple[Callable[[], None], Callable[[dict[str, Any]], None]]]:
    """Hold the evaluation of a run, and yield (a sign of life, an append of a line).

    every, start: version start + i x every is kept until it has a line; 0 = none is kept. Raises
    ConfigError where another process evaluates the run.
    """
    file, due = out / EVALUATIONS, out / EVALUATOR / DUE

    def append(line: dict[str, Any]) -> None:
        with writing(file), file.open("ab", buffering=0) as stream:
            stream.write((json.dumps(line, allow_nan=False) + "\n").encode())

    with locked(out / EVALUATOR, on_event):
        lines = read_evaluations(out)
        with writing(out):
            replace_text(file, "".join(json.dumps(line) + "\n" for line in lines))
            replace_text(due, f"{every} {start}\n")
        try:
            yield lambda: os.utime(due), append
        finally:
            due.unlink(missing_ok=True)
