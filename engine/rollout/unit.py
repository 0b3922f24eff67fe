"""One rollout unit: a range of prompts, sampled, scored by the student itself and committed."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from logitcask.engine.backends.base import Sampler, Scorer
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.models.identity import digest
from logitcask.engine.prompts.graders import Grader
from logitcask.engine.store import Store
from logitcask.engine.teachers.checks import check_scorer
from logitcask.engine.types import (
    NO_DETAIL,
    Array,
    Detail,
    Draws,
    ModelRef,
    Progress,
    Prompt,
    Report,
    Rollouts,
    SamplingParams,
    ScoreParams,
    no_progress,
    no_report,
)

UNIT_POSITIONS = 262_144
"""Response tokens that a unit of the default size can reach."""
LOGPROB = "natural, temperature 1, ids [0, n_vocab)"
SAMPLING_SHARE = 0.75
"""Share of a unit's work that is sampling, about; the rest is the student's own scores. Only the
remaining time depends on it."""

RolloutUnit = Mapping[str, int]
"""Version of the student that samples, first prompt, count of prompts."""


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """A student, its prompts and sampling, and the data that each row keeps.

    Raises ConfigError for a range that does not lie within the prompts, and for a scorer that
    cannot draw `mc_draws` ids.
    """

    store: Store
    model: ModelRef
    """The student."""
    sampler: Sampler
    scorer: Scorer | None = None
    """The student as a scorer; None: the sampler is one too."""
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    name: str = "main"
    """Name of the rollouts in the store."""
    seed: int = 0
    student_k: int = 16
    """Ids of the student's top-k that a row keeps."""
    mc_draws: int = 0
    """Ids drawn on every row in addition to the sampled token, from the full softmax at
    temperature 1."""
    grader: Grader | None = None
    """Rewards each response."""
    stop_token_ids: tuple[int, ...] = ()
    """Stop ids of `model` in addition to those of its files."""
    unit_prompts: int | None = None
    """Prompts of a unit; None: as many as can reach UNIT_POSITIONS."""
    profile: str = "default"
    """Profile in which entry log-probs are stored."""
    first: int = 0
    count: int | None = None
    """Number of prompts, in order from `first`, going on with prompt 0 after the last; None: from
    `first` to the last."""
    versions: bool = False
    """Other versions of the student may be under this name already, as in a distillation loop."""
    run: Mapping[str, Any] | None = None
    """The loop; recorded, and part of the digest of the set."""
    known_digest: str = ""
    """`prompt_set_digest` of all this, where the caller has it; empty = computed."""
    round: int | None = None
    """Round of a loop whose units any version may sample: a unit has the same key by each of them.
    None: its key has the version."""
    draw_version: int | None = None
    """Version whose random numbers are drawn; None = that of `model`."""
    provenance_extra: Mapping[str, Any] | None = None
    """More entries for the provenance of each segment."""

    def __post_init__(self) -> None:
        if self.mc_draws:
            check_scorer(self.student, mc_params(self.mc_draws, self.seed))
        unit, first, count, prompts = self.unit_size, self.first, self.size, len(self.prompts)
        if unit < 1 or not 0 <= first < prompts or not 1 <= count <= prompts:
            raise ConfigError(
                f"unit_prompts={unit}, first={first}, count={count} of {prompts} prompts",
                hint="take at least one prompt per unit, and a range that lies within the prompts",
            )

    @property
    def student(self) -> Scorer:
        """Return the scorer that gives the student's own log-probs."""
        if self.scorer is not None:
            return self.scorer
        sampler: Any = self.sampler
        if not hasattr(sampler, "score"):
            raise ConfigError(
                f"{type(sampler).__name__} samples and cannot score, and no scorer is given",
                hint="give a scorer with the student's weights",
            )
        scorer: Scorer = sampler
        return scorer

    @property
    def unit_size(self) -> int:
        """Return the number of prompts of a unit."""
        return default_unit(self.sampling) if self.unit_prompts is None else self.unit_prompts

    @property
    def size(self) -> int:
        """Return the number of prompts of all units."""
        return len(self.prompts) - self.first if self.count is None else self.count

    @cached_property
    def set_digest(self) -> str:
        return self.known_digest or prompt_set_digest(
            self.prompts,
            self.model,
            self.sampling,
            seed=self.seed,
            student_k=self.student_k,
            mc_draws=self.mc_draws,
            grader=self._grader,
            stop_token_ids=self.stop_token_ids,
            run=self.run,
        )

    @cached_property
    def units(self) -> dict[str, RolloutUnit]:
        """Return unit_key -> unit, planned before sampling starts."""
        found = unit_ranges(self.first, self.size, len(self.prompts), self.unit_size)
        return {
            unit_key(self.set_digest, self.model, at, size, self.round): {
                "version": self.model.version,
                "first": at,
                "count": size,
            }
            for at, size in found
        }

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Return the provenance that every segment records."""
        return {
            "set": {
                "digest": self.set_digest,
                "prompts": len(self.prompts),
                "units": len(self.units),
                **self.sampling.record(),
                "seed": self.seed,
                "student_topk": self.student_k,
                **({"mc_draws": self.mc_draws} if self.mc_draws else {}),
                **({"grader": self._grader} if self._grader else {}),
                **({"stop_token_ids": list(self.stop_token_ids)} if self.stop_token_ids else {}),
                "template": self.model.template_digest,
            },
            "student": self.model.provenance(),
            "backend": self.sampler.describe(),
            "scorer": self.student.describe(),
            "logprob": LOGPROB,
            **({"run": dict(self.run)} if self.run else {}),
            **(self.provenance_extra or {}),
        }

    @property
    def _grader(self) -> str:
        return "" if self.grader is None else self.grader.name


def run_rollout_unit(
    request: RolloutRequest, key: str, unit: RolloutUnit, report: Report = no_report
) -> Rollouts:
    """Sample one unit, score it with the student, commit it under its key, and return it."""
    sampler, scorer, seed, k = request.sampler, request.student, request.seed, request.student_k
    part = request.prompts[unit["first"] : unit["first"] + unit["count"]]

    def sampled(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        share = SAMPLING_SHARE * (done + detail.share) / total
        report(Detail(detail.positions, f"{done:,}/{total:,} sequences", share))

    version = request.model.version
    drawn_as = version if request.draw_version is None else request.draw_version
    rolled = sampler.generate(part, request.sampling, seed=seed, version=drawn_as, progress=sampled)
    if drawn_as != version:
        versions = np.full_like(rolled.version_start, version)
        rolled = replace(rolled, version_start=versions, version_end=versions)
    if request.grader is not None:
        # Before the student's own scores: a failing grader then costs only the sampling.
        rolled = replace(rolled, reward=request.grader.rewards(rolled).astype("float32"))
    own = ScoreParams(top_p=1.0, k_min=k, k_max=k, at_student=False)
    first = SAMPLING_SHARE
    drawn = None
    if request.mc_draws:
        first += (1.0 - SAMPLING_SHARE) / 2
        drawing = scored(report, rolled.positions, "drawn", SAMPLING_SHARE, first)
        drawn = draw(scorer, rolled, mc_params(request.mc_draws, seed), drawing)
    scoring = scored(report, rolled.positions, "scored", first, 1.0)
    student = scorer.score(rolled, own, progress=scoring)
    if request.sampling.is_plain():
        check_same_distribution(rolled.b_lp, student.lp, sampler.describe()["dtype"])
    rolled = replace(rolled, student=student, draws=drawn)
    request.store.commit_rollouts(
        rolled,
        name=request.name,
        unit_key=key,
        unit=unit,
        provenance=request.provenance,
        profile=request.profile,
    )
    return rolled


def check_same_distribution(sampled: Array, student: Array, dtype: str) -> None:
    """Compare [P] log-probs that were sampled from with [P] of the same model as a scorer, nats.

    At temperature 1 without truncation both are the same distribution. Raises ModelError where the
    rounding of `dtype` does not explain their difference.
    """
    gap = np.abs(sampled.astype(np.float64) - student)
    if dtype == "float32":
        found, limit, of = float(gap.max(initial=0.0)), 1e-3, "largest"
    else:
        found, of = float(gap.mean()) if len(gap) else 0.0, "mean"
        limit = 0.1 + 1.0 / math.sqrt(max(1, len(gap)))  # few tokens have a mean with much noise
    if not found <= limit:
        raise ModelError(
            f"the model samples from another distribution than it is scored with: the {of} "
            f"difference of {len(gap)} log-probs is {found:.2g} nats, {limit:.2g} are allowed",
            hint="nothing was committed; sample with another backend, or with --dtype float32",
        )


def scored(report: Report, positions: int, verb: str, first: float, last: float) -> Progress:
    """Return the progress of a scorer as the shares from `first` to `last` of a unit's work."""

    def progress(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        share = first + (last - first) * done / max(1, total)
        report(Detail(positions, f"{done:,}/{total:,} positions {verb}", share))

    return progress


def default_unit(sampling: SamplingParams) -> int:
    """Return the number of prompts that can reach UNIT_POSITIONS, at least one."""
    return max(1, UNIT_POSITIONS // (sampling.n * sampling.max_new_tokens))


def prompt_set_digest(
    prompts: Sequence[Prompt],
    model: ModelRef,
    sampling: SamplingParams,
    *,
    seed: int,
    student_k: int,
    mc_draws: int = 0,
    grader: str = "",
    stop_token_ids: Sequence[int] = (),
    run: Mapping[str, Any] | None = None,
) -> str:
    """Return the digest of a set of rollouts: all settings except the student's weights."""
    rows = [[p.id, list(p.token_ids), p.answer, dict(p.extra)] for p in prompts]
    return digest(
        {
            "prompts": rows,
            "template": model.template_digest,
            "sampling": sampling.record(),
            "seed": seed,
            "student_k": student_k,
            # Written only where used, so that older sets keep their digest.
            **({"mc_draws": mc_draws} if mc_draws else {}),
            **({"grader": grader} if grader else {}),
            **({"stop_token_ids": sorted(stop_token_ids)} if stop_token_ids else {}),
            **({"run": dict(run)} if run else {}),
        }
    )


def mc_params(draws: int, seed: int) -> ScoreParams:
    """Return the parameters that draw Monte Carlo ids of a student."""
    # A teacher of the same seed must draw independently, so the seed is hashed.
    own_seed = int.from_bytes(hashlib.sha256(b"mc/%d" % seed).digest()[:7])
    return ScoreParams(entry_kind="sampled", draws=draws, seed=own_seed, at_student=False)


def draw(
    scorer: Scorer, rollouts: Rollouts, params: ScoreParams, progress: Progress = no_progress
) -> Draws:
    """Draw ids of every row with the student itself, by the parameters of `mc_params`."""
    found = scorer.score(rollouts, params, progress=progress)
    assert found.mult is not None, "sampled entries have counts"
    return Draws(cnt=found.cnt, ids=found.ids, mult=found.mult, lp=found.entry_lp)


def unit_key(
    set_digest: str, model: ModelRef, first: int, count: int, round_number: int | None = None
) -> str:
    """Return the key of a unit; round_number: see RolloutRequest.round."""
    if round_number is None:
        student = {"student": model.digest, "version": model.version}
    else:
        student = {"base_weights": model.base_weights, "round": round_number}
    return digest({"set": set_digest, **student, "first": first, "count": count})


def unit_ranges(first: int, count: int, total: int, size: int) -> list[tuple[int, int]]:
    """Return (first prompt, prompts) of each unit of at most `size` of `count` prompts.

    They are taken in order from `first` of `total` prompts; prompt 0 follows the last.
    """
    beyond = max(0, first + count - total)
    ends = [(first, first + count - beyond), *([(0, beyond)] if beyond else [])]
    return [(at, min(size, end - at)) for start, end in ends for at in range(start, end, size)]
