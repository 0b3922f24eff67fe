"""Progress of a verb on stderr: bars on a terminal, lines in a log file."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import rich_click as click

from logitcask.cli.output import visible
from logitcask.engine.events import report_steps
from logitcask.engine.quantities import duration, memory_size
from logitcask.engine.types import NO_DETAIL, Detail, Progress

FIRST_LINE_S, LINES_EVERY_S = 2.0, 30.0
REFRESH_EVERY_S = 0.5
"""Seconds between two refreshes, for a stage that reports nothing meanwhile."""
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
    """Yield a progress: bars on a terminal, else a line after 2 s and then every 30 s.

    unit: noun of the counts of rollout and score. Both forms show the running work unit, the
    positions per second since the stage began and its remaining time. Steps of the engine, such as
    reading weights, are shown while they take over 2 s.
    """
    nouns = {stage: unit if noun == "units" else noun for stage, noun in NOUNS.items()}
    if sys.stderr.isatty():
        with _bars(nouns) as bars, _refreshed(bars), report_steps(bars.report):
            yield bars.report
    else:
        lines = Lines(nouns, lambda line: click.echo(line, err=True))
        with _refreshed(lines), report_steps(lines.report):
            yield lines.report


_shown: ContextVar[Any] = ContextVar("shown", default=None)
"""The bars of the running verb; None where it has none."""


@contextmanager
def paused() -> Iterator[None]:
    """Take the bars from the terminal in the body, for a question."""
    bars = _shown.get()
    if bars is not None:
        bars.stop()
    try:
        yield
    finally:
        if bars is not None:
            bars.start()


@contextmanager
def _refreshed(shown: "Lines | Bars") -> Iterator[None]:
    """Call `refresh` at intervals, from a thread: a stage may report nothing for minutes."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(REFRESH_EVERY_S):
            shown.refresh()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def count(done: int, total: int, unit: str) -> str:
    """Return `3/12 units`, `2.1 GiB/16 GiB`, `3 prompts` where the total is 0, or nothing."""
    shown = memory_size if unit == "bytes" else "{:,}".format
    noun = "" if unit == "bytes" or not unit else f" {unit}"
    if total:
        return f"{shown(done)}/{shown(total)}{noun}"
    return f"{shown(done)}{noun}" if done else ""


@dataclass
class Stage:
    """The newest report of a stage."""

    pace: Pace
    due_s: float
    """Time of the next line."""
    done: int = 0
    total: int = 0
    detail: Detail = NO_DETAIL

    @property
    def ended(self) -> bool:
        return self.detail.ended if self.detail.brief else self.done >= self.total

    def text(self, noun: str, now_s: float) -> str:
        """Return the counts, the rate and the remaining time, or the seconds so far."""
        text = self.pace.text(self.done, self.total, self.detail, now_s)
        counts = count(self.done, self.total, noun)
        if not text and not self.ended and now_s > self.pace.begun_s:
            text = f"{duration(now_s - self.pace.begun_s)} so far"
        return ", ".join(filter(None, (counts, text)))


class Lines:
    """Print a line of a stage at intervals, and one at its end; none at the end of a step."""

    def __init__(
        self,
        nouns: dict[str, str],
        print_line: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nouns, self._print_line, self._clock = nouns, print_line, clock
        self._stages: dict[str, Stage] = {}
        """The one that reported last is the last."""
        self._lock = threading.Lock()

    def report(self, stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        """Take the state of a stage, as `Progress`."""
        with self._lock:
            now_s = self._clock()
            found = self._stages.pop(stage, None)
            if found is None:
                pace = Pace.begin(done, detail, now_s)
                found = Stage(pace=pace, due_s=now_s + FIRST_LINE_S)
            found.done, found.total, found.detail = done, total, detail
            if not (detail.brief and found.ended):
                self._stages[stage] = found
                self._print(stage, found, now_s, now=found.ended)

    def refresh(self) -> None:
        """Print a line of the running stage if one is due: that which reported last."""
        with self._lock:
            running = [(name, each) for name, each in self._stages.items() if not each.ended]
            if running:
                self._print(*running[-1], self._clock(), now=False)

    def _print(self, name: str, stage: Stage, now_s: float, *, now: bool) -> None:
        due = now or now_s >= stage.due_s
        if stage.detail.brief and not due:  # some report a thousand times a second
            return
        text = stage.text(stage.detail.unit or self._nouns.get(name, ""), now_s)
        if due:
            stage.due_s = now_s + LINES_EVERY_S
            self._print_line(visible(f"{name}: {text}" if text else name))


@dataclass
class Bars:
    """Bars on a terminal; the bar of a step appears after 2 s, and goes when the step ends."""

    nouns: dict[str, str]
    shown: Any
    """rich.progress.Progress."""
    clock: Callable[[], float] = time.monotonic
    stages: dict[str, tuple[Any, Stage]] = field(default_factory=dict)
    """Stage -> (its task, its state); due_s is the time at which the bar of a step appears."""
    lock: Any = field(default_factory=threading.Lock)

    def report(self, stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        """Take the state of a stage, as `Progress`."""
        with self.lock:
            now_s = self.clock()
            if stage not in self.stages:
                begun = Stage(pace=Pace.begin(done, detail, now_s), due_s=now_s + FIRST_LINE_S)
                name = " ".join(filter(None, (visible(stage), self.nouns.get(stage))))
                task = self.shown.add_task(
                    name, total=None, visible=not detail.brief, text="", count=""
                )
                self.stages[stage] = task, begun
            task, found = self.stages[stage]
            found.done, found.total, found.detail = done, total, detail
            if detail.brief and found.ended:
                self.shown.remove_task(task)
                del self.stages[stage]
            elif not detail.brief:  # some steps report a thousand times a second
                self._update(task, found, now_s)

    def refresh(self) -> None:
        """Show the steps that run for a while."""
        with self.lock:
            now_s = self.clock()
            for task, stage in self.stages.values():
                if stage.detail.brief and now_s >= stage.due_s:
                    self._update(task, stage, now_s)

    def _update(self, task: Any, stage: Stage, now_s: float) -> None:
        done, total, detail = stage.done, stage.total, stage.detail
        self.shown.update(
            task,
            visible=True,
            completed=done + detail.share,
            total=total or None,
            text=visible(stage.pace.text(done, total, detail, now_s)),
            count=count(done, total, detail.unit),
        )


@contextmanager
def _bars(nouns: dict[str, str]) -> Iterator[Bars]:
    # rich is slow to import, and only a terminal needs it.
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    bars = RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=Console(stderr=True),
    )
    token = _shown.set(bars)
    try:
        with bars:
            yield Bars(nouns, bars)
    finally:
        _shown.reset(token)
