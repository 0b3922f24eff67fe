"""A small store of rollouts, two models, and a scorer that fails on request."""

from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.models import identity
from logitcask.engine.rollout.plan import rollout
from logitcask.engine.rollout.unit import RolloutRequest
from logitcask.engine.score.plan import ScoreReport, score
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import open_store
from logitcask.engine.types import (
    IdLists,
    ModelRef,
    Progress,
    Prompt,
    Rollouts,
    SamplingParams,
    ScoreParams,
    Scores,
    no_progress,
)

REQUEST = ScoreParams(top_p=0.9, k_min=4, k_max=10)
PROMPTS = [Prompt(id=f"p{i}", token_ids=tuple(range(3, 5 + i))) for i in range(4)]


def ref(folder: Path, chat_template: bool = False) -> ModelRef:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        return identity.model_ref(str(folder), chat_template=chat_template)


def sampled_store(
    path: Path, student: ModelRef, n: int = 2, length: int = 6, mc_draws: int = 0
) -> Path:
    rollout(
        RolloutRequest(
            store=open_store(path, create=True),
            model=student,
            sampler=HF(student),
            prompts=PROMPTS,
            sampling=SamplingParams(n=n, max_new_tokens=length),
            unit_prompts=2,
            student_k=5,
            mc_draws=mc_draws,
        )
    )
    return path


def run(
    path: Path, model: ModelRef, scorer: Any, progress: Progress = no_progress, **keys: Any
) -> ScoreReport:
    keys = {"teacher_name": "big", "params": REQUEST} | keys
    request = ScoreRequest(store=open_store(path), model=model, scorer=scorer, **keys)
    return score(request, progress=progress)


class FailingScorer:
    def __init__(self, hf: HF, at: int) -> None:
        self.hf, self.at, self.started = hf, at, 0
        self.capabilities, self.describe = hf.capabilities, hf.describe

    def score(
        self, rollouts: Rollouts, request: ScoreParams, at: IdLists | None = None, **_: Any
    ) -> Scores:
        self.started += 1
        if self.started > self.at:
            raise KeyboardInterrupt
        return self.hf.score(rollouts, request, at)
