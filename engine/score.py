"""Rollout segments + a scorer -> score segments, one for each.

A score unit is one rollout segment under one teacher and one request. The teacher must have the
student's tokenizer: its log-probs are read by id, and ids as sampled are all that it is shown.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from logitcask.engine.backends.base import Scorer
from logitcask.engine.errors import ConfigError, IdentityError, IncompleteError
from logitcask.engine.identity import digest
from logitcask.engine.store import Pin, Segment, Store
from logitcask.engine.types import (
    STOP,
    ModelRef,
    Progress,
    Rollouts,
    ScoreRequest,
    silent,
)

ROLE = "teacher"
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
    eos_rows: Literal["refuse", "keep"] = "refuse",
    progress: Progress = silent,
) -> ScoreReport:
    """Scores every rollout segment of `rollouts_name` that this teacher has not scored yet.

    eos_rows: what to do with a stop token that ends a response and that the teacher does not use.
    Raises IdentityError for a teacher with another tokenizer, vocabulary or stop ids,
    IncompleteError where there are no rollouts, ConfigError for a scorer that lacks a capability
    or a request that no row could meet.
    """
    start_s = time.monotonic()
    _check_scorer(scorer, request)
    pin = store.head()
    segments = pin.rollouts(rollouts_name)
    if not segments:
        known = ", ".join(pin.names("rollout")) or "none"
        raise IncompleteError(
            f"{store.path} holds no rollouts named {rollouts_name!r}; it has: {known}",
            remedy="Run `logitcask rollout` first, or name the rollouts that are there.",
        )
    notes: list[str] = []
    for segment in segments:
        notes += [n for n in check_identity(segment.lineage["student"], model) if n not in notes]
    notes += _other_dtypes(pin, segments, teacher_name, scorer)
    units = {unit_key(segment, model, request): segment for segment in segments}
    done_as = {s.unit_key: s.name for s in pin.segments}
    for other in {done_as[key] for key in units if key in done_as} - {teacher_name}:
        raise IdentityError(
            f"this teacher's scores are in the store already, under the name {other!r}",
            remedy=f"Use that name instead of {teacher_name!r}.",
        )
    missing = {key: segment for key, segment in units.items() if key not in done_as}
    lineage = {
        "teacher": model.lineage(),
        "role": ROLE,
        "request": asdict(request),
        "rollouts": rollouts_name,
        "backend": scorer.describe(),
        "logprob": LOGPROB,
    }
    positions = 0
    for done, (key, segment) in enumerate(missing.items()):
        progress("score", len(units) - len(missing) + done, len(units))
        rollouts = store.read_rollouts(segment)
        check_stops(segment, rollouts, model, eos_rows)
        store.commit_scores(
            scorer.score(rollouts, request),
            base=segment,
            name=teacher_name,
            unit_key=key,
            unit=dict(segment.unit),
            lineage=lineage,
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


def unit_key(segment: Segment, model: ModelRef, request: ScoreRequest) -> str:
    return digest(
        {
            "rollouts": segment.seg_id,
            "teacher": model.digest,
            "role": ROLE,
            "template": model.template_digest,
            "request": asdict(request),
        }
    )


def check_identity(student: Mapping[str, Any], model: ModelRef) -> list[str]:
    """Refuses a teacher that reads ids differently than the student whose lineage this is.

    Answers notes on what differs and does no harm. Raises IdentityError.
    """
    if student["tokenizer"] != model.tokenizer_digest:
        raise IdentityError(
            f"the student's tokenizer is {student['tokenizer']}, "
            f"that of {model.name} is {model.tokenizer_digest}",
            remedy="Take a teacher with the student's tokenizer; there is no override, ids would "
            "mean other tokens.",
        )
    if student["n_vocab"] != model.n_vocab:
        raise IdentityError(
            f"the student's vocabulary has {student['n_vocab']} ids, "
            f"that of {model.name} has {model.n_vocab}",
            remedy="Take a teacher with the student's vocabulary; there is no override.",
        )
    if student["template"] != model.template_digest:
        return [
            f"{model.name} renders prompts differently from the student; it is shown the student's "
            "rendering, which may be foreign to it"
        ]
    return []


def check_stops(segment: Segment, rollouts: Rollouts, model: ModelRef, eos_rows: str) -> None:
    """A stop token that the teacher does not use has next to no probability under it: one huge
    KL row in every sequence. Raises IdentityError unless such rows are to be kept."""
    foreign = sorted(set(segment.lineage["student"]["stop_ids"]) - set(model.stop_ids))
    if eos_rows == "keep" or not foreign:
        return
    ends = rollouts.tokens[rollouts.seq_off[1:][rollouts.finish == STOP] - 1]
    found = np.intersect1d(ends, foreign)
    if len(found):
        share = float(np.isin(ends, found).mean())
        raise IdentityError(
            f"{share:.0%} of the stopped responses of {segment.name!r} end in the stop ids "
            f"{found.tolist()}, and {model.name} stops at {list(model.stop_ids)} only",
            remedy='Keep these rows with eos_rows="keep", or give the teacher\'s config.json these '
            "eos_token_id.",
        )


def _other_dtypes(
    pin: Pin, segments: Sequence[Segment], teacher_name: str, scorer: Scorer
) -> list[str]:
    """A note where some of these rollouts were scored in another dtype: bfloat16 moves log-probs
    by some 0.01 nats, which training cannot tell from what the teacher thinks."""
    ours, there = scorer.describe().get("dtype"), pin.scores(teacher_name)
    found = {there[s.seg_id].lineage["backend"].get("dtype") for s in segments if s.seg_id in there}
    return [
        f"scores of {teacher_name!r} in {other} are there already, and this run computes in {ours}"
        for other in sorted(map(str, found - {ours}))
    ]


def _check_scorer(scorer: Scorer, request: ScoreRequest) -> None:
    # No row could hold k_min ids, and training would take the request at its word.
    if request.k_min > request.k_max:
        raise ConfigError(
            f"k_min = {request.k_min} is more than k_max = {request.k_max}",
            remedy=f"Give k_max = {request.k_min} or more.",
        )
    needs = {"top", "entropy", "tail"} | ({"at_ids"} if request.at_student else set())
    if lacking := sorted(needs - scorer.capabilities):
        raise ConfigError(
            f"{type(scorer).__name__} cannot give {', '.join(lacking)}",
            remedy="Use the backend hf, which gives all, or ask for less (at_student=False).",
        )
