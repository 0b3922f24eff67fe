"""Rollout segments + a scorer -> score segments, at least one for each.

A score unit is one rollout segment under one teacher and one request. The teacher must have the
student's tokenizer: its log-probs are read by id, and ids as sampled are all that it is shown.

A teacher that has scored a segment for less than is now asked is asked again, and what it adds is
stored beside what is there; one that was asked for as much or more is not asked at all.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from logitcask.engine.asked import at_all_known, without_more
from logitcask.engine.backends.base import Scorer
from logitcask.engine.errors import IdentityError, IncompleteError, PromptError
from logitcask.engine.given import GivenIds
from logitcask.engine.identity import digest
from logitcask.engine.store import Chain, Pin, Segment, Store
from logitcask.engine.store.layout import ranked
from logitcask.engine.store.schema import MC
from logitcask.engine.store.widen import ask_at, union
from logitcask.engine.teachers import check_identity, check_scorer, check_stops, other_dtypes
from logitcask.engine.types import (
    MC_IDS,
    IdLists,
    ModelRef,
    Progress,
    Prompt,
    Rollouts,
    ScoreRequest,
    Scores,
    silent,
)

EXACT = "raw32"
"""Profile of log-probs at drawn ids: an estimator divides by few draws, and rounding stays in."""
LOGPROB = "natural, temperature 1, ids [0, n_vocab)"


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


def score(
    store: Store,
    *,
    model: ModelRef,
    scorer: Scorer,
    teacher_name: str,
    rollouts_name: str = "main",
    request: ScoreRequest = ScoreRequest(),  # noqa: B008 - frozen
    role: Literal["teacher", "base", "context"] = "teacher",
    context: Mapping[str, Prompt] | None = None,
    at: str | GivenIds | None = None,
    profile: str = "default",
    eos_rows: Literal["refuse", "keep"] = "refuse",
    progress: Progress = silent,
) -> ScoreReport:
    """Scores every rollout segment of `rollouts_name` that this teacher has not scored as asked.

    role: what the scores are for; base = of the model that the teacher was made from (ExOPD),
    context = of a teacher that is shown other prompts.
    context: prompt id -> the prompt that the teacher is shown in its place (privileged context);
    the response stays. at: also at the top ids of this other model's scores in the store, a later
    student's say, or at the ids that the student drew, for MC_IDS; those are stored in float32,
    whatever the profile; or at ids that a file gives. eos_rows: what to do with a stop token that
    ends a response and that the teacher does not use.
    Raises IdentityError for a teacher with another tokenizer, vocabulary or stop ids,
    IncompleteError where there are no rollouts, no draws or no scores of `at`, ConfigError for a
    scorer that lacks a capability or a request that no row could meet, PromptError for a context
    without a prompt of the rollouts, or given ids of other sequences than theirs.
    """
    start_s = time.monotonic()
    check_scorer(scorer, request)
    pin = store.head()
    segments = pin.rollouts(rollouts_name)
    if not segments:
        known = ", ".join(pin.names("rollout")) or "none"
        raise IncompleteError(
            f"{store.url} holds no rollouts named {rollouts_name!r}; it has: {known}",
            remedy="Run `logitcask rollout` first, or name the rollouts that are there.",
        )
    notes: list[str] = []
    for segment in segments:
        notes += [n for n in check_identity(segment.lineage["student"], model) if n not in notes]
    notes += other_dtypes(pin, segments, teacher_name, scorer)
    lineage = {
        "teacher": model.lineage(),
        "role": role,
        "context": _context_digest(context),
        "request": asdict(request),
        "rollouts": rollouts_name,
        "backend": scorer.describe(),
        "logprob": LOGPROB,
    }
    label = at.label if isinstance(at, GivenIds) else at
    given, asked_at = None, None
    if isinstance(at, GivenIds):
        given = at.lists({each.seg_id: store.read_extent(each) for each in segments})
    elif at == MC_IDS:
        _check_draws(segments, rollouts_name)
    elif at is not None:
        asked_at = _scores_named(pin, at)
    units = {
        unit_key(segment, model, request, lineage, _asked(label, asked_at, segment)): segment
        for segment in segments
    }
    _check_twice(pin, units, teacher_name)
    drawn = request.entry_kind == "sampled"
    store.check_name("score", teacher_name, lineage, drawn=drawn)
    done = pin.unit_keys()
    there = pin.scores(teacher_name)
    if drawn and any(key not in done and s.seg_id in there for key, s in units.items()):
        raise IdentityError(
            f"{teacher_name!r} holds draws of these rollouts of another number or seed",
            remedy="Use another name for these: drawn ids are not added to.",
        )
    others = {chain[0].profile for chain in there.values()} - {profile}
    if others:
        notes.append(
            f"scores of {teacher_name!r} are there in profile {', '.join(sorted(others))}; "
            f"{profile} is for what is added"
        )
    missing = {
        key: segment
        for key, segment in units.items()
        if key not in done and not (at is None and _serves(there.get(segment.seg_id), request))
    }
    positions = 0
    for done_now, (key, segment) in enumerate(missing.items()):
        progress("score", len(units) - len(missing) + done_now, len(units))
        rollouts = store.read_rollouts(segment)
        check_stops(segment, rollouts, model, eos_rows)
        shown = rollouts if context is None else _shown(rollouts, context)
        extra = None if asked_at is None else _ids_of(store, asked_at[segment.seg_id], rollouts)
        if at == MC_IDS:
            assert rollouts.draws is not None, "its layout says so"
            extra = IdLists(cnt=rollouts.draws.cnt, ids=rollouts.draws.ids)
        elif given is not None:
            extra = given[segment.seg_id]
        wanted: IdLists | None = None
        told: dict[str, Any] = {"base": segment, "name": teacher_name, "unit": dict(segment.unit)}
        if (chain := there.get(segment.seg_id)) is not None:
            student = rollouts.student if request.at_student else None
            if extra is None and student is not None:
                extra = IdLists(cnt=student.cnt, ids=student.ids)
            wanted = ask_at(store.read_scores(chain, base=rollouts), extra)
            scores, took_s = _timed(scorer, shown, request, wanted)
        elif extra is not None:
            scores, wanted = _begun(
                store,
                scorer,
                shown,
                extra,
                request,
                **told,
                unit_key=unit_key(segment, model, request, lineage),
                lineage={**lineage, "at": "student" if request.at_student else ""},
                profile=profile,
            )
            took_s = 0.0  # the first segment's seconds are of both
        else:
            scores, took_s = _timed(scorer, shown, request, None)
        store.commit_scores(
            scores,
            **told,
            unit_key=key,
            lineage={**lineage, "at": label or ("student" if request.at_student else "")},
            profile=EXACT if at == MC_IDS else profile,
            at=wanted,
            seconds=took_s,
        )
        positions += rollouts.positions
    progress("score", len(units), len(units))
    return ScoreReport(
        units_total=len(units),
        units_done_before=len(units) - len(missing),
        units_new=len(missing),
        positions=positions,
        seconds=time.monotonic() - start_s,
        notes=tuple(notes),
    )


def unit_key(
    segment: Segment,
    model: ModelRef,
    request: ScoreRequest,
    lineage: Mapping[str, Any],
    at: Sequence[str] = (),
) -> str:
    return digest(
        {
            "rollouts": segment.seg_id,
            "teacher": model.digest,
            "role": lineage["role"],
            "template": model.template_digest,
            "context": lineage["context"],
            "request": asdict(request),
            "at": list(at),
        }
    )


def _begun(
    store: Store,
    scorer: Scorer,
    shown: Rollouts,
    extra: IdLists,
    request: ScoreRequest,
    **told: Any,
) -> tuple[Scores, IdLists]:
    """One scoring at the student's list and `extra`; the first segment is committed as `told`.

    -> the scores and where they were asked, to widen that segment by.
    """
    own = shown.student
    student = None if own is None or not request.at_student else IdLists(cnt=own.cnt, ids=own.ids)
    asked = extra if student is None else union(student, extra)
    scores, took_s = _timed(scorer, shown, request, asked)
    first = store.commit_scores(without_more(scores, asked, student), **told, seconds=took_s)
    return at_all_known(scores, asked, store.read_scores((first,)))


def _timed(
    scorer: Scorer, shown: Rollouts, request: ScoreRequest, at: IdLists | None
) -> tuple[Scores, float]:
    """Scores, and the seconds that they took."""
    begun_s = time.monotonic()
    scores = scorer.score(shown, request) if at is None else scorer.score(shown, request, at)
    return scores, time.monotonic() - begun_s


def _serves(chain: Chain | None, request: ScoreRequest) -> bool:
    """Whether one of these segments was asked for as much: what is read can be cut shorter."""
    asked = [ScoreRequest(**each.lineage["request"]) for each in chain or ()]
    if any(each.entry_kind == "sampled" for each in (request, *asked)):
        return False

    def at_least(each: ScoreRequest) -> bool:
        ours, theirs = (
            (1.0 if r.entry_kind == "topk" else r.top_p, r.k_min, r.k_max) for r in (request, each)
        )
        return all(a <= b for a, b in zip(ours, theirs, strict=True))

    at_student = any(each.at_student for each in asked) or not request.at_student
    return any(map(at_least, asked)) and at_student


def _scores_named(pin: Pin, name: str) -> dict[str, Chain]:
    found = pin.scores(name)
    if not found:
        raise IncompleteError(
            f"the store holds no scores of {name!r}; it has: {', '.join(pin.names('score'))}",
            remedy="Score with that model first, or name one of these.",
        )
    return found


def _check_draws(segments: Sequence[Segment], name: str) -> None:
    if any(segment.layout != MC for segment in segments):
        raise IncompleteError(
            f"rollouts {name!r} hold no ids that the student drew",
            remedy="Sample with `logitcask rollout --mc-draws M`, under a name of its own.",
        )


def _asked(at: str | None, scores: Mapping[str, Chain] | None, segment: Segment) -> tuple[str, ...]:
    """What a unit's key says of the ids that are asked at beside the student's list."""
    if scores is None:
        return () if at is None else (at,)
    if segment.seg_id not in scores:
        raise IncompleteError(
            f"rollout segment {segment.seg_id} has no scores of the model whose ids are wanted",
            remedy="Let that model score all of these rollouts first.",
        )
    return tuple(each.seg_id for each in scores[segment.seg_id])


def _ids_of(store: Store, chain: Chain, rollouts: Rollouts) -> IdLists:
    known = ranked(store.read_scores(chain, base=rollouts))
    return IdLists(cnt=known.cnt.astype(np.uint16), ids=known.ids)


def _context_digest(context: Mapping[str, Prompt] | None) -> str:
    if context is None:
        return ""
    return digest({name: list(prompt.token_ids) for name, prompt in context.items()})


def _shown(rollouts: Rollouts, context: Mapping[str, Prompt]) -> Rollouts:
    """The same responses after other prompts."""
    for prompt in rollouts.prompts:
        if prompt.id not in context:
            raise PromptError(
                f"the context has no prompt {prompt.id!r}, which the rollouts answer",
                remedy="Give a prompt for every id of the rollouts.",
            )
    return replace(rollouts, prompts=tuple(context[prompt.id] for prompt in rollouts.prompts))


def _check_twice(pin: Pin, units: Mapping[str, Segment], teacher_name: str) -> None:
    done_as = {s.unit_key: s.name for s in pin.segments}
    for other in {done_as[key] for key in units if key in done_as} - {teacher_name}:
        raise IdentityError(
            f"this teacher's scores are in the store already, under the name {other!r}",
            remedy=f"Use that name instead of {teacher_name!r}.",
        )
