"""Student and teacher that continue the student's responses, cut at some lengths.

In the paper (Sec. 6.1, Fig. 11b) the teacher's advantage in accuracy shrinks with the length of the
prefix that the student wrote: +0.37 after 1,000 tokens, +0.27 after 4,000, +0.15 after 8,000, +0.02
after 16,000. Where it is gone, the teacher cannot repair what precedes, and its scores of later
tokens hardly help.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from logitcask.engine.probes.candidates.agreement import Estimate, estimate
from logitcask.engine.prompts.graders import Grader
from logitcask.engine.types import Array, Prompt, Rollouts


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """A prompt, and the beginning of a stored response to it."""

    prompt: Prompt
    """As stored."""
    response: tuple[int, ...]
    """The first tokens of the response, as sampled."""

    def as_prompt(self) -> Prompt:
        """Return prompt and prefix as one prompt of exact ids; without a prefix the stored one."""
        if not self.response:
            return self.prompt
        ids = (*self.prompt.token_ids, *self.response)
        return replace(self.prompt, id=f"{self.prompt.id}+{len(self.response)}", token_ids=ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Accuracies after prefixes of one length; means over prompts, ± standard errors."""

    at: int
    """Tokens of the prefix."""
    prompts: int
    student: Estimate | None
    """None, as the others, without a prompt that has so long a response."""
    teacher: Estimate | None
    advantage: Estimate | None
    """The teacher's accuracy less the student's, paired by prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinuationReport:
    """One cut a length, the shortest first."""

    n: int
    """Continuations of each prefix, of each model."""
    cuts: tuple[Cut, ...]
    reading: str


def prefixes(rollouts: Iterable[Rollouts], at: int, limit: int) -> list[Prefix]:
    """Return the prefix of `at` tokens of each prompt's first response that is longer, at most
    `limit` of them.
    """
    found: dict[str, Prefix] = {}
    for each in rollouts:
        for of, start, length in zip(
            each.seq_prompt, each.seq_off[:-1], each.lengths(), strict=True
        ):
            prompt = each.prompts[of]
            if len(found) == limit:
                return list(found.values())
            if length > at and prompt.id not in found:
                response = tuple(each.tokens[start : start + at].tolist())
                found[prompt.id] = Prefix(prompt=prompt, response=response)
    return list(found.values())


def grade(chosen: Sequence[Prefix], rolled: Rollouts, grader: Grader, correct_from: float) -> Array:
    """Return [M] the share of correct responses of each prefix, the prefix being part of them.

    rolled: n continuations of each prefix, in order.
    """
    right = np.zeros(len(chosen))
    off = rolled.seq_off
    for of, start, end in zip(rolled.seq_prompt, off[:-1], off[1:], strict=True):
        whole = [*chosen[of].response, *rolled.tokens[start:end].tolist()]
        right[of] += grader.grader(chosen[of].prompt, grader.decode(whole)) >= correct_from
    return right / np.maximum(np.bincount(rolled.seq_prompt, minlength=len(chosen)), 1)


def continuation_report(
    n: int, student: Mapping[int, Array], teacher: Mapping[int, Array]
) -> ContinuationReport:
    """Compare accuracies [M] of both models after prefixes of each length."""
    cuts = []
    for at in sorted(student):
        s, t = student[at], teacher[at]
        each = np.arange(len(s))
        known = len(s) > 0
        cuts.append(
            Cut(
                at=at,
                prompts=len(s),
                student=estimate(s, each) if known else None,
                teacher=estimate(t, each) if known else None,
                advantage=estimate(t - s, each) if known else None,
            )
        )
    return ContinuationReport(n=n, cuts=tuple(cuts), reading=_reading(cuts))


def _reading(cuts: Sequence[Cut]) -> str:
    known = [(each.at, each.advantage) for each in cuts if each.advantage is not None]
    if not known:
        return "no response is longer than any of these lengths"
    (first_at, first), (last_at, last) = known[0], known[-1]
    shown = f"the teacher's advantage is {first.mean:+.3f} at {first_at} tokens"
    if first.beyond(0) <= 0:
        return f"{shown}, within two standard errors of 0 or below: it continues no better"
    if len(known) == 1:
        return f"{shown}; more lengths show whether it shrinks"
    shown += f" and {last.mean:+.3f} at {last_at}"
    if last.beyond(0) <= 0:
        return (
            f"{shown}, where nothing shows that it is above 0: the teacher cannot repair prefixes "
            "of that length, so in the paper shorter responses train better"
        )
    if last.beyond(first.mean) < 0:
        return f"{shown}: it shrinks, as in the paper (+0.37 at 1,000 tokens, +0.02 at 16,000)"
    return f"{shown}: nothing shows that it shrinks within these lengths"
