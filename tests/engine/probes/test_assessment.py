"""The assessment follows from the numbers and their errors, and is open where they are."""

from dataclasses import replace

import pytest

from logitcask.engine.probes.candidates.agreement import Estimate
from logitcask.engine.probes.candidates.assessment import (
    LIKELY,
    LITTLE_NEW,
    OTHER,
    UNKNOWN,
    Evidence,
    assessment,
)


def at(mean: float, se: float | None = 0.004) -> Estimate:
    return Estimate(mean=mean, se=se)


GOOD = Evidence(
    prompts=64,
    common=at(0.99),
    weakest_at=3,
    weakest=at(0.7, 0.05),
    entropy_ratio=at(0.5),
    new=at(0.2, 0.04),
    gain=at(0.35, 0.04),
)
CASES = {
    "all is clear": ({}, LIKELY),
    "no prompts": ({"prompts": 15}, UNKNOWN),
    "one prompt has no error": ({"common": at(0.5, None)}, UNKNOWN),
    "another pattern": ({"common": at(0.8)}, OTHER),
    "another pattern, without a grader": ({"common": at(0.8), "new": None}, OTHER),
    "mass at the lower threshold": ({"common": at(0.894)}, UNKNOWN),
    "mass between both": ({"common": at(0.93)}, UNKNOWN),
    "mass at the upper threshold": ({"common": at(0.957)}, UNKNOWN),
    "a wide error": ({"common": at(0.99, 0.03)}, UNKNOWN),
    "one token of another pattern": ({"weakest": at(0.1, 0.02)}, OTHER),
    "one token, unclear": ({"weakest": at(0.3, 0.05)}, UNKNOWN),
    "one token, within the error": ({"weakest": at(0.45, 0.1)}, LIKELY),
    "no position with many prompts": ({"weakest": None}, LIKELY),
    "no grader": ({"new": None, "gain": None}, UNKNOWN),
    "as good as the student": ({"new": at(-0.13, 0.04), "gain": at(0.0, 0.04)}, LITTLE_NEW),
    "worse than the student": ({"new": at(-0.5, 0.04), "gain": at(-0.4, 0.04)}, LITTLE_NEW),
    "perhaps better": ({"new": at(0.05, 0.04)}, UNKNOWN),
    "perhaps not": ({"new": at(-0.05, 0.04)}, UNKNOWN),
    "better, as unsure": ({"entropy_ratio": at(1.0)}, UNKNOWN),
    "better, perhaps surer": ({"entropy_ratio": at(0.895)}, UNKNOWN),
    "the student itself": ({"entropy_ratio": at(1.0), "new": at(-0.1, 0.01)}, LITTLE_NEW),
    "two perfect models": ({"new": at(0.0, 0.0), "gain": at(0.0, 0.0)}, UNKNOWN),
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    changes, expected = CASES[name]
    said, because = assessment(replace(GOOD, **changes))
    assert said == expected
    assert because


def test_a_wider_error_never_gives_another_assessment() -> None:
    """Scale every error up: an assessment may become `cannot tell`, and no other one."""
    for changes, expected in CASES.values():
        found = replace(GOOD, **changes)
        for scale in (1.5, 4.0, 100.0):
            wide = {
                name: Estimate(mean=each.mean, se=None if each.se is None else scale * each.se)
                for name in ("common", "weakest", "entropy_ratio", "new", "gain")
                if (each := getattr(found, name)) is not None
            }
            assert assessment(replace(found, **wide))[0] in (expected, UNKNOWN)
