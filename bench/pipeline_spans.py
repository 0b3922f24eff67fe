"""Arithmetic on the timeline of a loop: at work, waiting, at once, and the bytes of its queue.

All times are seconds. The wall time of a loop begins with its first span and ends with its last, so
that the start of processes and the loading of models are not in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from logitcask.engine.workers.timeline import Span

ROLES = ("rollout", "score", "train")
WORK = {"rollout": "unit", "score": "unit", "train": "update"}
"""Role -> kind of its spans that are work."""


@dataclass(frozen=True)
class Work:
    """A piece of work, in seconds since the loop began."""

    role: str
    process: str
    round: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


def work_of(spans: Iterable[Span]) -> list[Work]:
    """Return the work of a timeline by its start, as seconds since the first of it.

    Spans in which a process died are left out, since their work is done again.
    """
    found = [each for each in spans if each.end is not None and each.kind == WORK.get(each.role)]
    begun = min(each.start for each in found)
    return sorted(
        (
            Work(each.role, each.process, each.round or 0, each.start - begun, each.end - begun)
            for each in found
            if each.end is not None
        ),
        key=lambda each: each.start,
    )


def wall(done: Sequence[Work]) -> float:
    """Return the seconds from the first begin to the last end."""
    return max(each.end for each in done) - min(each.start for each in done)


def total(done: Iterable[Work], role: str) -> float:
    """Return the seconds of work of a role, over all of its processes."""
    return sum(each.seconds for each in done if each.role == role)


def floor(done: Sequence[Work]) -> float:
    """Return the wall time of a loop that never waits: its slowest stage, and the fill.

    The fill: the first round of the stages before it, and the last round of those after it.
    """
    slowest = max(ROLES, key=lambda role: stage(done, role))
    first = [each for each in done if each.round == 0]
    last_round = max(each.round for each in done)
    last = [each for each in done if each.round == last_round]
    before = ROLES[: ROLES.index(slowest)]
    after = ROLES[ROLES.index(slowest) + 1 :]
    return (
        stage(done, slowest)
        + sum(total(first, role) for role in before)
        + sum(total(last, role) for role in after)
    )


def stage(done: Sequence[Work], role: str) -> float:
    """Return the seconds of work of a role, divided among its processes."""
    processes = {each.process for each in done if each.role == role}
    return total(done, role) / max(1, len(processes))


def at_once(done: Sequence[Work]) -> dict[int, float]:
    """Return {number of roles at work: share of the wall time}."""
    edges = sorted({0.0, *(each.start for each in done), *(each.end for each in done)})
    shares: dict[int, float] = dict.fromkeys(range(len(ROLES) + 1), 0.0)
    for low, high in pairwise(edges):
        busy = {each.role for each in done if each.start <= low and high <= each.end}
        shares[len(busy)] += (high - low) / edges[-1]
    return shares


def waited(done: Sequence[Work], role: str) -> float:
    """Return the seconds between the first and the last work of a role in which it did none.

    Of several processes the mean.
    """
    own: dict[str, list[Work]] = {}
    for each in done:
        if each.role == role:
            own.setdefault(each.process, []).append(each)
    return sum(wall(each) - total(each, role) for each in own.values()) / max(1, len(own))


def queue(done: Sequence[Work], unit_bytes: Mapping[int, float]) -> list[tuple[float, float]]:
    """Return (seconds, bytes of rollouts without scores) at each commit.

    unit_bytes: round -> mean bytes of its rollout segments.
    """
    changes = sorted(
        (each.end, unit_bytes[each.round] * (1 if each.role == "rollout" else -1))
        for each in done
        if each.role in ("rollout", "score")
    )
    held, found = 0.0, []
    for at, change in changes:
        held += change
        found.append((at, held))
    return found


def summary(done: Sequence[Work], positions: int) -> dict[str, Any]:
    """Return the figures of a loop. positions: response positions that each stage passed."""
    shares = at_once(done)
    long = wall(done)
    return {
        "wall_s": long,
        "floor_s": floor(done),
        "sum_s": sum(total(done, role) for role in ROLES),
        "stage_s": {role: stage(done, role) for role in ROLES},
        "positions": positions,
        "positions_per_s": {role: positions / total(done, role) for role in ROLES},
        "use": {role: stage(done, role) / long for role in ROLES},
        "waited_s": {role: waited(done, role) for role in ROLES},
        "at_once": {str(count): share for count, share in shares.items()},
    }


def picture(spans: Iterable[Span]) -> list[list[Any]]:
    """Return the spans of a picture: role, process, kind, round, start, end.

    Seconds since the first work; what ended before it is left out, and what never ended.
    """
    found = list(spans)
    begun = min(each.start for each in found if each.kind == WORK.get(each.role))
    return [
        [
            *(each.role, each.process, each.kind, each.round),
            *(round(max(0.0, each.start - begun), 2), round(each.end - begun, 2)),
        ]
        for each in found
        if each.end is not None and each.end > begun
    ]
