"""Progress of a verb on stderr: bars on a terminal, lines in a log file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import rich_click as click

from logitcask.engine.types import NO_DETAIL, Detail, Progress

FIRST_LINE_S, LINES_EVERY_S = 5.0, 30.0
NOUNS = {
    "rollout": "units",
    "score": "units",
    "train": "updates",
    "evaluation": "sequences",
    "held out": "packs",
    "probe": "packs",
    "estimate": "steps",
}
"""Stage -> noun of its counts."""


@contextmanager
def progress_bar(unit: str = "units") -> Iterator[Progress]:
    """Yield a progress: bars on a terminal, else a line after 5 s and then every 30 s.

    unit: noun of the counts of rollout and score. Both forms show the running work unit, the
    positions per second since the stage began and its remaining time.
    """
    nouns = {stage: unit if noun == "units" else noun for stage, noun in NOUNS.items()}
    if sys.stderr.isatty():
        with _bars(nouns) as report:
            yield report
    else:
        yield plain_lines(nouns, lambda line: click.echo(line, err=True))


@dataclass
class Pace:
    """Rate and remaining time of a stage since its first report."""

    begun_s: float
    first: float
    """Units at the first report."""
    seen: int
    """Positions of the newest report."""
    positions: int = 0
    """Positions since the first report."""
    newest: float = 0.0
    """Units at the newest report."""

    @classmethod
    def begin(cls, done: int, detail: Detail, now_s: float) -> "Pace":
        at = done + detail.share
        return cls(begun_s=now_s, first=at, seen=detail.positions, newest=at)

    def text(self, done: int, total: int, detail: Detail, now_s: float) -> str:
        """Return the running work unit, the rate and the remaining time, those that there are."""
        at = done + detail.share
        if at < self.newest and not done:  # the stage begins again, such as a later evaluation
            self.begun_s, self.first, self.positions = now_s, at, 0
        # The rounds of a loop count their positions from 0.
        self.positions += detail.positions - (self.seen if detail.positions >= self.seen else 0)
        self.seen, self.newest = detail.positions, at
        took_s, parts = now_s - self.begun_s, [detail.part] if detail.part else []
        if took_s > 0 and self.positions:
            parts.append(f"{_rounded(self.positions / took_s)} positions/s")
        if took_s > 0 and self.first < at < total:
            parts.append(f"{duration((total - at) * took_s / (at - self.first))} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return seconds as `40 s`, `4 min` or `2.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def plain_lines(
    nouns: dict[str, str],
    print_line: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Return a progress that prints a line of a stage at intervals, and one at its end."""
    paces: dict[str, Pace] = {}
    due_s: dict[str, float] = {}

    def report(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        now_s = clock()
        if stage not in paces:
            paces[stage] = Pace.begin(done, detail, now_s)
            due_s[stage] = now_s + FIRST_LINE_S
        text = paces[stage].text(done, total, detail, now_s)
        if done >= total or now_s >= due_s[stage]:
            due_s[stage] = now_s + LINES_EVERY_S
            noun = f" {nouns[stage]}" if stage in nouns else ""
            print_line(f"{stage}: {done:,}/{total:,}{noun}{text and f', {text}'}")

    return report


@contextmanager
def _bars(nouns: dict[str, str]) -> Iterator[Progress]:
    # rich is slow to import, and only a terminal needs it.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    bars = RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=Console(stderr=True),
    )
    tasks: dict[str, Any] = {}
    paces: dict[str, Pace] = {}

    def report(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        now_s = time.monotonic()
        if stage not in tasks:
            paces[stage] = Pace.begin(done, detail, now_s)
            shown = " ".join(filter(None, (stage, nouns.get(stage))))
            tasks[stage] = bars.add_task(shown, total=total, text="")
        text = paces[stage].text(done, total, detail, now_s)
        bars.update(tasks[stage], completed=done + detail.share, total=total, text=text)

    with bars:
        yield report
