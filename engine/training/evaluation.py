"""Evaluation: the student answers prompts that it is not trained on, and a grader says how well.

    accuracy    mean over prompts of the reward of each one's first response
    avg_at_n    mean over prompts of the mean reward of its n responses (avg@16 of arXiv 2604.13016)

Both expect the same value; avg_at_n has less spread. Standard errors are over prompts: the sample
standard deviation divided by the root of their number.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from logitcask.engine.backends.base import Sampler
from logitcask.engine.models.identity import digest
from logitcask.engine.prompts.graders import Decode, Grader, RewardFn
from logitcask.engine.training.held_out import HeldOut
from logitcask.engine.training.run_dir import MetricsFile
from logitcask.engine.training.trainer import gathered, rank
from logitcask.engine.types import STOP, Array, Prompt, SamplingParams, no_progress


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    prompts: int
    n: int
    accuracy: float
    accuracy_se: float | None
    """None where there is one prompt alone; so is the next."""
    avg_at_n: float
    avg_at_n_se: float | None
    mean_length: float
    """Response tokens."""
    stopped_share: float
    """Share of responses that ended in a stop token."""

    def line(self) -> dict[str, float | None]:
        """As metrics.jsonl names it."""
        return {f"eval/{name}": value for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalPlan:
    """What is asked, how it is sampled, who grades it, and when."""

    prompts: Sequence[Prompt]
    sampling: SamplingParams
    grader: RewardFn
    grader_name: str
    decode: Decode
    sampler: Callable[[nn.Module], Sampler]
    """Over a student in training: it samples with the weights of the moment."""
    seed: int = 0
    every: int = 0
    """Updates between evaluations, beside those before the first and after the last; 0 = none."""

    def identity(self) -> dict[str, Any]:
        """What must be the same for numbers of one run to be compared."""
        rows = [[p.id, list(p.token_ids), p.answer, dict(p.extra)] for p in self.prompts]
        return {
            "prompts": digest(rows),
            "grader": self.grader_name,
            "every": self.every,
            **self.sampling.record(),
        }


def evaluate(sampler: Sampler, plan: EvalPlan, *, version: int) -> EvalReport:
    """The student's rewards. Several processes take a share of the prompts each.

    Random numbers are those of (seed, prompt id, sample, version): the same student gets the same
    report on a CPU.
    """
    everyone = gathered(None)
    share = _graded(sampler, plan, plan.prompts[rank() :: len(everyone)], version)
    rewards = np.empty((len(plan.prompts), plan.sampling.n))  # [M, n]
    tokens = stopped = 0
    for first, (part, length, stops) in enumerate(gathered(share)):
        rewards[first :: len(everyone)] = part
        tokens, stopped = tokens + length, stopped + stops
    return EvalReport(
        prompts=len(rewards),
        n=plan.sampling.n,
        accuracy=float(rewards[:, 0].mean()),
        accuracy_se=standard_error(rewards[:, 0]),
        avg_at_n=float(rewards.mean()),
        avg_at_n_se=standard_error(rewards.mean(1)),
        mean_length=tokens / rewards.size,
        stopped_share=stopped / rewards.size,
    )


def _graded(
    sampler: Sampler, plan: EvalPlan, prompts: Sequence[Prompt], version: int
) -> tuple[Array, int, int]:
    """([M, n] rewards, response tokens, responses that stopped) of a share of the prompts."""
    n = plan.sampling.n
    if not prompts:
        return np.empty((0, n)), 0, 0
    rolled = sampler.generate(
        prompts, plan.sampling, seed=plan.seed, version=version, progress=no_progress
    )
    grader = Grader(name=plan.grader_name, grader=plan.grader, decode=plan.decode)
    stopped = int((rolled.finish == STOP).sum())
    return grader.rewards(rolled).reshape(-1, n), rolled.positions, stopped


def standard_error(values: Array) -> float | None:
    """Of the mean of [M] values."""
    if len(values) < 2:
        return None
    return float(values.std(ddof=1)) / math.sqrt(len(values))


class Evaluations:
    """The evaluations of a run: one line of metrics.jsonl at each step, and none twice."""

    def __init__(
        self,
        plan: EvalPlan | None,
        held_out: HeldOut | None,
        student: nn.Module,
        metrics: MetricsFile,
        version: int,
        first: bool,
    ) -> None:
        """One of both is there, or both. `version` is the student's before update 0; only the
        `first` of several processes writes.

        Call it when the student is on its device: a sampler takes views of the weights.
        """
        self._plan = plan
        self._held_out = held_out
        self._student = student
        self._sampler = plan.sampler(student) if plan else None
        self._metrics = metrics
        self._version = version
        self._first = first

    def due(self, step: int) -> bool:
        asked = [each.every for each in (self._plan, self._held_out) if each is not None]
        return any(every and step % every == 0 for every in asked)

    def at(self, step: int) -> None:
        """Evaluates the student after so many updates, unless the file has it."""
        if any(line["progress/step"] == step for line in self._metrics.evaluations):
            return
        begun_s = time.monotonic()
        line: dict[str, float | None] = {"progress/step": step}
        if self._plan is not None and self._sampler is not None:
            report = evaluate(self._sampler, self._plan, version=self._version + step)
            line |= report.line()
        if self._held_out is not None:
            line |= self._held_out.line(self._student)
        line["eval/seconds"] = time.monotonic() - begun_s
        self._metrics.evaluated(line, write=self._first)
