"""Read one rollout segment, score it and commit its score segments."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Literal

import numpy as np

from logitcask.engine.alignment.alignment import Alignment
from logitcask.engine.backends.base import Scorer
from logitcask.engine.errors import PromptError
from logitcask.engine.models.identity import digest
from logitcask.engine.score.extra_ids import with_known, without_extra
from logitcask.engine.score.positions import chosen_rows, score_positions
from logitcask.engine.score.positions_file import PositionsFile
from logitcask.engine.score.same_texts import SameTexts
from logitcask.engine.score.spans import score_spans
from logitcask.engine.store import ScoreSegments, Segment, Store
from logitcask.engine.store.extend import request_ids, union
from logitcask.engine.store.format.layouts import ranked
from logitcask.engine.store.log.snapshot import are_partial
from logitcask.engine.teachers.checks import check_scorer, check_spans, check_stops
from logitcask.engine.teachers.token_maps import SharedVocabulary
from logitcask.engine.types import (
    ALL_POSITIONS,
    MC_IDS,
    NO_DETAIL,
    Array,
    Detail,
    IdLists,
    ModelRef,
    Prompt,
    Report,
    Rollouts,
    ScoreParams,
    Scores,
    no_report,
)

EXACT = "raw32"
"""Profile of log-probs at drawn ids: an estimator of few draws does not average rounding out."""
LOGPROB = "natural, temperature 1, ids [0, n_vocab)"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRequest:
    """A teacher, the rollouts that it scores, and the entries to store.

    Raises ConfigError for a scorer that lacks a capability, or parameters that no row could meet.
    """

    store: Store
    model: ModelRef
    """The teacher."""
    scorer: Scorer
    teacher_name: str
    """Name of its scores in the store."""
    rollouts_name: str = "main"
    only: Callable[[Segment], bool] | None = None
    """True for the rollouts of the name to score; None = all of them."""
    params: ScoreParams = field(default_factory=ScoreParams)
    role: Literal["teacher", "base", "context"] = "teacher"
    """Role of the scores; base = of the model that the teacher was trained from (ExOPD), context =
    of a teacher that reads other prompts."""
    context: Mapping[str, Prompt] | None = None
    """Prompt id -> the prompt that the teacher reads in its place (teacher context); the response
    stays."""
    extra_ids: str | None = None
    """Name of another model's scores in the store, for its top ids (a later student, for example);
    or MC_IDS, for the ids that the student drew, stored in float32 in every profile."""
    positions: str = ALL_POSITIONS
    """Rows to score, as of `positions.chosen_rows`; not all of them with extra ids. With a
    positions file: its name."""
    positions_file: PositionsFile | None = None
    profile: str = "default"
    eos_rows: Literal["refuse", "keep"] = "refuse"
    """Treatment of a final stop token that the teacher does not use."""
    shared: SharedVocabulary | None = None
    """Map between the tokenizers of teacher and student; None = they are equal."""
    alignment: Alignment | None = None
    """Of a teacher with another tokenizer, which scores spans; `context` is then in it too. None =
    its ids are the student's."""
    same_texts: SameTexts | None = None
    """Scores over spans of which log-probs are taken where the text is the same; only where no best
    ids are stored."""
    notes: tuple[str, ...] = ()
    """Warnings about the teacher, for the user."""
    provenance_extra: Mapping[str, Any] = field(default_factory=dict)
    """More entries for the provenance of each segment."""

    def __post_init__(self) -> None:
        check_scorer(self.scorer, self.params, chosen=self.extra_ids is not None)
        if self.alignment is not None:
            check_spans(
                self.model.name,
                extra_ids=self.extra_ids or "",
                positions=self.positions,
                selection=self.params.record()["selection"],
            )

    def provenance(self) -> dict[str, Any]:
        """Return the provenance of every segment, without the extra ids."""
        return {
            "teacher": self.model.provenance(),
            "teacher_kind": self.role,
            "context": context_digest(self.context),
            "request": self.params.record(),
            "rollouts": self.rollouts_name,
            **({} if self.positions == ALL_POSITIONS else {"positions": self.positions}),
            "backend": self.scorer.describe(),
            "logprob": LOGPROB,
            **({} if self.alignment is None else {"alignment": self.alignment.record()}),
            **self.provenance_extra,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreUnit:
    """A rollout segment, and the stored scores that its scoring uses."""

    segment: Segment
    score_segments: ScoreSegments | None
    """This teacher's scores of it; None where there are none."""
    at_scores: ScoreSegments | None
    """Scores of another model, whose ids are the extra ids."""


def run_score_unit(
    request: ScoreRequest,
    key: str,
    unit: ScoreUnit,
    provenance: Mapping[str, Any],
    report: Report = no_report,
) -> int:
    """Score one unit, commit it under its key, and return its positions."""
    store, params, segment = request.store, request.params, unit.segment
    rollouts = store.read_rollouts(segment)
    if request.alignment is not None:
        spans, took_s = score_spans(
            request.alignment,
            rollouts,
            lambda teacher, at: _score_text(request, teacher, at, report),
            at_student=params.at_student,
        )
        store.commit_span_scores(
            spans,
            base=segment,
            name=request.teacher_name,
            unit_key=key,
            unit=dict(segment.unit),
            provenance=provenance,
            profile=request.profile,
            seconds=took_s,
        )
        return rollouts.positions
    check_stops(
        rollouts,
        request.eos_rows,
        name=segment.name,
        student=segment.provenance["student"]["stop_ids"],
        teacher=request.model.name,
        stop_ids=request.model.stop_ids,
    )
    shown = rollouts if request.context is None else _with_context(rollouts, request.context)
    extra: IdLists | None = None
    if unit.at_scores is not None:
        extra = _ids_of(store, unit.at_scores, rollouts)
    elif request.extra_ids == MC_IDS:
        assert rollouts.draws is not None, "the layout has draws"
        extra = IdLists(cnt=rollouts.draws.cnt, ids=rollouts.draws.ids)
    ids: IdLists | None = None
    fields: dict[str, Any] = {
        "base": segment,
        "name": request.teacher_name,
        "unit": dict(segment.unit),
    }
    at_student = "student" if params.at_student else ""
    stored, rows = unit.score_segments, None
    if request.positions != ALL_POSITIONS or (stored is not None and are_partial(stored)):
        if request.positions_file is not None:
            rows = request.positions_file.rows(rollouts)
        else:
            rows = chosen_rows(rollouts, request.positions)
        if stored is not None and (marks := store.read_marks(stored)) is not None:
            rows &= ~marks
        scores, took_s = _score(request, shown, None, report, rows=rows)
    elif unit.score_segments is not None:
        student = rollouts.student if params.at_student else None
        if extra is None and student is not None:
            extra = IdLists(cnt=student.cnt, ids=student.ids)
        ids = request_ids(store.read_scores(unit.score_segments, base=rollouts), extra)
        # The stored scores were checked when they were committed.
        scores, took_s = _score(request, shown, ids, report, new=extra)
    elif extra is not None:
        scores, ids = _score_with_extra(
            request,
            shown,
            extra,
            report,
            **fields,
            unit_key=unit_key(segment, request.model, params, provenance),
            provenance={**provenance, "at": at_student},
            profile=request.profile,
        )
        took_s = 0.0  # the first segment records the seconds of both
    else:
        scores, took_s = _score(request, shown, None, report)
    store.commit_scores(
        scores,
        **fields,
        unit_key=key,
        provenance={**provenance, "at": request.extra_ids or at_student},
        profile=EXACT if request.extra_ids == MC_IDS else request.profile,
        at=ids,
        rows=rows,
        seconds=took_s,
    )
    return rollouts.positions if rows is None else int(rows.sum())


def _score_text(
    request: ScoreRequest, teacher: Rollouts, at: IdLists | None, report: Report
) -> tuple[Scores, float]:
    """Return the scores of the teacher's own tokens and their seconds."""
    if request.same_texts is None:
        return _score(request, teacher, at, report)
    return request.same_texts.score(teacher, lambda part: _score(request, part, None, report))


def unit_key(
    segment: Segment,
    model: ModelRef,
    params: ScoreParams,
    provenance: Mapping[str, Any],
    at: Sequence[str] = (),
) -> str:
    return digest(
        {
            "rollouts": segment.key_id,
            "teacher": model.digest,
            "role": provenance["teacher_kind"],
            "template": model.template_digest,
            "context": provenance["context"],
            "request": _fields(params),
            "at": list(at),
            **{key: provenance[key] for key in ("positions", "alignment") if key in provenance},
        }
    )


@cache
def _fields(params: ScoreParams) -> dict[str, Any]:
    """Return the fields of a request, which the keys of all of its units have."""
    return asdict(params)


def _score_with_extra(
    request: ScoreRequest, shown: Rollouts, extra: IdLists, report: Report, **fields: Any
) -> tuple[Scores, IdLists]:
    """Score at the student's ids and `extra` in one pass, and commit the first segment.

    fields: of that segment. -> the scores and their ids, to extend that segment.
    """
    own, store = shown.student, request.store
    student = None
    if own is not None and request.params.at_student:
        student = IdLists(cnt=own.cnt, ids=own.ids)
    ids = extra if student is None else union(student, extra)
    scores, took_s = _score(request, shown, ids, report)
    first = store.commit_scores(without_extra(scores, ids, student), **fields, seconds=took_s)
    return with_known(scores, ids, store.read_scores((first,)))


def _score(
    request: ScoreRequest,
    shown: Rollouts,
    at: IdLists | None,
    report: Report,
    new: IdLists | None = None,
    rows: Array | None = None,
) -> tuple[Scores, float]:
    """Return the scores and their seconds.

    new: the ids of `at` not stored yet; None: all. rows: [P] bool, the only rows of the scores.
    """
    scorer, params, shared = request.scorer, request.params, request.shared
    if shared is not None:
        # Only the teacher reads its context, so the map need not cover it.
        prompts = request.context is None
        shared.check_request(shown, params, new or at, request.model.name, prompts=prompts)

    def progress(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        report(Detail(done, f"{done:,}/{total:,} positions", done / max(1, total)))

    start_s = time.monotonic()
    if rows is None:
        scores = scorer.score(shown, params, at, progress=progress)
    else:
        scores = score_positions(scorer, shown, params, rows, progress)
    took_s = time.monotonic() - start_s
    if shared is not None:
        shared.check_scores(scores, params, request.model.name)
    return scores, took_s


def _ids_of(store: Store, scores: ScoreSegments, rollouts: Rollouts) -> IdLists:
    known = ranked(store.read_scores(scores, base=rollouts))
    return IdLists(cnt=known.cnt.astype(np.uint16), ids=known.ids)


def context_digest(context: Mapping[str, Prompt] | None) -> str:
    """Return the digest of a teacher context; '' for none."""
    if context is None:
        return ""
    return digest({name: list(prompt.token_ids) for name, prompt in context.items()})


def _with_context(rollouts: Rollouts, context: Mapping[str, Prompt]) -> Rollouts:
    """Return the same responses after the prompts of the context."""
    for prompt in rollouts.prompts:
        if prompt.id not in context:
            raise PromptError(
                f"the context has no prompt {prompt.id!r}, which the rollouts answer",
                hint="give a prompt for every id of the rollouts",
            )
    return replace(rollouts, prompts=tuple(context[prompt.id] for prompt in rollouts.prompts))
