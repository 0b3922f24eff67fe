"""One score unit: a rollout segment, read, scored as asked and committed."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from logitcask.engine.backends.base import Scorer
from logitcask.engine.errors import PromptError
from logitcask.engine.models.identity import digest
from logitcask.engine.score.extra_ids import at_all_known, without_more
from logitcask.engine.score.ids_file import IdsFile
from logitcask.engine.store import ScoreSegments, Segment, Store
from logitcask.engine.store.extend import request_ids, union
from logitcask.engine.store.format.layouts import ranked
from logitcask.engine.teachers.checks import check_scorer, check_stops
from logitcask.engine.teachers.token_maps import SharedVocabulary
from logitcask.engine.types import (
    MC_IDS,
    IdLists,
    ModelRef,
    Prompt,
    Rollouts,
    ScoreParams,
    Scores,
)

EXACT = "raw32"
"""Profile of log-probs at drawn ids: an estimator divides by few draws, and rounding stays in."""
LOGPROB = "natural, temperature 1, ids [0, n_vocab)"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRequest:
    """Who scores what, and what is asked.

    Raises ConfigError for a scorer that lacks a capability, or a request that no row could meet.
    """

    store: Store
    model: ModelRef
    """The teacher."""
    scorer: Scorer
    teacher_name: str
    """Of its scores in the store."""
    rollouts_name: str = "main"
    request: ScoreParams = field(default_factory=ScoreParams)
    role: Literal["teacher", "base", "context"] = "teacher"
    """What the scores are for; base = of the model that the teacher was made from (ExOPD), context
    = of a teacher that is shown other prompts."""
    context: Mapping[str, Prompt] | None = None
    """Prompt id -> the prompt that the teacher is shown in its place (privileged context); the
    response stays."""
    at: str | IdsFile | None = None
    """Also at the top ids of this other model's scores in the store, a later student's say; or at
    the ids that the student drew, for MC_IDS, stored in float32 whatever the profile; or at ids
    that a file gives."""
    profile: str = "default"
    eos_rows: Literal["refuse", "keep"] = "refuse"
    """What to do with a stop token that ends a response and that the teacher does not use."""
    shared: SharedVocabulary | None = None
    """How the teacher's tokenizer differs from the student's; None = not at all."""
    notes: tuple[str, ...] = ()
    """What is known of the teacher before it is asked, for a person."""
    lineage_extra: Mapping[str, Any] = field(default_factory=dict)
    """More that every segment records."""

    def __post_init__(self) -> None:
        check_scorer(self.scorer, self.request, chosen=self.at is not None)

    @property
    def label(self) -> str | None:
        """`at` in a word."""
        return self.at.label if isinstance(self.at, IdsFile) else self.at

    def lineage(self) -> dict[str, Any]:
        """What every segment records, without where the teacher was asked."""
        return {
            "teacher": self.model.lineage(),
            "role": self.role,
            "context": _context_digest(self.context),
            "request": asdict(self.request),
            "rollouts": self.rollouts_name,
            "backend": self.scorer.describe(),
            "logprob": LOGPROB,
            **self.lineage_extra,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreUnit:
    """A rollout segment, and what the store holds that its scoring builds on."""

    segment: Segment
    chain: ScoreSegments | None
    """This teacher's scores of it; None where there are none."""
    given: IdLists | None
    """Ids of a file that it is asked at."""
    asked_at: ScoreSegments | None
    """Scores of another model whose ids it is asked at."""


def run_score_unit(
    asked: ScoreRequest, key: str, unit: ScoreUnit, lineage: Mapping[str, Any]
) -> int:
    """Scores one unit and commits it under its key; its positions."""
    store, request, segment = asked.store, asked.request, unit.segment
    rollouts = store.read_rollouts(segment)
    check_stops(segment, rollouts, asked.model, asked.eos_rows)
    shown = rollouts if asked.context is None else _shown(rollouts, asked.context)
    extra = unit.given
    if unit.asked_at is not None:
        extra = _ids_of(store, unit.asked_at, rollouts)
    elif asked.at == MC_IDS:
        assert rollouts.draws is not None, "its layout says so"
        extra = IdLists(cnt=rollouts.draws.cnt, ids=rollouts.draws.ids)
    wanted: IdLists | None = None
    told: dict[str, Any] = {"base": segment, "name": asked.teacher_name, "unit": dict(segment.unit)}
    at_student = "student" if request.at_student else ""
    if unit.chain is not None:
        student = rollouts.student if request.at_student else None
        if extra is None and student is not None:
            extra = IdLists(cnt=student.cnt, ids=student.ids)
        wanted = request_ids(store.read_scores(unit.chain, base=rollouts), extra)
        # What is there already was accepted when it came.
        scores, took_s = _timed(asked, shown, wanted, new=extra)
    elif extra is not None:
        scores, wanted = _begun(
            asked,
            shown,
            extra,
            **told,
            unit_key=unit_key(segment, asked.model, request, lineage),
            lineage={**lineage, "at": at_student},
            profile=asked.profile,
        )
        took_s = 0.0  # the first segment's seconds are of both
    else:
        scores, took_s = _timed(asked, shown, None)
    store.commit_scores(
        scores,
        **told,
        unit_key=key,
        lineage={**lineage, "at": asked.label or at_student},
        profile=EXACT if asked.at == MC_IDS else asked.profile,
        at=wanted,
        seconds=took_s,
    )
    return rollouts.positions


def unit_key(
    segment: Segment,
    model: ModelRef,
    request: ScoreParams,
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
    asked: ScoreRequest, shown: Rollouts, extra: IdLists, **told: Any
) -> tuple[Scores, IdLists]:
    """One scoring at the student's list and `extra`; the first segment is committed as `told`.

    -> the scores and where they were asked, to widen that segment by.
    """
    own, store = shown.student, asked.store
    student = None
    if own is not None and asked.request.at_student:
        student = IdLists(cnt=own.cnt, ids=own.ids)
    ids = extra if student is None else union(student, extra)
    scores, took_s = _timed(asked, shown, ids)
    first = store.commit_scores(without_more(scores, ids, student), **told, seconds=took_s)
    return at_all_known(scores, ids, store.read_scores((first,)))


def _timed(
    asked: ScoreRequest, shown: Rollouts, at: IdLists | None, new: IdLists | None = None
) -> tuple[Scores, float]:
    """Scores, and the seconds that they took. new: what of `at` was not known before; None: all."""
    scorer, request, shared = asked.scorer, asked.request, asked.shared
    if shared is not None:
        # A context is the teacher's own text, read by nobody else.
        prompts = asked.context is None
        shared.check_request(shown, request, new or at, asked.model.name, prompts=prompts)
    begun_s = time.monotonic()
    scores = scorer.score(shown, request) if at is None else scorer.score(shown, request, at)
    took_s = time.monotonic() - begun_s
    if shared is not None:
        shared.check_scores(scores, request, asked.model.name)
    return scores, took_s


def _ids_of(store: Store, chain: ScoreSegments, rollouts: Rollouts) -> IdLists:
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
                hint="Give a prompt for every id of the rollouts.",
            )
    return replace(rollouts, prompts=tuple(context[prompt.id] for prompt in rollouts.prompts))
