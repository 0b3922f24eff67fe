"""Sample prompts into rollout segments.

Work is planned in units, fixed ranges of consecutive prompts, before sampling starts. Each unit is
sampled, scored by the student itself (the store keeps its top-k), and committed. A resumed run does
the planned units that are not committed yet.
"""

import bisect
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from logitcask.engine.errors import IdentityError
from logitcask.engine.events import peak_memory
from logitcask.engine.rollout.unit import RolloutRequest, RolloutUnit, run_rollout_unit
from logitcask.engine.store import Segment, Snapshot
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
        self._request = request
        self._ranges = sorted((unit["first"], unit["count"]) for unit in request.units.values())
        """(first prompt, count) of the units, which do not overlap."""
        self._begin()

    def _begin(self) -> None:
        self._before: Snapshot | None = None
        self._missing = dict(self._request.units)
        self._same_student: dict[str, bool] = {}
        """Digest of a checked provenance -> whether this student made such rollouts."""

    def plan(self, snapshot: Snapshot) -> dict[str, RolloutUnit]:
        """Return unit_key -> unit missing in a snapshot, in order; raises as `rollout` does."""
        changes, units = snapshot.changes(self._before), self._request.units
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
        name, planned = self._request.name, segment.unit_key in self._request.units
        if planned and segment.name != name:
            raise IdentityError(
                f"these rollouts are in the store already, under the name {segment.name!r}",
                hint=f"use that name instead of {name!r}, or another seed",
            )
        if segment.kind != ROLLOUT or segment.name != name:
            return
        digest = segment.provenance_sha256
        if digest not in self._same_student:
            self._same_student[digest] = _check_provenance(self._request, segment.provenance)
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
            f"rollouts {self._request.name!r} hold prompts {first}..{end - 1} as one unit, and the "
            f"plan has {start}..{start + count - 1}",
            hint="resume with the unit_prompts, first and count of the first call",
        )


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
