"""Plan the scores of rollouts, look after look.

A plan is a function of its snapshot alone. A planner keeps the one before, and plans only the
rollouts that are new, were deleted, or got or lost scores since then.
"""

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from logitcask.engine.errors import ConfigError, IdentityError, IncompleteError, StoreError
from logitcask.engine.score.unit import ScoreRequest, ScoreUnit, unit_key
from logitcask.engine.store import ScoreSegments, Segment, Snapshot
from logitcask.engine.store.format.schema import ROLLOUT, specs
from logitcask.engine.store.log.snapshot import are_partial, place
from logitcask.engine.teachers.checks import check_identity
from logitcask.engine.types import ALL_POSITIONS, MC_IDS, ScoreParams


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorePlan:
    """Units of a scoring at a snapshot."""

    total: int
    missing: Mapping[str, ScoreUnit]
    """unit_key -> missing unit, by student version, then by first prompt."""
    provenance: Mapping[str, Any]
    notes: tuple[str, ...]
    """Warnings for the user."""


def plan_scores(request: ScoreRequest, snapshot: Snapshot, *, growing: bool = False) -> ScorePlan:
    """Plan and check the units to score at a snapshot; raises as `score` does.

    growing: leave rollouts without scores of the model in `extra_ids` for a later plan.
    """
    return ScorePlanner(request, growing=growing).plan(snapshot)


