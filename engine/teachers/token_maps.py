"""Two tokenizers over one vocabulary: what they share, and the ids that are not one token to both.

Log-probs are compared by id, so an id must be the same token to student and teacher. Members of one
family differ in tokens that were added or renamed, which does no harm where those ids do not occur:
not in a prompt or a response, not among the ids that a teacher is asked at, and not among its own
likely ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcask.engine.errors import IdentityError, UnitError
from logitcask.engine.models.fingerprint import MIN_PROB
from logitcask.engine.models.identity import resolve_model, tokenizer_digest
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.types import Array, IdLists, ModelRef, Rollouts, ScoreParams, Scores

SHOWN = 6
"""Ids that a line names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedVocabulary:
    """How a teacher's tokenizer differs from the student's."""

    n_vocab: int
    """Highest id that both know + 1."""
    differing: Array
    """[D] int64, in order: ids that are another token to the teacher than to the student, or to one
    of them none."""
    theirs: Mapping[int, str]
    """What these are to the teacher; "" = none."""
    ours: Mapping[int, str]
    """... and to the student."""
    student: str
    """Digest of the student's tokenizer."""
    teacher: str

    def is_of(self, student: str, teacher: ModelRef) -> bool:
        """Whether it is about these: a digest of the student's tokenizer, and a teacher that is
        asked over the ids that both know.
        """
        asked = (teacher.tokenizer_digest, teacher.n_vocab)
        return (student, *asked) == (self.student, self.teacher, self.n_vocab)

    def note(self, name: str) -> str:
        """What differs, for a person; `name` of the teacher."""
        return (
            f"{name} and the student read ids otherwise ({len(self.differing)}), which does no "
            f"harm as long as they do not occur: {self.words(self.differing)}"
        )

    def words(self, ids: Array) -> str:
        """What ids are to both, the first of them."""
        told = [
            f"{i} ({_word(self.ours[i])} to the student, {_word(self.theirs[i])} to the teacher)"
            for i in ids[:SHOWN].tolist()
        ]
        more = [f"and {len(ids) - SHOWN} more"] if len(ids) > SHOWN else []
        return ", ".join([*told, *more])

    def check_asked(
        self,
        rollouts: Rollouts,
        request: ScoreParams,
        at: IdLists | None,
        name: str,
        *,
        prompts: bool = True,
    ) -> None:
        """UnitError where one of the ids occurs in what the teacher, `name`, would be shown or
        asked at.
        """
        for prompt in rollouts.prompts if prompts else ():
            self.check(np.array(prompt.token_ids, np.int64), f"prompt {prompt.id!r}", name)
        self.check(rollouts.tokens, "the responses", name)
        if at is not None:
            self.check(at.ids, "the ids that are asked at", name)
        elif request.at_student and rollouts.student is not None:
            self.check(rollouts.student.ids, "the student's best ids", name)

    def check_answered(self, scores: Scores, request: ScoreParams, name: str) -> None:
        """UnitError where the teacher draws one of the ids, or holds it for likely."""
        told = scores.entry_lp > np.log(MIN_PROB)
        if request.entry_kind == "sampled":
            told[:] = True
        self.check(scores.ids[told], "the teacher's likely ids", name)

    def check(self, ids: Array, where: str, name: str) -> None:
        """UnitError where one of the ids is among these."""
        found = np.intersect1d(ids.astype(np.int64), self.differing)
        if len(found):
            raise UnitError(
                f"{where}: ids that are not one token to the student and to {name} "
                f"({len(found)}): {self.words(found)}",
                hint="Take a teacher with the student's tokenizer, or sample where these ids do "
                "not occur; there is no override, log-probs of two tokens would be compared.",
            )


def shared_vocabulary(
    student: Mapping[str, Any], teacher: ModelRef, source: str = ""
) -> SharedVocabulary | None:
    """What the two tokenizers share; None where they are the same, or `source` is not given.

    student: its lineage; source: a folder or hub id with its tokenizer, which the lineage names by
    a digest alone. Raises IdentityError where that holds another tokenizer, or where the two agree
    on less than half of all ids; ModelError where it cannot be found.
    """
    if student["tokenizer"] == teacher.tokenizer_digest or not source:
        return None
    ours = load_tokenizer(resolve_model(source, weights=False))
    if tokenizer_digest(ours) != student["tokenizer"]:
        raise IdentityError(
            f"the tokenizer in {source} is {tokenizer_digest(ours)}, and that of the student is "
            f"{student['tokenizer']}",
            hint="Give the folder or hub id of the student that sampled, or its tokenizer's.",
        )
    theirs = load_tokenizer(teacher.path)
    return compare_maps(_by_id(ours), _by_id(theirs), student["tokenizer"], teacher)


def compare_maps(
    ours: Mapping[int, str], theirs: Mapping[int, str], student: str, teacher: ModelRef
) -> SharedVocabulary:
    """ours, theirs: {id: token}; student: digest of the student's tokenizer."""
    both = ours.keys() & theirs.keys()
    same = [i for i in both if ours[i] == theirs[i]]
    every = ours.keys() | theirs.keys()
    if 2 * len(same) < len(every):
        raise IdentityError(
            f"the student's tokenizer and that of {teacher.name} agree on {len(same)} of "
            f"{len(every)} ids",
            hint="Take a teacher with the student's tokenizer; there is no override, ids would "
            "mean other tokens.",
        )
    differing = sorted(every - set(same))
    return SharedVocabulary(
        n_vocab=max(both) + 1,
        differing=np.array(differing, np.int64),
        theirs={i: theirs.get(i, "") for i in differing},
        ours={i: ours.get(i, "") for i in differing},
        student=student,
        teacher=teacher.tokenizer_digest,
    )


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def _word(token: str) -> str:
    return repr(token[:40]) if token else "none"
