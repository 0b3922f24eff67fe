"""Pretraining of the demo's models: stopped by accuracy, and rewound after an overshoot."""

import copy
from collections.abc import Callable

import pytest
import torch

from logitcask.engine.demo.models import STOP, Size, make_model, make_tokenizer
from logitcask.engine.demo.pretrain import TaskPretrainer, pretrain_between, pretrain_to_at_least
from logitcask.engine.demo.task import Task
from logitcask.engine.errors import LogitcaskError
from logitcask.engine.types import no_progress


class Scripted:
    """A pretrainer whose skill grows by its rate per step, with an accuracy by skill."""

    def __init__(self, curve: Callable[[float], float], gain: float = 0.0) -> None:
        self.curve, self.gain = curve, gain
        self.lr, self.steps = 1.0, 0
        self.skill = self.polish = 0.0
        self.rewinds = 0

    def train(self, steps: int, *, end: float = 1.0) -> float:
        self.steps += steps
        self.skill += self.lr * steps
        self.polish = self.gain if end < 1 else 0.0
        return 0.9 if self.skill < 50 else 0.1

    def accuracy(self) -> float:
        """Return the curve's value, plus the gain of a decay of the rate."""
        assert self.skill >= 50, "measured while the loss was far too high"
        return min(1.0, self.curve(self.skill) + self.polish)

    def snapshot(self) -> tuple[int, float]:
        return self.steps, self.skill

    def rewind(self, snapshot: tuple[int, float]) -> None:
        self.steps, self.skill = snapshot
        self.rewinds += 1


def between(pretrainer: Scripted, limit: int = 1000) -> float:
    return pretrain_between(
        pretrainer, 0.45, 0.65, stride=20, limit=limit, stage="student", progress=no_progress
    )


def test_slow_pretrainer_is_stopped_at_the_first_measurement_inside():
    pretrainer = Scripted(lambda skill: skill / 300)
    assert between(pretrainer) == pytest.approx(140 / 300)
    assert (pretrainer.steps, pretrainer.rewinds) == (140, 0)


@pytest.mark.parametrize("jump", [113, 127.5, 135.25])
def test_sudden_pretrainer_is_rewound_until_it_lands_inside(jump: float):
    # From 5 % to 95 % within four steps: measurements 20 apart jump over the window.
    pretrainer = Scripted(lambda skill: min(0.95, max(0.05, 0.5 + (skill - jump) * 0.225)))
    assert 0.45 <= between(pretrainer) <= 0.65
    assert pretrainer.rewinds > 0
    assert abs(pretrainer.skill - jump) < 0.7


def test_a_jump_shorter_than_a_step_is_met_with_a_lower_rate():
    pretrainer = Scripted(lambda skill: min(1.0, max(0.0, 0.5 + (skill - 120.3) * 4)))
    assert 0.45 <= between(pretrainer) <= 0.65
    assert pretrainer.lr < 1


def test_a_pretrainer_that_does_not_learn_is_an_error():
    with pytest.raises(LogitcaskError, match=r"student: accuracy 10.0% after 200 steps") as error:
        between(Scripted(lambda skill: 0.1), limit=200)
    assert error.value.hint == "another --seed"


def at_least(pretrainer: Scripted, limit: int = 1000) -> float:
    return pretrain_to_at_least(
        pretrainer,
        0.95,
        ready=0.75,
        stride=25,
        slide=40,
        limit=limit,
        stage="teacher",
        progress=no_progress,
    )


def test_teacher_is_polished_once_it_is_ready():
    pretrainer = Scripted(lambda skill: skill / 200, gain=0.1)
    assert at_least(pretrainer) == pytest.approx(1.0)
    # Ready at 150; 40 steps more and the slide's own gain.
    assert (pretrainer.steps, pretrainer.rewinds) == (190, 0)


def test_teacher_that_is_not_sure_goes_on_from_before_the_slide():
    pretrainer = Scripted(lambda skill: 0.5 + skill / 1000, gain=0.04)
    assert at_least(pretrainer) >= 0.95
    # Ready at 250, and sure after a slide only if it ends at 415 or later: a slide from 375.
    assert [pretrainer.skill - 40, pretrainer.rewinds] == [375, 5]
    assert pretrainer.steps == 415


def test_teacher_that_never_gets_there_is_an_error():
    with pytest.raises(
        LogitcaskError, match=r"teacher: accuracy 90.0% after .* steps, 95% is needed"
    ):
        at_least(Scripted(lambda skill: 0.8, gain=0.1))


def task_pretrainer(seed: int = 0) -> TaskPretrainer:
    task = Task(2)
    return TaskPretrainer(
        make_model(Size(hidden=16, layers=1, intermediate=32, heads=1), seed),
        make_tokenizer(),
        task.stream("student", 0),
        task.draw("validation", 4, 0),
        batch=8,
        lr=1e-2,
        max_new_tokens=task.max_new_tokens,
    )


@torch.no_grad()
def test_loss_is_the_mean_over_the_solutions_tokens():
    pretrainer = task_pretrainer()
    problems = Task(2).draw("student", 5, 1)
    nats, tokens = 0.0, 0
    for problem in problems:
        prompt = pretrainer.tokenizer(problem.prompt)["input_ids"]
        solution = [*pretrainer.tokenizer(problem.solution)["input_ids"], STOP]
        logits = pretrainer.model(input_ids=torch.tensor([prompt + solution])).logits[0].double()
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        nats -= float(rows[range(len(solution)), solution].sum())
        tokens += len(solution)
    assert len({len(p.solution) for p in problems}) > 1
    assert float(pretrainer.loss(problems)) == pytest.approx(nats / tokens, rel=1e-5)


def test_training_lowers_the_loss_and_rewinding_undoes_it():
    pretrainer = task_pretrainer()
    first = pretrainer.train(5)
    snapshot = pretrainer.snapshot()
    kept = copy.deepcopy(pretrainer.model.state_dict())

    def is_kept() -> bool:
        now = pretrainer.model.state_dict()
        return all(torch.equal(kept[name], value) for name, value in now.items())

    assert pretrainer.train(40) < first
    assert pretrainer.steps == 45
    pretrainer.rewind(snapshot)
    assert pretrainer.steps == 5
    assert is_kept()
    # A snapshot serves several rewinds: training does not change it.
    pretrainer.train(2)
    pretrainer.rewind(snapshot)
    assert is_kept()
