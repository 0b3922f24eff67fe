"""Comparison of two tokenizers over one vocabulary: shared ids, and ids of different tokens.

Log-probs are compared by id, so an id must be the same token to student and teacher. Models of one
family differ in added or renamed tokens. That is harmless if those ids do not occur: in a prompt, a
response, the chosen ids, or the teacher's likely ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.engine.errors import ConfigError, IdentityError, ModelError, UnitError
from logitcask.engine.models.fingerprint import MIN_PROB
from logitcask.engine.models.identity import resolve_model, tokenizer_digest
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.types import Array, IdLists, ModelRef, Rollouts, ScoreParams, Scores

SHOWN = 6
"""Maximum number of ids in a message."""


class OtherVocabulary(IdentityError):
    """Two tokenizers that agree on less than half of all ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedVocabulary:
    """Differences between a teacher's tokenizer and the student's."""

    n_vocab: int
    """Highest id of both tokenizers + 1."""
    differing: Array
    """[D] int64, sorted: ids of different tokens, or of a token in only one of the tokenizers."""
    theirs: Mapping[int, str]
    """Tokens of the differing ids in the teacher's tokenizer; "" = none."""
    ours: Mapping[int, str]
    """... and in the student's."""
    student: str
    """Digest of the student's tokenizer."""
    teacher: str

    def matches(self, student: str, teacher: ModelRef) -> bool:
        """Return True for this digest of a student's tokenizer, and a teacher over shared ids."""
        found = (student, teacher.tokenizer_digest, teacher.n_vocab)
        return found == (self.student, self.teacher, self.n_vocab)

    def note(self, name: str) -> str:
        """Format the differences; name: of the teacher."""
        return (
            f"{name} and the student differ in {len(self.differing)} ids, which is harmless as "
            f"long as they do not occur: {self.format_ids(self.differing)}"
        )

    def format_ids(self, ids: Array) -> str:
        """Format the first ids with their tokens in both tokenizers."""
        shown = [
            f"{i} ({_word(self.ours[i])} to the student, {_word(self.theirs[i])} to the teacher)"
            for i in ids[:SHOWN].tolist()
        ]
        more = [f"and {len(ids) - SHOWN} more"] if len(ids) > SHOWN else []
        return ", ".join([*shown, *more])

    def check_request(
        self,
        rollouts: Rollouts,
        request: ScoreParams,
        extra_ids: IdLists | None,
        name: str,
        *,
        prompts: bool = True,
    ) -> None:
        """Raise UnitError if a differing id is in the prompts, the responses or the chosen ids."""
        for prompt in rollouts.prompts if prompts else ():
            self.check(np.array(prompt.token_ids, np.int64), f"prompt {prompt.id!r}", name)
        self.check(rollouts.tokens, "the responses", name)
        if extra_ids is not None:
            self.check(extra_ids.ids, "the chosen ids", name)
        elif request.at_student and rollouts.student is not None:
            self.check(rollouts.student.ids, "the student's best ids", name)

    def check_scores(self, scores: Scores, request: ScoreParams, name: str) -> None:
        """Raise UnitError if a differing id is likely to the teacher, or drawn from it."""
        likely = scores.entry_lp > np.log(MIN_PROB)
        if request.entry_kind == "sampled":
            likely[:] = True
        self.check(scores.ids[likely], "the teacher's likely ids", name)

    def check(self, ids: Array, where: str, name: str) -> None:
        """Raise UnitError if a differing id is among these."""
        found = np.intersect1d(ids.astype(np.int64), self.differing)
        if len(found):
            raise UnitError(
                f"{where}: ids of different tokens to the student and to {name} "
                f"({len(found)}): {self.format_ids(found)}",
                hint="take a teacher with the student's tokenizer, or prompts where these ids do "
                "not occur; or score spans of equal bytes, under another name: --by-spans",
            )


