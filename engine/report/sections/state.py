"""State of a run: going on, finished, or stopped before its end; and the pace at which it goes."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from logitcask.engine.report.runs import RunFacts
from logitcask.engine.store import Segment, Store
from logitcask.engine.training.run_dir.files import LOCK, METADATA, METRICS

RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"
RECENT = 10
"""Logged updates whose pace is taken for that of the next ones."""
COMMITS = 32
"""Commits of a role whose pace is shown as the recent one."""
_OWNER = re.compile(r"process ([0-9]{1,9}) on (.*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """The state of a run now."""

    name: str
    """RUNNING, FINISHED or STOPPED."""
    owner: str = ""
    """The process that trains, by the run's lock."""


def run_state(out: Path) -> RunState:
    """Return the state of the run in the folder `out`.

    The lock is read and never taken, for a writer that begins would be refused. A process of
    another host counts as alive while its lock is there.
    """
    if (out / METADATA).exists():
        return RunState(name=FINISHED)
    try:
        owner = (out / LOCK).read_bytes()[:200].decode("utf-8", "replace")
    except FileNotFoundError:
        return RunState(name=STOPPED)
    found = _OWNER.fullmatch(owner)
    if found and found[2] == os.uname().nodename and not _alive(int(found[1])):
        return RunState(name=STOPPED, owner=owner)
    return RunState(name=RUNNING, owner=owner)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """The updates of a run, and the time that is left at the pace of the newest ones."""

    done: int
    """Updates, by the newest logged line."""
    planned: int | None
    """None where the record does not tell."""
    seconds_per_update: float
    """By the run's own clock, which stands still while the run is interrupted."""
    positions_per_second: float
    over: int
    """Updates between the logged lines that the pace is taken from."""
    at: float
    """Time of the newest line, seconds since 1970."""

    @property
    def left_s(self) -> float | None:
        """Return the seconds from `at` to the last update; None where `planned` is."""
        return None if self.planned is None else self.seconds_per_update * self.left

    @property
    def left(self) -> int:
        return max(0, (self.planned or 0) - self.done)


def planned_updates(facts: RunFacts) -> int | None:
    """Return the updates of a run in all, None where its record does not tell."""
    if loop := facts.record.get("loop"):
        return int(loop["rounds"] * loop["updates_per_round"])
    return facts.planned


def run_pace(facts: RunFacts) -> Pace | None:
    """Return the pace over the last RECENT logged updates; None before the second one."""
    lines = facts.updates[-RECENT - 1 :]
    if len(lines) < 2:
        return None
    first, last = lines[0], lines[-1]
    updates, positions, seconds = (
        last[f"progress/{name}"] - first[f"progress/{name}"]
        for name in ("step", "positions", "seconds")
    )
    if updates < 1 or seconds <= 0:
        return None
    return Pace(
        done=int(last["progress/step"]),
        planned=planned_updates(facts),
        seconds_per_update=seconds / updates,
        positions_per_second=positions / seconds,
        over=int(updates),
        at=(facts.path / METRICS).stat().st_mtime,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Commits:
    """The commits of a role: times in seconds since 1970, and positions, in the log's order."""

    times: tuple[float, ...]
    positions: tuple[int, ...]

    @property
    def recent(self) -> tuple[float, float] | None:
        """Return positions per second of the last COMMITS commits, and their seconds.

        The first one's positions were made before its commit, so they do not count. None where no
        time passed between the commits, which the log records to the second.
        """
        times, positions = self.times[-COMMITS - 1 :], self.positions[-COMMITS:]
        took = max(times) - times[0] if times else 0.0
        counted = positions if len(times) > len(positions) else positions[1:]
        return (sum(counted) / took, took) if took > 0 else None


def commits_of(store: Store, segments: Sequence[Segment]) -> Commits:
    """Return the commits of segments by the times of their log records."""
    ordered = sorted(segments, key=lambda each: each.number)
    return Commits(
        times=tuple(
            datetime.fromisoformat(store.log.time(each.number)).timestamp() for each in ordered
        ),
        positions=tuple(each.rows for each in ordered),
    )


def utc(seconds: float, *, day_of: float | None = None) -> str:
    """Return a time in UTC, without its date where that is the one of `day_of`.

    Both are in seconds since 1970.
    """
    date, time = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S").split()
    return time if day_of is not None and utc(day_of).startswith(date) else f"{date} {time}"
