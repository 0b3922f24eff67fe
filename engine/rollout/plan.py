"""Sample prompts into rollout segments.

Work is planned in units, fixed ranges of consecutive prompts, before sampling starts. Each unit is
sampled, scored by the student itself (the store keeps its top-k), and committed. A resumed run does
the planned units that are not committed yet.
"""

import bisect
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from logitcask.engine.errors import IdentityError
from logitcask.engine.events import peak_memory
from logitcask.engine.rollout.unit import RolloutRequest, RolloutUnit, run_rollout_unit
from logitcask.engine.store import Segment, Snapshot
from logitcask.engine.store.format.provenance import PROMPT_RANGE
from logitcask.engine.store.format.schema import ROLLOUT
from logitcask.engine.types import (
    NO_DETAIL,
    STOP,
    Detail,
    Progress,
    no_progress,
    unit_report,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutReport:
    units_total: int
    units_done_before: int
    units_new: int
    positions: int
    """Response tokens of the new units; the fields below count new units too."""
    sequences: int
    seconds: float
    mean_length: float
    """Response tokens of a sequence; 0 where no unit was new."""
    stopped_share: float
    """Share of sequences that ended in a stop token."""
    positions_per_second: float
    """Of the whole command, loading of the model excluded."""
    peak_memory_bytes: Mapping[str, int]
    """As of `events.peak_memory`."""
    mean_reward: float | None = None
    """Mean over sequences; None without a grader or a new unit."""


def rollout(request: RolloutRequest, *, progress: Progress = no_progress) -> RolloutReport:
    """Sample and commit every planned unit that the store does not hold yet.

    Raises IdentityError where the name holds other prompts, sampling, students or units, and
    GraderError where the grader fails (that unit is not committed).
    """
    start_s = time.monotonic()
    missing = plan_rollouts(request, request.store.head())
    total, done_before = len(request.units), len(request.units) - len(missing)
    positions = sequences = stopped = 0
    rewarded = 0.0
    for done, (key, unit) in enumerate(missing.items()):
        report = unit_report(progress, "rollout", done_before + done, total, positions)
        report(NO_DETAIL)
        rolled = run_rollout_unit(request, key, unit, report)
        positions += rolled.positions
        sequences += len(rolled.finish)
        stopped += int((rolled.finish == STOP).sum())
        rewarded += 0.0 if rolled.reward is None else float(rolled.reward.sum(dtype=float))
    progress("rollout", total, total, Detail(positions))
    took_s = time.monotonic() - start_s
    return RolloutReport(
        units_total=total,
        units_done_before=done_before,
        units_new=len(missing),
        positions=positions,
        sequences=sequences,
        seconds=took_s,
        mean_length=positions / max(1, sequences),
        stopped_share=stopped / max(1, sequences),
        positions_per_second=positions / took_s,
        peak_memory_bytes=peak_memory(),
        mean_reward=rewarded / sequences if request.grader is not None and sequences else None,
    )


def plan_rollouts(request: RolloutRequest, snapshot: Snapshot) -> dict[str, RolloutUnit]:
    """Return unit_key -> unit missing in a snapshot, in order; raises as `rollout` does."""
    return RolloutPlanner(request).plan(snapshot)


class RolloutPlanner:
    """Plans the units of a request look after look.

    A plan is a function of its snapshot alone; the time that it takes depends on what has changed
    since the look before.
    """

    def __init__(self, request: RolloutRequest) -> None:
        self.request = request
        self._ranges = sorted((unit["first"], unit["count"]) for unit in request.units.values())
        """(first prompt, count) of the units, which do not overlap."""
        self._begin()

    def _begin(self) -> None:
        self._before: Snapshot | None = None
        self._missing = dict(self.request.units)
        self._same_student: dict[str, bool] = {}
        """Digest of a checked provenance -> whether this student made such rollouts."""

    def plan(self, snapshot: Snapshot) -> dict[str, RolloutUnit]:
        """Return unit_key -> unit missing in a snapshot, in order; raises as `rollout` does."""
        changes, units = snapshot.changes(self._before), self.request.units
        if changes is None:
            self._begin()
            changes = snapshot.changes(None)
            assert changes is not None, "since the empty store"
        # Before the state changes: the next look checks again what is rejected now.
        for segment in changes.added:
            self._check(segment)
        self._before = snapshot
        if freed := {s.unit_key for s in changes.deleted} & units.keys():
            missing = self._missing.keys() | freed
            self._missing = {key: unit for key, unit in units.items() if key in missing}
        for segment in changes.added:
            self._missing.pop(segment.unit_key, None)
        return dict(self._missing)

    def _check(self, segment: Segment) -> None:
        """Check before sampling that the name fits these rollouts; raises IdentityError."""
        name, planned = self.request.name, segment.unit_key in self.request.units
        if planned and segment.name != name:
            raise IdentityError(
                f"these rollouts are in the store already, under the name {segment.name!r}",
                hint=f"use that name instead of {name!r}, or another seed",
            )
        if segment.kind != ROLLOUT or segment.name != name:
            return
        digest = segment.provenance_sha256
        if digest not in self._same_student:
            self._same_student[digest] = _check_provenance(self.request, segment.provenance)
        if self._same_student[digest] and not planned:
            self._check_grid(segment)

    def _check_grid(self, segment: Segment) -> None:
        """Check that no planned unit overlaps a stored one of another size.

        Two unit sizes would sample the same prompts twice, with the same random numbers.
        """
        first, end = segment.first, segment.first + segment.counts["M"]
        index = bisect.bisect_left(self._ranges, (end, 0)) - 1
        if index < 0 or sum(self._ranges[index]) <= first:
            return
        start, count = self._ranges[index]
        raise IdentityError(
            f"rollouts {self.request.name!r} hold prompts {first}..{end - 1} as one unit, and the "
            f"plan has {start}..{start + count - 1}",
            hint="resume with the unit_prompts, first and count of the first call",
        )


class Unscored:
    """Counts the rollouts of a name that have no scores of any teacher, look after look."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin()

    def _begin(self) -> None:
        self._before: Snapshot | None = None
        self._rollouts: Counter[str] = Counter()
        self._scores: Counter[str] = Counter()
        """seg_id of rollouts -> number of their units, and of segments with their scores."""
        self._waiting: dict[str, int] = {}
        """seg_id of rollouts without scores -> number of their units."""

    def count(self, snapshot: Snapshot) -> int:
        """Return the number of such units in a snapshot."""
        changes = snapshot.changes(self._before)
        if changes is None:
            self._begin()
            changes = snapshot.changes(None)
            assert changes is not None, "since the empty store"
        self._before = snapshot
        for sign, segments in ((-1, changes.deleted), (1, changes.added)):
            for segment in segments:
                if segment.kind != ROLLOUT:
                    self._scores[segment.base] += sign
                elif segment.name == self._name:
                    self._rollouts[segment.seg_id] += sign
        for seg_id in {each.base or each.seg_id for part in changes for each in part}:
            self._waiting.pop(seg_id, None)
            if self._rollouts[seg_id] and not self._scores[seg_id]:
                self._waiting[seg_id] = self._rollouts[seg_id]
        return sum(self._waiting.values())


def next_range(
    snapshot: Snapshot, name: str, version: int, count: int, prompts: int
) -> tuple[int, int]:
    """Return (first, number) of the prompts to sample of a student version, of `prompts`.

    They are those that the first commit of this version records, so that all workers agree; else
    the `count` behind those of the version before, prompt 0 after the last.
    """
    found = snapshot.rollouts(name)
    found = found[: bisect.bisect_right(found, version, key=_version_of)]
    if not found:
        return 0, count
    latest = found[bisect.bisect_left(found, found[-1].version, key=_version_of) :]
    recorded = min(latest, key=lambda s: (s.number, s.index)).provenance.get(PROMPT_RANGE)
    if recorded is None:
        return 0, count
    if latest[0].version == version:
        return recorded["first"], recorded["count"]
    return (recorded["first"] + recorded["count"]) % prompts, count


def _version_of(segment: Segment) -> int:
    return segment.version


def _check_provenance(request: RolloutRequest, provenance: Mapping[str, Any]) -> bool:
    """Check rollouts of the same name by their provenance; return whether this student made them.

    Raises IdentityError.
    """
    name, model, ours = request.name, request.model, request.provenance["set"]
    theirs, student = provenance["set"], provenance["student"]
    if theirs["digest"] != ours["digest"]:
        raise IdentityError(
            f"rollouts {name!r} were made with {_difference(theirs, ours)} "
            f"(set {theirs['digest']}, this one is {ours['digest']})",
            hint="give these rollouts another name, or use the settings of that name",
        )
    if student["weights"] != model.digest and not request.versions:
        raise IdentityError(
            f"rollouts {name!r} are of student {student['weights']}, version "
            f"{student['version']}; this one is {model.digest}, version {model.version}",
            hint="give these rollouts another name; only distill mixes versions",
        )
    stops = student.get("stop_ids", list(model.stop_ids))
    if stops != list(model.stop_ids):
        raise IdentityError(
            f"rollouts {name!r} end at the stop ids {stops}, those of {model.name} are "
            f"{list(model.stop_ids)}",
            hint="give these rollouts another name, and another seed",
        )
    # A loop's first updates may keep the weights: each version draws its own numbers.
    return bool((student["weights"], student["version"]) == (model.digest, model.version))


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Return the first setting in which two sets differ, with both values."""
    for key in {**ours, **theirs}:
        if key not in ("digest", "prompts", "units") and theirs.get(key) != ours.get(key):
            return f"{key} = {theirs.get(key)!r}, not {ours.get(key)!r}"
    if theirs.get("prompts") != ours["prompts"]:
        return f"{theirs.get('prompts')} prompts, not {ours['prompts']}"
    return "other prompts, or by another loop"
