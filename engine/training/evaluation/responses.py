"""Evaluation of the student in training: graded responses to other prompts, and held-out packs.

    accuracy    mean over prompts of the reward of each one's first response
    avg_at_n    mean over prompts of the mean reward of its n responses (avg@16 of arXiv 2604.13016)

Both expect the same value; avg_at_n has less spread. Standard errors are over prompts: the sample
standard deviation divided by the root of their number.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitcask.engine.backends.base import Sampler
from logitcask.engine.models.identity import digest
from logitcask.engine.prompts.graders import Decode, Grader, RewardFn
from logitcask.engine.training.evaluation.held_out import HeldOut
from logitcask.engine.training.processes import gathered, rank
from logitcask.engine.training.run_dir.files import MetricsFile
from logitcask.engine.types import (
    STOP,
    Array,
    Progress,
    Prompt,
    SamplingParams,
    no_progress,
    stage_named,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    prompts: int
    n: int
    accuracy: float
    accuracy_se: float | None
    """None for a single prompt, as is avg_at_n_se."""
    avg_at_n: float
    avg_at_n_se: float | None
    mean_length: float
    """Response tokens."""
    stopped_share: float
    """Share of responses that ended in a stop token."""

    def line(self) -> dict[str, float | None]:
        """Return the entries of metrics.jsonl."""
        return {f"eval/{name}": value for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalPlan:
    """Prompts, sampling, grader and frequency of an evaluation."""

    prompts: Sequence[Prompt]
    sampling: SamplingParams
    grader: RewardFn
    grader_name: str
    decode: Decode
    sampler: Callable[[nn.Module], Sampler]
    """Builds a sampler with the current weights of a student in training."""
    seed: int = 0
    every: int = 0
    """Updates between evaluations; 0 = only before the first update and after the last."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that must be equal for numbers of one run to be comparable."""
        rows = [[p.id, list(p.token_ids), p.answer, dict(p.extra)] for p in self.prompts]
        return {
            "prompts": digest(rows),
            "grader": self.grader_name,
            "every": self.every,
            **self.sampling.record(),
        }


def evaluate(
    sampler: Sampler, plan: EvalPlan, *, version: int, progress: Progress = no_progress
) -> EvalReport:
    """Sample and grade the student's responses; each process takes a share of the prompts.

    Random numbers are those of (seed, prompt id, sample, version): the same student gets the same
    report on a CPU.
    """
    everyone = gathered(None)
    share = _graded(sampler, plan, plan.prompts[rank() :: len(everyone)], version, progress)
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
    sampler: Sampler,
    plan: EvalPlan,
    prompts: Sequence[Prompt],
    version: int,
    progress: Progress,
) -> tuple[Array, int, int]:
    """Return ([M, n] rewards, response tokens, responses that stopped) of these prompts."""
    n = plan.sampling.n
    if not prompts:
        return np.empty((0, n)), 0, 0
    rolled = sampler.generate(
        prompts,
        plan.sampling,
        seed=plan.seed,
        version=version,
        progress=stage_named(progress, "evaluation"),
    )
    grader = Grader(name=plan.grader_name, grader=plan.grader, decode=plan.decode)
    stopped = int((rolled.finish == STOP).sum())
    return grader.rewards(rolled).reshape(-1, n), rolled.positions, stopped


def standard_error(values: Array) -> float | None:
    """Return the standard error of the mean of [M] values; None for M = 1."""
    if len(values) < 2:
        return None
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def measure_student(
    plan: EvalPlan | None,
    held_out: HeldOut | None,
    student: nn.Module,
    sampler: Callable[[], Sampler | None],
    *,
    version: int,
    progress: Progress,
    device: torch.device | None,
) -> dict[str, float | None]:
    """Return the entries of metrics.jsonl of an evaluation; sampler: makes one for the plan."""
    line: dict[str, float | None] = {}
    if plan is not None:
        # Not kept: it may hold a copy of the student.
        made = sampler()
        assert made is not None, "of a whole student"
        line |= evaluate(made, plan, version=version, progress=progress).line()
        del made
    if held_out is not None:
        line |= held_out.line(student, progress, device)
    return line


class EvalCallback(TrainerCallback):
    """Evaluation between updates: one line of metrics.jsonl per evaluated step."""

    def __init__(
        self,
        plan: EvalPlan | None,
        held_out: HeldOut | None,
        student: nn.Module,
        metrics: MetricsFile,
        version: int,
        *,
        write: bool,
        track: Callable[[Mapping[str, float | None]], None],
        whole: Callable[[], nn.Module] | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Build the callback from a plan, held-out packs or both.

        version: the student's before update 0; write: True in one of several processes; track:
        sends a line to the trackers; whole: makes a copy of a sharded student that can sample, in
        every process. Any other must be on its device already: a sampler takes views of the
        weights.
        """
        self._plan = plan
        self._held_out = held_out
        self._student = student
        self._whole = whole
        self._sampler = plan.sampler(student) if plan and not whole else None
        self._metrics = metrics
        self._version = version
        self._write = write
        self._track = track
        self._progress = progress
        self._device: torch.device | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate before the first update, once the trackers have begun."""
        self._device = args.device
        if state.global_step == 0:
            self.evaluate_at(0)
            for line in self._metrics.evaluations:
                self._track(line)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate if it is due, before the checkpoint of the same update is written."""
        step = state.global_step
        periods = [each.every for each in (self._plan, self._held_out) if each is not None]
        # The last one too: some trackers end with the training.
        if step == state.max_steps or any(every and step % every == 0 for every in periods):
            self.evaluate_at(step)

    def evaluate_at(self, step: int) -> None:
        """Evaluate the student after `step` updates, unless the file has that line already."""
        if any(line["progress/step"] == step for line in self._metrics.evaluations):
            return
        begun_s = time.monotonic()
        line: dict[str, float | None] = {"progress/step": step}
        line |= measure_student(
            self._plan,
            self._held_out,
            self._student,
            self._whole_sampler,
            version=self._version + step,
            progress=self._progress,
            device=self._device,
        )
        line["eval/seconds"] = time.monotonic() - begun_s
        self._metrics.evaluated(line, write=self._write)
        if step:
            self._track(line)

    def _whole_sampler(self) -> Sampler | None:
        if self._plan and self._whole:
            return self._plan.sampler(self._whole())
        return self._sampler
