"""One rollout unit: a range of prompts, sampled, scored by the student itself and committed."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from logitcask.engine.backends.base import Sampler, Scorer
from logitcask.engine.grade import Grading
from logitcask.engine.identity import digest
from logitcask.engine.store import Store
from logitcask.engine.types import (
    Draws,
    ModelRef,
    Prompt,
    Rollouts,
    SamplingParams,
    ScoreRequest,
    silent,
)

UNIT_POSITIONS = 262_144
"""Response tokens that a unit of the default size can reach."""
LOGPROB = "natural, temperature 1, ids [0, n_vocab)"

Unit = Mapping[str, int]
"""version of the student, first prompt, count of prompts."""


@dataclass(frozen=True, kw_only=True)
class Rolling:
    """Who samples what, and what is kept of it; `rollout` says what each means."""

    store: Store
    model: ModelRef
    sampler: Sampler
    scorer: Scorer
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    name: str
    seed: int
    student_k: int
    mc_draws: int
    grading: Grading | None
    unit_prompts: int
    profile: str
    first: int
    count: int
    versions: bool
    run: Mapping[str, Any] | None
    lineage_extra: Mapping[str, Any] | None

    @cached_property
    def set_digest(self) -> str:
        return prompt_set_digest(
            self.prompts,
            self.model,
            self.sampling,
            seed=self.seed,
            student_k=self.student_k,
            mc_draws=self.mc_draws,
            grader=self._grader,
            run=self.run,
        )

    @cached_property
    def units(self) -> dict[str, Unit]:
        """unit_key -> unit, planned before anything is sampled."""
        ranges = [
            (at, min(self.unit_prompts, end - at))
            for start, end in _stretches(self.first, self.count, len(self.prompts))
            for at in range(start, end, self.unit_prompts)
        ]
        return {
            unit_key(self.set_digest, self.model, at, size): {
                "version": self.model.version,
                "first": at,
                "count": size,
            }
            for at, size in ranges
        }

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """What every segment records."""
        return {
            "set": {
                "digest": self.set_digest,
                "prompts": len(self.prompts),
                "units": len(self.units),
                **asdict(self.sampling),
                "seed": self.seed,
                "student_k": self.student_k,
                **({"mc_draws": self.mc_draws} if self.mc_draws else {}),
                **({"grader": self._grader} if self._grader else {}),
                "template": self.model.template_digest,
            },
            "student": self.model.lineage(),
            "backend": self.sampler.describe(),
            "scorer": self.scorer.describe(),
            "logprob": LOGPROB,
            **({"run": dict(self.run)} if self.run else {}),
            **(self.lineage_extra or {}),
        }

    @property
    def _grader(self) -> str:
        return "" if self.grading is None else self.grading.name


def roll_unit(asked: Rolling, key: str, unit: Unit) -> Rollouts:
    """Samples one unit, lets the student score it, commits it under its key, and returns it."""
    sampler, scorer, seed, k = asked.sampler, asked.scorer, asked.seed, asked.student_k
    part = asked.prompts[unit["first"] : unit["first"] + unit["count"]]
    rolled = sampler.generate(
        part, asked.sampling, seed=seed, version=asked.model.version, progress=silent
    )
    if asked.grading is not None:
        # Before the student's own scores: what a grader refuses costs no more than sampling.
        rolled = replace(rolled, reward=asked.grading.rewards(rolled).astype("float32"))
    own = ScoreRequest(top_p=1.0, k_min=k, k_max=k, at_student=False)
    request = mc_request(asked.mc_draws, seed)
    drawn = draw(scorer, rolled, request) if asked.mc_draws else None
    rolled = replace(rolled, student=scorer.score(rolled, own), draws=drawn)
    asked.store.commit_rollouts(
        rolled,
        name=asked.name,
        unit_key=key,
        unit=unit,
        lineage=asked.lineage,
        profile=asked.profile,
    )
    return rolled


def default_unit(sampling: SamplingParams) -> int:
    """As many prompts as can reach UNIT_POSITIONS, and at least one."""
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
    run: Mapping[str, Any] | None = None,
) -> str:
    """What a name of rollouts stands for, beside the root of its student."""
    rows = [[p.id, list(p.token_ids), p.answer, dict(p.extra)] for p in prompts]
    return digest(
        {
            "prompts": rows,
            "template": model.template_digest,
            "sampling": asdict(sampling),
            "seed": seed,
            "student_k": student_k,
            # Only where there are any: sets that were made before there could be keep their digest.
            **({"mc_draws": mc_draws} if mc_draws else {}),
            **({"grader": grader} if grader else {}),
            **({"run": dict(run)} if run else {}),
        }
    )


def mc_request(draws: int, seed: int) -> ScoreRequest:
    """What draws Monte Carlo ids of a student."""
    # Not the numbers that a teacher of the same seed draws by: two draws are to be independent.
    own_seed = int.from_bytes(hashlib.sha256(b"mc/%d" % seed).digest()[:7])
    return ScoreRequest(entry_kind="sampled", draws=draws, seed=own_seed, at_student=False)


def draw(scorer: Scorer, rollouts: Rollouts, request: ScoreRequest) -> Draws:
    """Ids of every row, drawn by the student itself as `mc_request` says."""
    found = scorer.score(rollouts, request)
    assert found.mult is not None, "who draws counts"
    return Draws(cnt=found.cnt, ids=found.ids, mult=found.mult, lp=found.entry_lp)


def unit_key(set_digest: str, model: ModelRef, first: int, count: int) -> str:
    return digest(
        {
            "set": set_digest,
            "student": model.digest,
            "version": model.version,
            "first": first,
            "count": count,
        }
    )


def _stretches(first: int, count: int, total: int) -> list[tuple[int, int]]:
    """[start, end) of so many of `total` prompts, which go on with 0 after the last."""
    beyond = max(0, first + count - total)
    return [(first, first + count - beyond), *([(0, beyond)] if beyond else [])]
