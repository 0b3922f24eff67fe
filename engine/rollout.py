"""Prompts + a sampler -> rollout segments.

Work is planned in units, fixed ranges of consecutive prompts, before anything is sampled. A unit is
sampled, scored by the student itself (whose top-k the store keeps), and committed. What is planned
and not committed is what a resumed run does.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logitcask.engine.backends.base import Sampler, Scorer
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.grade import Grading
from logitcask.engine.rollout_unit import Rolling, Unit, default_unit, mc_request, roll_unit
from logitcask.engine.store import Pin, Segment, Store
from logitcask.engine.teachers.checks import check_scorer
from logitcask.engine.types import (
    STOP,
    ModelRef,
    Progress,
    Prompt,
    SamplingParams,
    silent,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutReport:
    units_total: int
    units_done_before: int
    units_new: int
    positions: int
    """Response tokens of the units that are new; so are the figures below."""
    sequences: int
    seconds: float
    mean_length: float
    """Response tokens of a sequence; 0 where no unit was new."""
    stopped_share: float
    """Share of sequences that ended in a stop token."""
    mean_reward: float | None = None
    """Of a sequence; None where no grader is named or no unit was new."""


def rollout(
    store: Store,
    *,
    model: ModelRef,
    sampler: Sampler,
    scorer: Scorer | None = None,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    name: str = "main",
    seed: int = 0,
    student_k: int = 16,
    mc_draws: int = 0,
    grading: Grading | None = None,
    unit_prompts: int | None = None,
    profile: str = "default",
    progress: Progress = silent,
    first: int = 0,
    count: int | None = None,
    versions: bool = False,
    run: Mapping[str, Any] | None = None,
    lineage_extra: Mapping[str, Any] | None = None,
) -> RolloutReport:
    """Samples every planned unit that the store does not hold yet, and commits it.

    scorer: the student as a scorer; left out, the sampler is one too. student_k: how many of its
    own best ids a row keeps. mc_draws: ids that it draws on every row beside the sampled token,
    from its full softmax at temperature 1. grading: who gives each response its reward.
    unit_prompts: prompts of a unit; left out, as many as can reach UNIT_POSITIONS. profile: how
    entry log-probs are stored. first, count: only so many prompts, in order from `first` and on
    with prompt 0 after the last; left out, from `first` to the last. versions: other versions of
    the student may be under this name already, as in a distillation loop. run: the loop, recorded
    and part of what the name stands for. lineage_extra: more that each segment is to record.
    Raises IdentityError where `name` holds other prompts, sampling, students or units, ConfigError
    for a scorer that cannot draw what mc_draws asks for, GraderError where the grader fails: of
    that unit nothing is committed.
    """
    start_s = time.monotonic()
    asked = rolling(
        store,
        model=model,
        sampler=sampler,
        scorer=scorer,
        prompts=prompts,
        sampling=sampling,
        name=name,
        seed=seed,
        student_k=student_k,
        mc_draws=mc_draws,
        grading=grading,
        unit_prompts=unit_prompts,
        profile=profile,
        first=first,
        count=count,
        versions=versions,
        run=run,
        lineage_extra=lineage_extra,
    )
    missing = plan_rollouts(asked, store.head())
    total, done_before = len(asked.units), len(asked.units) - len(missing)
    positions = sequences = stopped = 0
    rewarded = 0.0
    for done, (key, unit) in enumerate(missing.items()):
        progress("rollout", done_before + done, total)
        rolled = roll_unit(asked, key, unit)
        positions += rolled.positions
        sequences += len(rolled.finish)
        stopped += int((rolled.finish == STOP).sum())
        rewarded += 0.0 if rolled.reward is None else float(rolled.reward.sum(dtype=float))
    progress("rollout", total, total)
    return RolloutReport(
        units_total=total,
        units_done_before=done_before,
        units_new=len(missing),
        positions=positions,
        sequences=sequences,
        seconds=time.monotonic() - start_s,
        mean_length=positions / max(1, sequences),
        stopped_share=stopped / max(1, sequences),
        mean_reward=rewarded / sequences if grading is not None and sequences else None,
    )


def rolling(
    store: Store,
    *,
    model: ModelRef,
    sampler: Sampler,
    scorer: Scorer | None = None,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    name: str = "main",
    seed: int = 0,
    student_k: int = 16,
    mc_draws: int = 0,
    grading: Grading | None = None,
    unit_prompts: int | None = None,
    profile: str = "default",
    first: int = 0,
    count: int | None = None,
    versions: bool = False,
    run: Mapping[str, Any] | None = None,
    lineage_extra: Mapping[str, Any] | None = None,
) -> Rolling:
    """What `rollout` is asked for, with what was left out filled in; raises its ConfigErrors."""
    if scorer is None:
        scorer = _as_scorer(sampler)
    if mc_draws:
        check_scorer(scorer, mc_request(mc_draws, seed))
    if unit_prompts is None:
        unit_prompts = default_unit(sampling)
    count = len(prompts) - first if count is None else count
    if unit_prompts < 1 or not 0 <= first < len(prompts) or not 1 <= count <= len(prompts):
        raise ConfigError(
            f"unit_prompts={unit_prompts}, first={first}, count={count} of {len(prompts)} prompts",
            remedy="Take at least one prompt a unit, and a range that lies within the prompts.",
        )
    return Rolling(
        store=store,
        model=model,
        sampler=sampler,
        scorer=scorer,
        prompts=prompts,
        sampling=sampling,
        name=name,
        seed=seed,
        student_k=student_k,
        mc_draws=mc_draws,
        grading=grading,
        unit_prompts=unit_prompts,
        profile=profile,
        first=first,
        count=count,
        versions=versions,
        run=run,
        lineage_extra=lineage_extra,
    )


def plan_rollouts(asked: Rolling, pin: Pin) -> dict[str, Unit]:
    """unit_key -> what is missing as of a pin, in order. Raises IdentityError as `rollout` does."""
    ours = asked.lineage["set"]
    _check_name(pin, asked.name, asked.model, ours, asked.units, asked.versions)
    there = pin.unit_keys()
    return {key: unit for key, unit in asked.units.items() if key not in there}


def _as_scorer(sampler: Any) -> Scorer:
    if not hasattr(sampler, "score"):
        raise ConfigError(
            f"{type(sampler).__name__} samples and cannot score, and no scorer is given",
            remedy="Give a scorer with the student's weights.",
        )
    scorer: Scorer = sampler
    return scorer


def _check_name(
    pin: Pin,
    name: str,
    model: ModelRef,
    ours: Mapping[str, Any],
    units: Mapping[str, Unit],
    versions: bool,
) -> None:
    """Refuses before anything is sampled what the store would refuse, and what it cannot see."""
    for segment in pin.segments:
        if segment.unit_key in units and segment.name != name:
            raise IdentityError(
                f"these rollouts are in the store already, under the name {segment.name!r}",
                remedy=f"Use that name instead of {name!r}, or another seed.",
            )
    for segment in pin.rollouts(name):
        theirs, student = segment.lineage["set"]["digest"], segment.lineage["student"]
        if theirs != ours["digest"]:
            raise IdentityError(
                f"rollouts {name!r} were made with {_difference(segment.lineage['set'], ours)} "
                f"(set {theirs}, this one is {ours['digest']})",
                remedy="Give these rollouts a name of their own, or use what they were made with.",
            )
        if student["weights"] != model.digest and not versions:
            raise IdentityError(
                f"rollouts {name!r} are of student {student['weights']}, version "
                f"{student['version']}; this one is {model.digest}, version {model.version}",
                remedy="Give these rollouts a name of their own; only distill mixes versions.",
            )
        # A loop's first updates may leave the weights as they are: a version has its own numbers.
        same = (student["weights"], student["version"]) == (model.digest, model.version)
        if same and segment.unit_key not in units:
            _check_grid(name, segment, units)


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first setting in which two sets differ, with both values."""
    for key in {**ours, **theirs}:
        if key not in ("digest", "prompts", "units") and theirs.get(key) != ours.get(key):
            return f"{key} = {theirs.get(key)!r}, not {ours.get(key)!r}"
    return "other prompts, or of another loop"


def _check_grid(name: str, segment: Segment, units: Mapping[str, Unit]) -> None:
    """Two unit sizes would sample the same prompts twice, with the same random numbers."""
    first, end = segment.unit["first"], segment.unit["first"] + segment.unit["count"]
    for unit in units.values():
        if unit["first"] < end and first < unit["first"] + unit["count"]:
            raise IdentityError(
                f"rollouts {name!r} hold prompts {first}..{end - 1} as one unit, and the plan has "
                f"{unit['first']}..{unit['first'] + unit['count'] - 1}",
                remedy="Resume with the unit_prompts, first and count that they were begun with.",
            )
