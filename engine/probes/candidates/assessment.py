"""The assessment on a teacher before a distillation: one rule on few numbers, with its thresholds.

Two conditions of arXiv 2604.13016 (Sec. 3): the thinking patterns of student and teacher agree, and
the teacher knows what the student's own pipeline did not teach.

The first is read from the overlap masses (Eq. 9 and 10), each divided by the mass of its model's
own top-k, which bounds it: the share of a top-k's mass that lies on common ids. The ratio (Eq. 6)
counts ranks of ids with next to no mass, so its level depends on the vocabulary. A pattern may also
be chosen at one token and look alike behind it, so the weakest position counts, too: where one
token rarely serves both models (acceptance, as of speculative decoding). The second needs
graded responses. A better teacher is not sufficient: in the paper R1-Distill-7B is better than its
student and helps little. We expect such a teacher to be as unsure as its student on the student's
text, and a post-trained one to be surer; so "likely" asks for a lower entropy, too.

The thresholds are ours, not the paper's. A number that is not two standard errors from its
threshold decides nothing.
"""

from dataclasses import dataclass
from typing import Literal

from logitcask.engine.probes.candidates.agreement import Estimate

LIKELY: Literal["likely to work"] = "likely to work"
LITTLE_NEW: Literal["same pipeline, little new"] = "same pipeline, little new"
OTHER: Literal["other thinking pattern"] = "other thinking pattern"
UNKNOWN: Literal["cannot tell"] = "cannot tell"
Assessment = Literal[
    "likely to work", "same pipeline, little new", "other thinking pattern", "cannot tell"
]
ASSESSMENTS: tuple[Assessment, ...] = (LIKELY, UNKNOWN, LITTLE_NEW, OTHER)
"""The best first."""

OTHER_BELOW = 0.90
"""Common share of the top-k's mass under which the patterns differ. In the paper (Fig. 18) the
overlap masses themselves are 0.97 to 0.99."""
SAME_ABOVE = 0.95
"""Common share over which they agree; between the two it decides nothing."""
OTHER_AT, SAME_AT = 0.25, 0.5
"""The same two for the acceptance at the weakest position."""
NEW_ABOVE = 0.2
"""Share of the student's wrong responses that a teacher with much new would turn into right ones:
its gain in accuracy, divided by what the student lacks."""
SURER_BELOW = 0.9
"""Entropy of the teacher over that of the student, on the student's text, under which the teacher
is surer."""
LEAST_PROMPTS = 16
"""Prompts under which a standard error is not trusted."""

REFERENCES = (
    ("JustRL-1.5B teaches R1-Distill-1.5B", "ratio 72 % to 91 %, > 80 % of the gap (Fig. 6)"),
    ("R1-Distill-7B teaches it", "ratio 75 %, stays flat, 5 % of the gap (Fig. 4, 6)"),
    ("Skywork-OR1-Math-7B teaches it", "ratio 72 %, 17 % of the gap (Fig. 4)"),
    ("Qwen3-4B teaches Qwen3-1.7B", "ratio 75.7 %, 16 % of the gap (Fig. 4)"),
    ("Qwen3-4B after RL teaches it", "ratio 70.3 %, 59 % of the gap (Fig. 4)"),
    ("overlap masses", "97 to 99 % throughout (Fig. 18)"),
)
"""(What, its level in the paper), all at k = 16 on math."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """The numbers that an assessment rests on."""

    prompts: int
    common: Estimate
    """Overlap mass over the mass of the top-k, of the model where it is smaller."""
    weakest_at: int
    weakest: Estimate | None
    """Position with the lowest acceptance, and its mean there; None without one of enough
    prompts."""
    entropy_ratio: Estimate
    """H(q) / H(p), means over the student's text; 1 for two models without entropy."""
    new: Estimate | None
    """Mean over prompts of (teacher's - student's accuracy) - NEW_ABOVE (1 - student's accuracy):
    above 0 the teacher has much new. None without graded responses of both."""
    gain: Estimate | None
    """The teacher's accuracy less the student's."""


def assessment(found: Evidence) -> tuple[Assessment, str]:
    """Return the assessment and what it rests on, one sentence."""
    if found.prompts < LEAST_PROMPTS:
        return UNKNOWN, (
            f"{found.prompts} prompts are too few: give {LEAST_PROMPTS} or more, --limit"
        )
    share = f"{_shown(found.common)} of the mass of a top-k is common"
    if found.common.beyond(OTHER_BELOW) < 0:
        return OTHER, (
            f"{share}, less than {OTHER_BELOW:g}: where the student writes, the teacher would "
            "write something else; a cold start on the teacher's text comes first"
        )
    weakest = found.weakest
    part = (
        "" if weakest is None else f"at token {found.weakest_at} of the response {_shown(weakest)}"
    )
    if weakest is not None and weakest.beyond(OTHER_AT) < 0:
        return OTHER, (
            f"{share}, but {part} of the mass agrees, less than {OTHER_AT:g}: the teacher would go "
            "another way there; a cold start on its text comes first"
        )
    if found.common.beyond(SAME_ABOVE) <= 0:
        return UNKNOWN, (
            f"{share}, which is clearly neither above {SAME_ABOVE:g} nor below {OTHER_BELOW:g}"
        )
    if weakest is not None and weakest.beyond(SAME_AT) < 0:
        return UNKNOWN, (
            f"{share}, but {part} of the mass agrees, less than {SAME_AT:g}: look whether the "
            "teacher goes another way there"
        )
    if found.new is None or found.gain is None:
        return UNKNOWN, (
            f"{share}, so the patterns agree, but nothing shows what the teacher knows: give "
            "--grader, and a teacher that can sample here"
        )
    gain = f"the teacher's accuracy less the student's is {_shown(found.gain)}"
    limit = f"{NEW_ABOVE:.0%} of what the student lacks"
    if found.new.beyond(0) < 0:
        return LITTLE_NEW, f"{share}, so the patterns agree, and {gain}, less than {limit}"
    if found.new.beyond(0) == 0:
        return UNKNOWN, (
            f"{share}, so the patterns agree, but {gain}, within two standard errors of {limit}; "
            "more prompts narrow the error"
        )
    sure = f"its entropy is {_shown(found.entropy_ratio)} of the student's"
    if found.entropy_ratio.beyond(SURER_BELOW) >= 0:
        return UNKNOWN, (
            f"{share}, so the patterns agree, and {gain}, but {sure}, not clearly less than "
            f"{SURER_BELOW:g}: so is that of a bigger model of the same pipeline, which helped "
            "little in the paper"
        )
    return LIKELY, f"{share}, so the patterns agree; {gain}, and where the student writes {sure}"


def _shown(each: Estimate) -> str:
    return f"{each.mean:.3f}" + ("" if each.se is None else f" ± {each.se:.3f}")
