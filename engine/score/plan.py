"""Score rollout segments: at least one score segment for each.

A score unit is one rollout segment under one teacher and one request. The teacher must have the
student's tokenizer: it reads ids as sampled, and its log-probs are read by id.

A segment that the teacher scored with a smaller request is scored again, and the new entries extend
the stored ones. A segment that it scored with the same or a larger request is skipped.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logitcask.engine.errors import ConfigError, IdentityError, IncompleteError, StoreError
from logitcask.engine.events import peak_memory
from logitcask.engine.score.unit import ScoreRequest, ScoreUnit, run_score_unit, unit_key
from logitcask.engine.store import ScoreSegments, Segment, Snapshot
from logitcask.engine.store.format.schema import specs
from logitcask.engine.store.log.snapshot import are_partial
from logitcask.engine.teachers.checks import check_identity, other_dtypes
from logitcask.engine.types import (
    ALL_POSITIONS,
    MC_IDS,
    NO_DETAIL,
    Detail,
    Progress,
    ScoreParams,
    no_progress,
    unit_report,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreReport:
    units_total: int
    units_done_before: int
    units_new: int
    positions: int
    """Rows of the new units; the seconds count new units too."""
    seconds: float
    positions_per_second: float
    """Of the whole command, loading of the teacher excluded."""
    peak_memory_bytes: Mapping[str, int]
    """As of `events.peak_memory`."""
    notes: tuple[str, ...]
    """Warnings for the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorePlan:
    """Units of a scoring at a snapshot."""

    total: int
    missing: Mapping[str, ScoreUnit]
    """unit_key -> missing unit, by student version, then by first prompt."""
    provenance: Mapping[str, Any]
    notes: tuple[str, ...]
    """Warnings for the user."""


def score(request: ScoreRequest, *, progress: Progress = no_progress) -> ScoreReport:
    """Score every rollout segment of the name that has no scores for this request yet.

    Raises IdentityError for a teacher with another tokenizer, vocabulary or stop ids,
    IncompleteError where there are no rollouts, no draws or no scores of the model in `extra_ids`,
    and PromptError for a context that lacks a prompt.
    """
    start_s = time.monotonic()
    planned = plan_scores(request, request.store.head())
    done_before = planned.total - len(planned.missing)
    positions = 0
    for done, (key, unit) in enumerate(planned.missing.items(), done_before):
        report = unit_report(progress, "score", done, planned.total, positions)
        report(NO_DETAIL)
        positions += run_score_unit(request, key, unit, planned.provenance, report)
    progress("score", planned.total, planned.total, Detail(positions))
    took_s = time.monotonic() - start_s
    return ScoreReport(
        units_total=planned.total,
        units_done_before=done_before,
        units_new=len(planned.missing),
        positions=positions,
        seconds=took_s,
        positions_per_second=positions / took_s,
        peak_memory_bytes=peak_memory(),
        notes=planned.notes,
    )


def plan_scores(request: ScoreRequest, snapshot: Snapshot, *, growing: bool = False) -> ScorePlan:
    """Plan and check the units to score at a snapshot; raises as `score` does.

    growing: leave rollouts without scores of the model in `extra_ids` for a later plan.
    """
    model, params, name = request.model, request.params, request.teacher_name
    segments = snapshot.rollouts(request.rollouts_name)
    if not segments:
        known = ", ".join(snapshot.names("rollout")) or "none"
        raise IncompleteError(
            f"{request.store.url} holds no rollouts named {request.rollouts_name!r}; "
            f"it has: {known}",
            hint="run `logitcask rollout` first, or use one of these names",
        )
    notes = list(request.notes)
    for segment in segments:
        found = check_identity(segment.provenance["student"], model, request.shared)
        notes += [each for each in found if each not in notes]
    notes += other_dtypes(snapshot, segments, name, request.scorer)
    provenance = request.provenance()
    at_scores = None
    if request.extra_ids == MC_IDS:
        _check_draws(segments, request.rollouts_name)
    elif request.extra_ids is not None:
        at_scores = snapshot.scores(request.extra_ids)
        if not at_scores and not growing:
            raise IncompleteError(
                f"the store holds no scores of {request.extra_ids!r}; it has: "
                f"{', '.join(snapshot.names('score'))}",
                hint="score with that model first, or name one of these",
            )
    units = {
        unit_key(
            segment, model, params, provenance, _at_key(request.extra_ids, at_scores, segment)
        ): segment
        for segment in segments
        if not growing or at_scores is None or segment.seg_id in at_scores
    }
    _check_twice(snapshot, units, name)
    drawn = params.entry_kind == "sampled"
    request.store.check_name("score", name, provenance, drawn=drawn)
    done = snapshot.unit_keys()
    there = snapshot.scores(name)
    if drawn and any(key not in done and s.seg_id in there for key, s in units.items()):
        raise IdentityError(
            f"{name!r} holds draws of these rollouts of another number or seed",
            hint="use another name for these: drawn ids cannot be extended",
        )
    others = {each[0].profile for each in there.values()} - {request.profile}
    if others:
        notes.append(
            f"scores of {name!r} are stored in profile {', '.join(sorted(others))}; "
            f"{request.profile} is used for new ones"
        )
    missing = {
        key: ScoreUnit(
            segment=segment,
            score_segments=there.get(segment.seg_id),
            at_scores=None if at_scores is None else at_scores[segment.seg_id],
        )
        for key, segment in units.items()
        if key not in done
        and not (request.extra_ids is None and _covers(there.get(segment.seg_id), params))
    }
    extended = [unit.score_segments for unit in missing.values() if unit.score_segments]
    for each in extended:
        _check_rows(request, each)
    if any(map(are_partial, (at_scores or {}).values())):
        raise ConfigError(
            f"extra_ids = {request.extra_ids}: these scores are of some positions only",
            hint="score the other positions with that model first: --positions all",
        )
    if not all(map(are_partial, extended)) and "at_ids" not in request.scorer.capabilities:
        raise ConfigError(
            f"scores of {name!r} are stored for a smaller request, and this teacher cannot score "
            "chosen ids, so they cannot be extended",
            hint="score under another name, or repeat the earlier request",
        )
    return ScorePlan(total=len(units), missing=missing, provenance=provenance, notes=tuple(notes))


