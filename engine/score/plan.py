"""Rollout segments + a scorer -> score segments, at least one for each.

A score unit is one rollout segment under one teacher and one request. The teacher must have the
student's tokenizer: its log-probs are read by id, and ids as sampled are all that it is shown.

A teacher that has scored a segment for less than is now asked is asked again, and what it adds is
stored beside what is there; one that was asked for as much or more is not asked at all.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logitcask.engine.errors import ConfigError, IdentityError, IncompleteError
from logitcask.engine.score.ids_file import IdsFile
from logitcask.engine.score.unit import ScoreRequest, ScoreUnit, run_score_unit, unit_key
from logitcask.engine.store import ScoreSegments, Segment, Snapshot
from logitcask.engine.store.format.schema import MC
from logitcask.engine.teachers.checks import check_identity, other_dtypes
from logitcask.engine.types import (
    MC_IDS,
    Progress,
    ScoreParams,
    no_progress,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreReport:
    units_total: int
    units_done_before: int
    units_new: int
    positions: int
    """Rows of the units that are new; so is the time."""
    seconds: float
    notes: tuple[str, ...]
    """What a person should know and nothing was refused for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorePlan:
    """The units of a scoring as of a snapshot."""

    total: int
    missing: Mapping[str, ScoreUnit]
    """unit_key -> what is to be scored, by student version, then by first prompt."""
    lineage: Mapping[str, Any]
    notes: tuple[str, ...]
    """What a person should know and nothing was refused for."""


def score(asked: ScoreRequest, *, progress: Progress = no_progress) -> ScoreReport:
    """Scores every rollout segment of the name that this teacher has not scored as asked.

    Raises IdentityError for a teacher with another tokenizer, vocabulary or stop ids,
    IncompleteError where there are no rollouts, no draws or no scores of `at`, PromptError for a
    context without a prompt of the rollouts, or given ids of other sequences than theirs.
    """
    start_s = time.monotonic()
    planned = plan_scores(asked, asked.store.head())
    done_before = planned.total - len(planned.missing)
    positions = 0
    for done_now, (key, unit) in enumerate(planned.missing.items()):
        progress("score", done_before + done_now, planned.total)
        positions += run_score_unit(asked, key, unit, planned.lineage)
    progress("score", planned.total, planned.total)
    return ScoreReport(
        units_total=planned.total,
        units_done_before=done_before,
        units_new=len(planned.missing),
        positions=positions,
        seconds=time.monotonic() - start_s,
        notes=planned.notes,
    )


