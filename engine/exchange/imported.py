"""A sequence of another program in one form: prompt, response and loss mask as token ids.

`formats.py` reads the files of each program into this form, and `adopt.py` commits it.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logitcask.engine.models.identity import digest
from logitcask.engine.prompts.lines import Line, kind
from logitcask.engine.types import Array

_ROUNDING = 1e-2
"""Nats by which a log-prob may be above 0."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherRows:
    """A teacher's best ids for the R tokens of a response, flat, rows ragged."""

    lp: Array
    """[R] float32, log-prob of the token, nats; NaN where it is not among the ids."""
    cnt: Array
    """[R] uint16, ids of each row."""
    ids: Array
    """[E] uint32, best first."""
    entry_lp: Array
    """[E] float32, their log-probs."""
    rescaled: int
    """Rows that were divided by their sum, as their rounded masses were above 1."""
    exact: bool
    """False for log-probs that the format rounds."""

    def digest(self) -> str:
        """Return the digest of all arrays."""
        arrays = (self.lp, self.cnt, self.ids, self.entry_lp)
        data = b"".join(np.ascontiguousarray(each).tobytes() for each in arrays)
        return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """One response to a prompt, as ids."""

    id: str
    """Of the prompt; responses to one prompt have the same."""
    prompt: tuple[int, ...]
    """At least one id."""
    response: tuple[int, ...]
    """Up to the last id that counts; ids between may be of tools and of other turns."""
    mask: tuple[int, ...]
    """1 for each id of the response that counts in a loss, else 0."""
    logprobs: tuple[float, ...] | None = None
    """Of each id of the response, nats, under the distribution that it was drawn from; NaN where
    it does not count. None: that distribution is unknown."""
    version: int | None = None
    """Of the model that sampled, as its program counts; None = unknown."""
    reward: float | None = None
    answer: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Other keys, which stay with the prompt."""
    teacher: TeacherRows | None = None
    """Log-probs of a teacher that the file has."""

    def digest(self) -> str:
        """Return the digest of all fields."""
        known = self.logprobs or ()
        fields: list[Any] = [self.id, self.prompt, self.response, self.mask, self.logprobs is None]
        numbers = [None if math.isnan(each) else each for each in known]
        fields += [numbers, self.version, self.reward, self.answer, dict(self.extra)]
        return digest(fields if self.teacher is None else [*fields, self.teacher.digest()])


def sequence(
    line: Line,
    *,
    ids: Sequence[int],
    mask: Sequence[int],
    logprobs: Sequence[float | None] | None = None,
    **fields: Any,
) -> Imported | None:
    """Divide ids at the first that counts, the beginning of the response; None where none does.

    mask: 1 for ids that count, else 0. logprobs: one for each of `ids`, None where unknown. fields:
    of Imported; the id is by default a digest of the prompt. Raises PromptError where the first id
    counts, as no id before it predicts it, and for a log-prob above 0.
    """
    if 1 not in mask:
        return None
    first, end = mask.index(1), len(mask) - mask[::-1].index(1)
    if first == 0:
        line.refuse(
            "the first token counts in the loss, and no token comes before it to predict it",
            "give the prompt too, with 0 in the loss mask",
        )
    known = None
    if logprobs is not None:
        part = zip(logprobs[first:end], mask[first:end], strict=True)
        known = tuple(math.nan if lp is None or not on else float(lp) for lp, on in part)
        counted = [lp for lp, on in zip(known, mask[first:end], strict=True) if on]
        if any(map(math.isnan, counted)):
            known = None  # of some tokens unknown: as good as none
        elif max(counted) > _ROUNDING:
            line.refuse(
                f"a log-prob of {max(counted):g}: it is the logarithm of a probability, 0 or less",
                "correct the file, or leave its log-probs out: they are then unknown",
            )
    prompt = tuple(ids[:first])
    name = digest(prompt).removeprefix("sha256:")[:16]
    return Imported(
        **{"id": f"prompt-{name}", **fields},
        prompt=prompt,
        response=tuple(ids[first:end]),
        mask=tuple(mask[first:end]),
        logprobs=known,
    )


def own_fields(line: Line, used: frozenset[str]) -> dict[str, Any]:
    """Return id, answer and other keys of a line of ours; `used`: keys with another meaning."""
    left = line.keys.keys() - used - {"id", "answer"}
    return {
        **({"id": line.id} if "id" in line.keys else {}),
        "answer": line.answer,
        "extra": {key: line.keys[key] for key in sorted(left)},
    }


def ids_in(line: Line, field: str, value: Any) -> list[int]:
    """Return a list of token ids; PromptError for any other value."""
    if not isinstance(value, list) or not value:
        line.refuse(f'field "{field}": {value!r:.80} is no list of token ids', "write [1, 2, 3]")
    wrong = [each for each in value if type(each) is not int or each < 0]
    if wrong:
        line.refuse(
            f'field "{field}": {wrong[0]!r:.80} is no token id',
            "write the ids as they were sampled, integers of 0 or more",
        )
    return value


def mask_in(line: Line, field: str, value: Any, length: int) -> list[int]:
    """Return a mask of 0 and 1; PromptError for any other value, and for another length."""
    found = _list_of(line, field, value, length)
    wrong = [each for each in found if each not in (0, 1)]
    if wrong:
        line.refuse(
            f'field "{field}": {wrong[0]!r:.80} is none of 0, 1, true and false',
            "write 1 for tokens that count in the loss, and 0 for others",
        )
    return [int(each) for each in found]


def logprobs_in(line: Line, field: str, value: Any, length: int) -> list[float | None]:
    """Return log-probs, None where unknown; PromptError for another value or length."""
    found = _list_of(line, field, value, length)
    wrong = [each for each in found if each is not None and type(each) not in (int, float)]
    if wrong:
        line.refuse(
            f'field "{field}": {wrong[0]!r:.80} is {kind(wrong[0])}, not a number',
            "write natural log-probs of the sampled tokens, or leave the key out",
        )
    return found


def number_in(line: Line, field: str, value: Any) -> float:
    """Return a number; PromptError for any other value."""
    if type(value) not in (int, float):
        line.refuse(f'field "{field}": {value!r:.80} is {kind(value)}, not a number', "correct it")
    return float(value)


def _list_of(line: Line, field: str, value: Any, length: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        size = f"{len(value)} values" if isinstance(value, list) else kind(value)
        line.refuse(
            f'field "{field}": {size}, and there are {length} tokens',
            "write one value for each token",
        )
    return value