def shared_vocabulary(
    student: Mapping[str, Any], teacher: ModelRef, source: str = ""
) -> SharedVocabulary | None:
    """Compare two tokenizers; None if they are the same, or without `source`.

    student: its provenance, with a digest of its tokenizer; source: a folder or hub id with that
    tokenizer. Raises IdentityError if source has another tokenizer, OtherVocabulary if the two
    agree on less than half of all ids, ModelError if it is not found.
    """
    if student["tokenizer"] == teacher.tokenizer_digest or not source:
        return None
    return compare_tokenizers(student, teacher, source)


def compare_tokenizers(
    student: Mapping[str, Any], teacher: ModelRef, source: str = ""
) -> SharedVocabulary:
    """Compare two tokenizers that are not the same.

    source: as of `student_tokenizer`. Raises as that, and OtherVocabulary if the two agree on less
    than half of all ids.
    """
    ours, theirs = student_tokenizer(student, source), load_tokenizer(teacher.path)
    return compare_maps(
        _by_id(ours),
        _by_id(theirs),
        student["tokenizer"],
        teacher.tokenizer_digest,
        name=teacher.name,
    )


def student_tokenizer(student: Mapping[str, Any], source: str = "") -> Any:
    """Load the tokenizer of a student.

    student: its provenance; source: a folder or hub id with that tokenizer, "" = the recorded name
    of the student. Raises IdentityError if `source` has another tokenizer, ModelError if it is not
    found; ConfigError for either of a recorded name.
    """
    name, revision = (
        (source, "") if source else (student.get("name", ""), student.get("revision", ""))
    )
    try:
        found = load_tokenizer(resolve_model(name, revision, weights=False))
    except ModelError as error:
        if source:
            raise
        raise ConfigError(
            f"the teacher has another tokenizer than the student, and that of the student, "
            f"{name!r:.80}, is not here: {error.cause}",
            hint="give a folder or hub id with the student's tokenizer: --student-tokenizer",
        ) from error
    if (digest := tokenizer_digest(found)) == student["tokenizer"]:
        return found
    cause = f"the tokenizer in {name} is {digest}, and that of the student is "
    cause += str(student["tokenizer"])
    if source:
        hint = "give the folder or hub id of the student that sampled, or of its tokenizer"
        raise IdentityError(cause, hint=hint)
    raise ConfigError(
        cause, hint="give a folder or hub id with the student's tokenizer: --student-tokenizer"
    )


def compare_folders(student: Path, teacher: Path, name: str) -> SharedVocabulary | None:
    """Compare the tokenizers of two model folders, before weights are read; None if all ids agree.

    name: of the teacher. Raises ModelError for a folder without a tokenizer, and as
    `compare_maps`.
    """
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    ours_digest, theirs_digest = tokenizer_digest(ours), tokenizer_digest(theirs)
    if ours_digest == theirs_digest:
        return None
    return compare_maps(_by_id(ours), _by_id(theirs), ours_digest, theirs_digest, name=name)


def compare_maps(
    ours: Mapping[int, str], theirs: Mapping[int, str], student: str, teacher: str, *, name: str
) -> SharedVocabulary:
    """Compare {id: token} of student and teacher.

    student, teacher: digests of their tokenizers; name: of the teacher. Raises OtherVocabulary if
    they agree on less than half of all ids.
    """
    both = ours.keys() & theirs.keys()
    same = [i for i in both if ours[i] == theirs[i]]
    every = ours.keys() | theirs.keys()
    if 2 * len(same) < len(every):
        raise OtherVocabulary(
            f"the student's tokenizer and that of {name} agree on {len(same)} of {len(every)} ids",
            hint="take a teacher with the student's tokenizer, as ids are compared here; `score` "
            "takes others too, and stores their scores of spans",
        )
    differing = sorted(every - set(same))
    return SharedVocabulary(
        n_vocab=max(both) + 1,
        differing=np.array(differing, np.int64),
        theirs={i: theirs.get(i, "") for i in differing},
        ours={i: ours.get(i, "") for i in differing},
        student=student,
        teacher=teacher,
    )


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def _word(token: str) -> str:
    return repr(token[:40]) if token else "none"