def _check_rows(request: ScoreRequest, stored: ScoreSegments) -> None:
    """Raise ConfigError unless the request adds positions alone, or ids at all positions."""
    name = request.teacher_name
    if not are_partial(stored):
        if request.positions != ALL_POSITIONS:
            raise ConfigError(
                f"positions = {request.positions}: {name!r} has scores of all, of fewer ids",
                hint="leave --positions out, or score under another name",
            )
        return
    recorded = {_recorded(each) for each in stored}
    if request.extra_ids is not None or recorded != {request.params}:
        raise ConfigError(
            f"{name!r} has scores of some positions, made with {', '.join(map(str, recorded))}",
            hint="add the other positions first, with the flags of these scores and --positions "
            "all; or score under another name",
        )


def _covers(stored_in: ScoreSegments | None, params: ScoreParams) -> bool:
    """Return True where these segments hold at least the entries of this request."""
    if stored_in and are_partial(stored_in):
        return False
    stored = [_recorded(each) for each in stored_in or ()]
    if any(each.entry_kind == "sampled" for each in (params, *stored)):
        return False

    def at_least(each: ScoreParams) -> bool:
        ours, theirs = (
            (1.0 if r.entry_kind == "topk" else r.top_p, r.k_min, r.k_max) for r in (params, each)
        )
        return all(a <= b for a, b in zip(ours, theirs, strict=True))

    at_student = any(each.at_student for each in stored) or not params.at_student
    return any(map(at_least, stored)) and at_student


def _recorded(segment: Segment) -> ScoreParams:
    request = segment.provenance["request"]
    try:
        return ScoreParams.from_record({key: request[key] for key in request})
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"segment {segment.seg_id} of score {segment.name!r} records another request than ours "
            f"({error})",
            hint="score under another name",
        ) from error


def _check_draws(segments: Sequence[Segment], name: str) -> None:
    if any("mc_counts" not in specs(segment.layout) for segment in segments):
        raise IncompleteError(
            f"rollouts {name!r} hold no ids that the student drew",
            hint="sample with `logitcask rollout --mc-draws M`, under another name",
        )


def _at_key(
    at: str | None, scores: Mapping[str, ScoreSegments] | None, segment: Segment
) -> tuple[str, ...]:
    """Return the part of a unit's key that names the extra ids."""
    if scores is None:
        return () if at is None else (at,)
    if segment.seg_id not in scores:
        raise IncompleteError(
            f"rollout segment {segment.seg_id} has no scores of the model that gives the extra ids",
            hint="let that model score all of these rollouts first",
        )
    return tuple(each.key_id for each in scores[segment.seg_id])


def _check_twice(snapshot: Snapshot, units: Mapping[str, Segment], teacher_name: str) -> None:
    done_as = {s.unit_key: s.name for s in snapshot.segments}
    for other in {done_as[key] for key in units if key in done_as} - {teacher_name}:
        raise IdentityError(
            f"this teacher's scores are in the store already, under the name {other!r}",
            hint=f"use that name instead of {teacher_name!r}; a different model served under "
            "the same path needs its own --revision",
        )
