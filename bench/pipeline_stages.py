"""Stages of a loop that take longer: sleeping stands for GPUs that work elsewhere.

`stretched` adds seconds to each unit of sampling and scoring, and to each update, and writes their
spans to a timeline. As a program, this runs `logitcask` with stretched stages:

    python bench/pipeline_stages.py SECONDS FOLDER INDEX distill CONFIG --role score

SECONDS: rollout,score,train; FOLDER: the timeline goes to FOLDER/timeline.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcask.engine.workers.timeline import span, timeline_file


@dataclass(frozen=True)
class Seconds:
    """Seconds that are added: to a unit of sampling, a unit of scoring, an update."""

    rollout: float = 0.0
    score: float = 0.0
    train: float = 0.0

    def __str__(self) -> str:
        return f"{self.rollout},{self.score},{self.train}"


@contextmanager
def stretched(added: Seconds, folder: Path, index: str = "0") -> Iterator[None]:
    """Stretch the stages of this process, and note them in a timeline, for a with block."""
    from logitcask.engine.rollout import unit as rollout_unit
    from logitcask.engine.score import unit as score_unit
    from logitcask.engine.training.trainer import DistillTrainer

    sample, score, train = (
        rollout_unit.run_rollout_unit,
        score_unit.run_score_unit,
        DistillTrainer.training_step,
    )

    def file(role: str) -> Path:
        return timeline_file(folder, role, index)

    def sample_slowly(request: Any, *rest: Any, **more: Any) -> Any:
        number = request.provenance_extra.get("round")
        with span(file("rollout"), "unit", round=number, version=request.model.version):
            time.sleep(added.rollout)
            return sample(request, *rest, **more)

    def score_slowly(request: Any, key: str, unit: Any, *rest: Any, **more: Any) -> Any:
        number = unit.segment.provenance.get("round")
        with span(file("score"), "unit", round=number, version=unit.segment.version):
            time.sleep(added.score)
            return score(request, key, unit, *rest, **more)

    def train_slowly(self: Any, *rest: Any, **more: Any) -> Any:
        # The packs of an update share its seconds.
        packs = self.args.gradient_accumulation_steps
        with span(file("train"), "update", round=self.state.global_step):
            time.sleep(added.train / packs)
            return train(self, *rest, **more)

    with ExitStack() as stack:
        stack.enter_context(replaced(sample, sample_slowly))
        stack.enter_context(replaced(score, score_slowly))
        DistillTrainer.training_step = train_slowly
        stack.callback(setattr, DistillTrainer, "training_step", train)
        yield


@contextmanager
def replaced(function: Callable[..., Any], by: Callable[..., Any]) -> Iterator[None]:
    """Replace a function in every module of ours that has it, for a with block."""
    name = function.__name__
    holders = [
        module
        for key, module in list(sys.modules.items())
        if key.startswith("logitcask.") and getattr(module, name, None) is function
    ]
    for module in holders:
        setattr(module, name, by)
    try:
        yield
    finally:
        for module in holders:
            setattr(module, name, function)


def main(words: list[str]) -> None:
    """Run `logitcask` with stretched stages."""
    seconds, folder, index, *command = words
    from logitcask.cli.main import run

    with stretched(Seconds(*map(float, seconds.split(","))), Path(folder), index):
        code = run(command)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