def plan_scores(asked: ScoreRequest, snapshot: Snapshot, *, growing: bool = False) -> ScorePlan:
    """What is to be scored as of a snapshot, checked; raises as `score` does.

    growing: rollouts without scores of `at` are left for a later plan, and not refused.
    """
    model, request, name = asked.model, asked.request, asked.teacher_name
    segments = snapshot.rollouts(asked.rollouts_name)
    if not segments:
        known = ", ".join(snapshot.names("rollout")) or "none"
        raise IncompleteError(
            f"{asked.store.url} holds no rollouts named {asked.rollouts_name!r}; it has: {known}",
            hint="Run `logitcask rollout` first, or name the rollouts that are there.",
        )
    notes = list(asked.notes)
    for segment in segments:
        found = check_identity(segment.lineage["student"], model, asked.shared)
        notes += [each for each in found if each not in notes]
    notes += other_dtypes(snapshot, segments, name, asked.scorer)
    lineage = asked.lineage()
    given, asked_at = None, None
    if isinstance(asked.at, IdsFile):
        given = asked.at.lists({each.seg_id: asked.store.read_extent(each) for each in segments})
    elif asked.at == MC_IDS:
        _check_draws(segments, asked.rollouts_name)
    elif asked.at is not None:
        asked_at = snapshot.scores(asked.at) if growing else _scores_named(snapshot, asked.at)
    units = {
        unit_key(segment, model, request, lineage, _asked(asked.label, asked_at, segment)): segment
        for segment in segments
        if not growing or asked_at is None or segment.seg_id in asked_at
    }
    _check_twice(snapshot, units, name)
    drawn = request.entry_kind == "sampled"
    asked.store.check_name("score", name, lineage, drawn=drawn)
    done = snapshot.unit_keys()
    there = snapshot.scores(name)
    if drawn and any(key not in done and s.seg_id in there for key, s in units.items()):
        raise IdentityError(
            f"{name!r} holds draws of these rollouts of another number or seed",
            hint="Use another name for these: drawn ids are not added to.",
        )
    others = {chain[0].profile for chain in there.values()} - {asked.profile}
    if others:
        notes.append(
            f"scores of {name!r} are there in profile {', '.join(sorted(others))}; "
            f"{asked.profile} is for what is added"
        )
    missing = {
        key: ScoreUnit(
            segment=segment,
            chain=there.get(segment.seg_id),
            given=None if given is None else given[segment.seg_id],
            asked_at=None if asked_at is None else asked_at[segment.seg_id],
        )
        for key, segment in units.items()
        if key not in done
        and not (asked.at is None and _serves(there.get(segment.seg_id), request))
    }
    if any(unit.chain for unit in missing.values()) and "at_ids" not in asked.scorer.capabilities:
        raise ConfigError(
            f"scores of {name!r} are there for less than is asked now, and this teacher cannot be "
            "asked at chosen ids, so they cannot be added to",
            hint="Score under another name, or ask for as much as before.",
        )
    return ScorePlan(total=len(units), missing=missing, lineage=lineage, notes=tuple(notes))


def _serves(chain: ScoreSegments | None, request: ScoreParams) -> bool:
    """Whether one of these segments was asked for as much: what is read can be cut shorter."""
    asked = [ScoreParams(**each.lineage["request"]) for each in chain or ()]
    if any(each.entry_kind == "sampled" for each in (request, *asked)):
        return False

    def at_least(each: ScoreParams) -> bool:
        ours, theirs = (
            (1.0 if r.entry_kind == "topk" else r.top_p, r.k_min, r.k_max) for r in (request, each)
        )
        return all(a <= b for a, b in zip(ours, theirs, strict=True))

    at_student = any(each.at_student for each in asked) or not request.at_student
    return any(map(at_least, asked)) and at_student


def _scores_named(snapshot: Snapshot, name: str) -> dict[str, ScoreSegments]:
    found = snapshot.scores(name)
    if not found:
        raise IncompleteError(
            f"the store holds no scores of {name!r}; it has: {', '.join(snapshot.names('score'))}",
            hint="Score with that model first, or name one of these.",
        )
    return found


def _check_draws(segments: Sequence[Segment], name: str) -> None:
    if any(segment.layout != MC for segment in segments):
        raise IncompleteError(
            f"rollouts {name!r} hold no ids that the student drew",
            hint="Sample with `logitcask rollout --mc-draws M`, under a name of its own.",
        )


def _asked(
    at: str | None, scores: Mapping[str, ScoreSegments] | None, segment: Segment
) -> tuple[str, ...]:
    """What a unit's key says of the ids that are asked at beside the student's list."""
    if scores is None:
        return () if at is None else (at,)
    if segment.seg_id not in scores:
        raise IncompleteError(
            f"rollout segment {segment.seg_id} has no scores of the model whose ids are wanted",
            hint="Let that model score all of these rollouts first.",
        )
    return tuple(each.seg_id for each in scores[segment.seg_id])


def _check_twice(snapshot: Snapshot, units: Mapping[str, Segment], teacher_name: str) -> None:
    done_as = {s.unit_key: s.name for s in snapshot.segments}
    for other in {done_as[key] for key in units if key in done_as} - {teacher_name}:
        raise IdentityError(
            f"this teacher's scores are in the store already, under the name {other!r}",
            hint=f"Use that name instead of {teacher_name!r}. A served model that is another and "
            "goes by the same path gets a --revision of its own.",
        )