class ScorePlanner:
    """The plan of a request at the last snapshot, which the next look changes."""

    def __init__(self, request: ScoreRequest, *, growing: bool = False) -> None:
        """Begin before the first look; growing: as of `plan_scores`."""
        self._request, self._growing = request, growing
        self._provenance = request.provenance()
        self._drawn = request.params.entry_kind == "sampled"
        self._extra = None if request.extra_ids == MC_IDS else request.extra_ids
        """Name of the model whose top ids are the extra ids."""
        self._identity_notes: dict[str, list[str]] = {}
        """Digest of a provenance of rollouts, checked -> notes on its student."""
        self._dtypes: dict[str, str] = {}
        self._recorded: dict[str, ScoreParams] = {}
        """Digest of a provenance of this teacher's scores -> their dtype, their request."""
        self._begin()

    def _begin(self) -> None:
        self._before: Snapshot | None = None
        self._names: dict[str, str] = {}
        """unit_key -> name, of all visible segments."""
        self._rollouts: dict[str, tuple[Segment, ...]] = {}
        """seg_id -> the rollouts of the name with this content."""
        names = (self._request.teacher_name, self._extra)
        self._scores: dict[str, dict[str, ScoreSegments]] = {n: {} for n in names if n is not None}
        """Teacher -> seg_id of rollouts -> its scores of them."""
        self._students: Counter[str] = Counter()
        """Digest of a provenance -> number of rollouts of the name with it."""
        self._stored: Counter[str] = Counter()
        self._profiles: Counter[str] = Counter()
        """Digest of a provenance, and profile -> number of this teacher's scores with it."""
        self._base_of: dict[str, str] = {}
        """unit_key of each planned unit -> seg_id of its rollouts."""
        self._keys: dict[str, list[str]] = {}
        """seg_id of rollouts -> unit_keys of their units."""
        self._missing: dict[str, ScoreUnit] = {}
        self._places: list[tuple[int, int, int, int, str]] = []
        """Place of each missing unit, in order, and its key."""

    def plan(self, snapshot: Snapshot) -> ScorePlan:
        """Plan and check the units to score at a snapshot; raises as `score` does."""
        try:
            return self._plan(snapshot)
        except BaseException:
            # The next look rejects the same again.
            self._begin()
            raise

    def _plan(self, snapshot: Snapshot) -> ScorePlan:
        request, touched = self._request, self._update(snapshot)
        if not self._rollouts:
            known = ", ".join(snapshot.names("rollout")) or "none"
            raise IncompleteError(
                f"{request.store.url} holds no rollouts named {request.rollouts_name!r}; "
                f"it has: {known}",
                hint="run `logitcask rollout` first, or use one of these names",
            )
        if self._extra is not None and not self._scores[self._extra] and not self._growing:
            raise IncompleteError(
                f"the store holds no scores of {self._extra!r}; it has: "
                f"{', '.join(snapshot.names('score'))}",
                hint="score with that model first, or name one of these",
            )
        request.store.check_name("score", request.teacher_name, self._provenance, drawn=self._drawn)
        self._replan(touched)
        return ScorePlan(
            total=len(self._base_of),
            missing={each[-1]: self._missing[each[-1]] for each in self._places},
            provenance=self._provenance,
            notes=tuple(dict.fromkeys([*request.notes, *self._notes()])),
        )

    def _update(self, snapshot: Snapshot) -> dict[str, None]:
        """Take over the changes up to a snapshot; return seg_ids of rollouts to plan again."""
        changes = snapshot.changes(self._before)
        if changes is None:
            self._begin()
            changes = snapshot.changes(None)
            assert changes is not None, "since the empty store"
        touched = dict.fromkeys(self._touch(segment, -1) for segment in changes.deleted)
        touched |= dict.fromkeys(self._touch(segment, 1) for segment in changes.added)
        # A planned unit may be committed under another name.
        for segment in (*changes.deleted, *changes.added):
            touched[self._base_of.get(segment.unit_key, "")] = None
        touched.pop("", None)
        self._before = snapshot
        return touched

    def _touch(self, segment: Segment, sign: int) -> str:
        """Take over a segment that appeared, sign = 1, or disappeared, sign = -1.

        Return the seg_id of the rollouts whose plan depends on it; "" = of none.
        """
        request, digest = self._request, segment.provenance_sha256
        if sign > 0:
            self._names[segment.unit_key] = segment.name
        else:
            del self._names[segment.unit_key]
        if segment.kind == ROLLOUT and segment.name == request.rollouts_name:
            if request.only is not None and not request.only(segment):
                return ""
            self._check_rollouts(segment)
            _count(self._students, digest, sign)
            _put(self._rollouts, segment.seg_id, segment, sign)
            return segment.seg_id
        scores = None if segment.kind == ROLLOUT else self._scores.get(segment.name)
        if scores is None:
            return ""
        if segment.name == request.teacher_name:
            if digest not in self._dtypes:
                self._dtypes[digest] = str(segment.provenance["backend"].get("dtype"))
            _count(self._stored, digest, sign)
            if not segment.extends:
                _count(self._profiles, segment.profile, sign)
        _put(scores, segment.base, segment, sign)
        return segment.base

    def _check_rollouts(self, segment: Segment) -> None:
        """Check the identity of the student, and that the rollouts have draws if ids are drawn."""
        request, digest = self._request, segment.provenance_sha256
        if digest not in self._identity_notes:
            student = segment.provenance["student"]
            self._identity_notes[digest] = check_identity(
                student, request.model, request.shared, request.alignment
            )
        if request.extra_ids == MC_IDS and "mc_counts" not in specs(segment.layout):
            raise IncompleteError(
                f"rollouts {request.rollouts_name!r} hold no ids that the student drew",
                hint="sample with `logitcask rollout --mc-draws M`, under another name",
            )

    def _replan(self, touched: Iterable[str]) -> None:
        """Plan the units of these rollouts again."""
        for base in touched:
            for key in self._keys.pop(base, ()):
                self._base_of.pop(key, None)
                if (unit := self._missing.pop(key, None)) is not None:
                    del self._places[bisect.bisect_left(self._places, _place(key, unit))]
        new = {key: unit for base in touched for key, unit in self._plan_base(base).items()}
        if new:
            self._missing |= new
            self._places += itertools.starmap(_place, new.items())
            self._places.sort()

    def _plan_base(self, base: str) -> dict[str, ScoreUnit]:
        """Plan the units of the rollouts with a seg_id; return the missing ones."""
        request, name, at = self._request, self._request.teacher_name, None
        there = self._scores[name].get(base)
        if self._extra is not None:
            at = self._scores[self._extra].get(base)
            if at is not None and are_partial(at):
                raise ConfigError(
                    f"extra_ids = {request.extra_ids}: these scores are of some positions only",
                    hint="score the other positions with that model first: --positions all",
                )
        segments = self._rollouts.get(base, ())
        if self._extra is not None and at is None:
            if self._growing or not segments:
                return {}
            raise IncompleteError(
                f"rollout segment {base} has no scores of the model that gives the extra ids",
                hint="let that model score all of these rollouts first",
            )
        at_key = [each.key_id for each in at or ()]
        if request.extra_ids == MC_IDS:
            at_key = [MC_IDS]
        planned = {
            unit_key(segment, request.model, request.params, self._provenance, at_key): segment
            for segment in sorted(segments, key=place)
        }
        self._keys[base] = list(planned)
        self._base_of |= dict.fromkeys(planned, base)
        missing = {
            key: ScoreUnit(segment=segment, score_segments=there, at_scores=at)
            for key, segment in planned.items()
            if not self._is_done(key)
        }
        if missing and there is not None:
            if self._drawn:
                raise IdentityError(
                    f"{name!r} holds draws of these rollouts of another number or seed",
                    hint="use another name for these: drawn ids cannot be extended",
                )
            if request.extra_ids is None and self._cover(there):
                return {}
            if request.alignment is not None:
                raise IdentityError(
                    f"{name!r} has scores over spans of these rollouts, of fewer ids or from "
                    "another rendering",
                    hint="score under another name: scores over spans are not extended",
                )
            self._check_extended(there)
        return missing

    def _is_done(self, key: str) -> bool:
        """Return whether the scores of a unit are stored; under another name they are rejected."""
        name = self._names.get(key)
        if name not in (None, self._request.teacher_name):
            raise IdentityError(
                f"this teacher's scores are in the store already, under the name {name!r}",
                hint=f"use that name instead of {self._request.teacher_name!r}; a different model "
                "served under the same path needs its own --revision",
            )
        return name is not None

    def _cover(self, stored_in: ScoreSegments) -> bool:
        """Return True where these segments hold at least the entries of this request."""
        params = self._request.params
        if are_partial(stored_in):
            return False
        stored = [self._request_of(each) for each in stored_in]
        if any(each.entry_kind == "sampled" for each in (params, *stored)):
            return False

        def at_least(each: ScoreParams) -> bool:
            ours, theirs = (
                (1.0 if r.entry_kind == "topk" else r.top_p, r.k_min, r.k_max)
                for r in (params, each)
            )
            return all(a <= b for a, b in zip(ours, theirs, strict=True))

        at_student = any(each.at_student for each in stored) or not params.at_student
        return any(map(at_least, stored)) and at_student

    def _check_extended(self, stored: ScoreSegments) -> None:
        """Raise ConfigError unless the request adds positions alone, or ids at all positions."""
        request, name = self._request, self._request.teacher_name
        if are_partial(stored):
            recorded = {self._request_of(each) for each in stored}
            if request.extra_ids is not None or recorded != {request.params}:
                raise ConfigError(
                    f"{name!r} has scores of some positions, made with "
                    f"{', '.join(map(str, recorded))}",
                    hint="add the other positions first, with the flags of these scores and "
                    "--positions all; or score under another name",
                )
        elif request.positions != ALL_POSITIONS:
            raise ConfigError(
                f"positions = {request.positions}: {name!r} has scores of all, of fewer ids",
                hint="leave --positions out, or score under another name",
            )
        elif "at_ids" not in request.scorer.capabilities:
            raise ConfigError(
                f"scores of {name!r} are stored for a smaller request, and this teacher cannot "
                "score chosen ids, so they cannot be extended",
                hint="score under another name, or repeat the earlier request",
            )

    def _request_of(self, segment: Segment) -> ScoreParams:
        """Return the recorded request of scores. Raises StoreError where it is not one of ours."""
        found = self._recorded.get(segment.provenance_sha256)
        if found is None:
            try:
                request = segment.provenance["request"]
                found = ScoreParams.from_record({key: request[key] for key in request})
            except (TypeError, ValueError) as error:
                raise StoreError(
                    f"segment {segment.seg_id} of score {segment.name!r} records another request "
                    f"than ours ({error})",
                    hint="score under another name",
                ) from error
            self._recorded[segment.provenance_sha256] = found
        return found

    def _notes(self) -> list[str]:
        """Return the warnings about what is stored."""
        request, name = self._request, self._request.teacher_name
        notes = sorted({note for each in self._students for note in self._identity_notes[each]})
        ours = str(request.scorer.describe().get("dtype"))
        notes += [
            f"scores of {name!r} in {other} exist already, and this run computes in {ours}"
            for other in sorted({self._dtypes[each] for each in self._stored} - {ours})
        ]
        if others := sorted(self._profiles.keys() - {request.profile}):
            notes.append(
                f"scores of {name!r} are stored in profile {', '.join(others)}; "
                f"{request.profile} is used for new ones"
            )
        return notes


def _count(counts: Counter[str], key: str, sign: int) -> None:
    """Count an appearance, 1, or a disappearance, -1; what is not there has no count."""
    counts[key] += sign
    if not counts[key]:
        del counts[key]


def _put(
    groups: MutableMapping[str, tuple[Segment, ...]], key: str, segment: Segment, sign: int
) -> None:
    """Put a segment into a group, 1, or take it out, -1; an empty group is not kept."""
    group = groups.pop(key, ())
    group = tuple(each for each in group if each.unit_key != segment.unit_key)
    if sign > 0:
        group = (*group, segment)
    if group:
        groups[key] = group


def _place(key: str, unit: ScoreUnit) -> tuple[int, int, int, int, str]:
    """Return the place of a unit: by student version, first prompt, place in the log."""
    segment = unit.segment
    return (*place(segment), segment.number, segment.index, key)
