"""May this teacher score these rollouts, and is it asked what it can answer?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from logitcask.engine.backends.base import Scorer
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.store import Segment, Snapshot
from logitcask.engine.teachers.token_maps import SharedVocabulary
from logitcask.engine.types import STOP, ModelRef, Rollouts, ScoreParams


def check_identity(
    student: Mapping[str, Any], model: ModelRef, shared: SharedVocabulary | None = None
) -> list[str]:
    """Refuses a teacher that reads ids differently than the student whose lineage this is.

    shared: how their tokenizers differ, where that is known. Answers notes on what differs and does
    no harm. Raises IdentityError.
    """
    notes = []
    if shared is not None and shared.is_of(student["tokenizer"], model):
        notes.append(shared.note(model.name))
    elif student["tokenizer"] != model.tokenizer_digest:
        raise IdentityError(
            f"the student's tokenizer is {student['tokenizer']}, "
            f"that of {model.name} is {model.tokenizer_digest}",
            hint="Take a teacher with the student's tokenizer. If they differ in tokens that do "
            "not occur, give the student's, a folder or hub id, with --student-tokenizer.",
        )
    elif student["n_vocab"] != model.n_vocab:
        raise IdentityError(
            f"the student's vocabulary has {student['n_vocab']} ids, "
            f"that of {model.name} has {model.n_vocab}",
            hint="Take a teacher with the student's vocabulary; there is no override.",
        )
    if student["template"] != model.template_digest:
        notes.append(
            f"{model.name} renders prompts differently from the student; it is shown the student's "
            "rendering, which may be foreign to it"
        )
    return notes


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
            hint="Keep these rows with --foreign-eos keep, or give the teacher's config.json these "
            "eos_token_id.",
        )


def other_dtypes(
    snapshot: Snapshot, segments: Sequence[Segment], teacher_name: str, scorer: Scorer
) -> list[str]:
    """A note where some of these rollouts were scored in another dtype: bfloat16 moves log-probs
    by some 0.01 nats, which training cannot tell from what the teacher thinks."""
    ours, there = scorer.describe().get("dtype"), snapshot.scores(teacher_name)
    found = {
        each.lineage["backend"].get("dtype") for s in segments for each in there.get(s.seg_id, ())
    }
    return [
        f"scores of {teacher_name!r} in {other} are there already, and this run computes in {ours}"
        for other in sorted(map(str, found - {ours}))
    ]


def check_scorer(scorer: Scorer, request: ScoreParams, *, chosen: bool = False) -> None:
    """ConfigError for a request that no row could meet, or that the scorer cannot.

    chosen: it is asked at ids beside the student's list too.
    """
    # No row could hold k_min ids, and training would take the request at its word.
    if request.k_min > request.k_max:
        raise ConfigError(
            f"k_min = {request.k_min} is more than k_max = {request.k_max}",
            hint=f"Give k_max = {request.k_min} or more.",
        )
    drawn = request.entry_kind == "sampled"
    if drawn != (request.draws > 0) or (drawn and request.at_student):
        raise ConfigError(
            f"entry_kind = {request.entry_kind!r} with draws = {request.draws} and "
            f"at_student = {request.at_student}",
            hint="Give draws to entry_kind = 'sampled' and to no other, without at_student.",
        )
    if request.entry_kind == "topk" and request.k_min < request.k_max:
        raise ConfigError(
            f"entry_kind = 'topk' with k_min = {request.k_min} and k_max = {request.k_max}",
            hint="Give the same k twice, or entry_kind = 'topp'.",
        )
    needs = {"entropy", "tail", "drawn" if drawn else "top"}
    needs |= {"at_ids"} if request.at_student or chosen else set()
    # Bounds of an entropy, and a tail that is what the ids it tells leave, stand for both.
    gives = scorer.capabilities
    gives |= {"entropy", "tail"} if "bounds" in gives else set()
    if lacking := sorted(needs - gives):
        raise ConfigError(
            f"the backend {scorer.describe()['name']} cannot give {', '.join(lacking)} here",
            hint="Load the teacher with the backend hf, which gives all.",
        )
