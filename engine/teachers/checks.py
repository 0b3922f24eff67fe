"""Checks before scoring: teacher and student, stop ids, dtypes, and the scorer's capabilities."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from logitcask.engine.alignment.alignment import Alignment
from logitcask.engine.backends.base import Scorer
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.teachers.token_maps import SharedVocabulary
from logitcask.engine.types import ALL_POSITIONS, STOP, ModelRef, Rollouts, ScoreParams


def check_identity(
    student: Mapping[str, Any],
    model: ModelRef,
    shared: SharedVocabulary | None = None,
    alignment: Alignment | None = None,
) -> list[str]:
    """Compare tokenizer and template of teacher and student, and return notes on differences.

    student: its provenance; shared: the shared vocabulary, if their tokenizers differ; alignment:
    of a teacher that scores spans. Raises IdentityError for a tokenizer that differs otherwise.
    """
    if alignment is not None:
        return [_spans_note(student, model, alignment)]
    notes = []
    if shared is not None and shared.matches(student["tokenizer"], model):
        notes.append(shared.note(model.name))
    elif student["tokenizer"] != model.tokenizer_digest:
        raise IdentityError(
            f"the student's tokenizer is {student['tokenizer']}, "
            f"that of {model.name} is {model.tokenizer_digest}",
            hint="take a teacher with the student's tokenizer; if they differ only in tokens "
            "that do not occur, give the student's, a folder or hub id, with --student-tokenizer; "
            "for any other, score its spans and take an objective over spans",
        )
    elif student["n_vocab"] != model.n_vocab:
        raise IdentityError(
            f"the student's vocabulary has {student['n_vocab']} ids, "
            f"that of {model.name} has {model.n_vocab}",
            hint="take a teacher with the student's vocabulary; there is no override",
        )
    if student["template"] != model.template_digest:
        notes.append(
            f"{model.name} renders prompts differently from the student; it scores the "
            "student's rendering, which may be unusual for it"
        )
    return notes


def _spans_note(student: Mapping[str, Any], model: ModelRef, alignment: Alignment) -> str:
    """Return the note on a teacher that scores spans; IdentityError for other tokenizers."""
    if not alignment.matches(student["tokenizer"], model):
        raise IdentityError(
            f"rollouts of a student with the tokenizer {student['tokenizer']}, and the alignment "
            f"with {model.name} is of {alignment.tokenizers[0]}",
            hint="score the rollouts of each tokenizer from a name of their own",
        )
    return (
        f"{model.name} has another tokenizer than the student: it scores the same bytes in its "
        "own tokens, and training takes an objective over spans"
    )


def check_spans(teacher: str, *, extra_ids: str, positions: str, selection: str) -> None:
    """Raise ConfigError for a request that scores over spans cannot serve. teacher: its name."""
    for key, value, served in (
        ("extra_ids", extra_ids, ""),
        ("positions", positions, ALL_POSITIONS),
        ("selection", selection, "top-k" if selection == "top-k" else "top-p"),
    ):
        if value != served:
            raise ConfigError(
                f"{key} = {value}: {teacher} has another tokenizer than the student, and scores "
                "over spans have no such ids or positions",
                hint=f"leave --{key.replace('_', '-')} out",
            )


def check_stops(
    rollouts: Rollouts,
    eos_rows: str,
    *,
    name: str,
    student: Iterable[int],
    teacher: str,
    stop_ids: Collection[int],
) -> None:
    """Raise IdentityError for responses that end in a stop id that the teacher does not use.

    Its probability under the teacher is next to 0: one huge KL row in every sequence. With
    eos_rows = "keep" such rows are allowed. name: of the rollouts; student: stop ids of their
    student; teacher, stop_ids: name and stop ids of the teacher.
    """
    others = sorted(set(student) - set(stop_ids))
    if eos_rows == "keep" or not others:
        return
    ends = rollouts.tokens[rollouts.seq_off[1:][rollouts.finish == STOP] - 1]
    found = np.intersect1d(ends, others)
    if len(found):
        share = float(np.isin(ends, found).mean())
        raise IdentityError(
            f"{share:.0%} of the stopped responses of {name!r} end in the stop ids "
            f"{found.tolist()}, and {teacher} stops at {list(stop_ids)} only",
            hint="keep these rows with --foreign-eos keep, or add "
            "these eos_token_id to the teacher's "
            "config.json",
        )


def check_scorer(scorer: Scorer, request: ScoreParams, *, chosen: bool = False) -> None:
    """Raise ConfigError for a request that no row can meet, or that the scorer does not support.

    chosen: the request has extra ids too.
    """
    # Training relies on the request, so one that no row can meet is rejected.
    if request.k_min > request.k_max:
        raise ConfigError(
            f"k_min = {request.k_min} is more than k_max = {request.k_max}",
            hint=f"give k_max = {request.k_min} or more",
        )
    drawn = request.entry_kind == "sampled"
    if drawn != (request.draws > 0) or (drawn and request.at_student):
        raise ConfigError(
            f"entry_kind = {request.entry_kind!r} with draws = {request.draws} and "
            f"at_student = {request.at_student}",
            hint="give draws with entry_kind = 'sampled' only, and without at_student",
        )
    if request.entry_kind == "topk" and request.k_min < request.k_max:
        raise ConfigError(
            f"entry_kind = 'topk' with k_min = {request.k_min} and k_max = {request.k_max}",
            hint="give the same k twice, or entry_kind = 'topp'",
        )
    needs = {"entropy", "tail", "drawn" if drawn else "top"}
    needs |= {"at_ids"} if request.at_student or chosen else set()
    # "bounds" is accepted in place of both.
    gives = scorer.capabilities
    gives |= {"entropy", "tail"} if "bounds" in gives else set()
    if lacking := sorted(needs - gives):
        raise ConfigError(
            f"the backend {scorer.describe()['name']} cannot give {', '.join(lacking)} here",
            hint="load the teacher with the backend hf, which has all capabilities",
        )
