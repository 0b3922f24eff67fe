"""The timeline of a loop: what each of its processes does, and when.

RUN.OUT/timeline/<role>-<name>.jsonl belongs to one process, which appends a line when it begins a
span and the same line with its end. Nothing is locked, and a span without an end is one in which
the process died.
"""

import json
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from logitcask.engine.config.runner import TIMELINE

MAX_BYTES = 64 * 2**20
"""Of a file that is read: some 300,000 spans."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A piece of work, or of waiting, of one process."""

    role: str
    process: str
    """Number among the processes of the role, or the host and pid of one that was started alone."""
    kind: str
    """unit, wait or load of rollout and score; update, wait, measure or publish of train."""
    round: int | None
    version: int | None
    """Round of the work, and version of the student in it; None where there is none."""
    host: str
    pid: int
    start: float
    end: float | None
    """Seconds since 1970, by the clock of the host; no end = the process died."""


def timeline_file(out: Path, role: str, name: str) -> Path:
    """Return the file of one process; out: folder of the run."""
    return out / TIMELINE / f"{role}-{name}.jsonl"


@contextmanager
def span(
    file: Path | None, kind: str, *, round: int | None = None, version: int | None = None
) -> Iterator[None]:
    """Append the begin and the end of the body to a file of the timeline; None = to none.

    A body that raises has an end too.
    """
    if file is None:
        yield
        return
    role, _, process = file.stem.partition("-")
    begun = Span(
        role=role,
        process=process,
        kind=kind,
        round=round,
        version=version,
        host=socket.gethostname(),
        pid=os.getpid(),
        start=time.time(),
        end=None,
    )
    _append(file, begun)
    try:
        yield
    finally:
        _append(file, replace(begun, end=time.time()))


def _append(file: Path, line: Span) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as opened:
        # A kill may have cut the line of an earlier process.
        cut = opened.tell() and not _ends_a_line(file)
        opened.write(b"\n" * bool(cut) + json.dumps(asdict(line)).encode() + b"\n")


def _ends_a_line(file: Path) -> bool:
    with file.open("rb") as opened:
        opened.seek(-1, os.SEEK_END)
        return opened.read() == b"\n"


def read_timeline(out: Path) -> list[Span]:
    """Return the spans of all processes of a run by their start; lines that were cut are left out.

    out: folder of the run. Of a file above MAX_BYTES its end counts.
    """
    found: dict[tuple[str, int, float, str], Span] = {}
    for file in sorted((out / TIMELINE).glob("*.jsonl")):
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - MAX_BYTES))
            lines = opened.read(MAX_BYTES).splitlines()
        for each in filter(None, map(_parsed, lines)):
            found[file.stem, each.pid, each.start, each.kind] = each
    return sorted(found.values(), key=lambda each: each.start)


def _parsed(line: bytes) -> Span | None:
    """Return the span of a line; None if the line is no span."""
    try:
        each = Span(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    texts = (each.role, each.process, each.kind, each.host)
    numbers = (each.pid, each.round or 0, each.version or 0)
    times = (each.start, each.start if each.end is None else each.end)
    right = (
        all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in numbers)
        and all(type(at) in (int, float) and 0 <= at < math.inf for at in times)
        and times[0] <= times[1]
    )
    return each if right else None
