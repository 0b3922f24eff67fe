"""The miniature of the paper: its task, and the rule of its verdicts."""

import random
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from logitcask.engine.types import Prompt

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def modules() -> Iterator[None]:
    """Put the folder of the scripts on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield


@pytest.fixture
def task() -> ModuleType:
    return import_module("paper_task")


@pytest.fixture
def rule() -> ModuleType:
    return import_module("paper_claims")


def test_both_notations_are_solved_and_verified(task: ModuleType) -> None:
    problem = task.Problem((("+", 3), ("-", 2), ("+", 4)))
    assert problem.prompt == "a+3b-2c+4="
    assert problem.solution() == "a+3=8b-2=6c+4=9>9"
    assert problem.solution(other=True) == "A(+3)8B(-2)6C(+4)9>9"
    prompt = Prompt(id="0", token_ids=(), answer=problem.answer)
    for text in (problem.solution(), problem.solution(other=True)):
        assert problem.solved_by(text)
        assert task.solves(prompt, text) == 1.0
    assert not problem.solved_by("a+3=8b-2=6c+4=9>8")
    assert not problem.solved_by("a+3=8b-2=6c+4=99")


def test_authors_are_wrong_only_at_hard_facts(task: ModuleType) -> None:
    # Fails for authors whose mistakes do not follow the facts, which no model could learn.
    problems = [next(task.stream("corpus", seed, 8)) for seed in range(100)]
    authors, wrong = random.Random(0), 0
    for problem in problems:
        place = 5
        text = problem.solution(authors=authors)
        for move, digit in zip(problem.moves, text[4::5], strict=False):
            offered, share = task.mistake(place, move)
            assert int(digit) == task.step(place, move) or (int(digit) == offered and share > 0)
            wrong += int(digit) != task.step(place, move)
            place = int(digit)
    assert wrong > 20


def test_verdicts_follow_the_rule(rule: ModuleType) -> None:
    assert rule.mean([(0.2, 0.03)] * 3) == pytest.approx((0.2, 0.03 / 3**0.5))
    assert rule.outcome([(0.2, 0.03)]) == rule.AGREES
    assert rule.outcome([(0.05, 0.03)]) == rule.UNCLEAR
    assert rule.outcome([(-0.2, 0.03)]) == rule.DIFFERS
    # The spread of the seeds counts where it exceeds the noise: 0.2 +- 0.12.
    assert rule.outcome([(0.0, 0.01), (0.2, 0.01), (0.4, 0.01)]) == rule.UNCLEAR
    assert rule.outcome([(0.2, 0.0)]) == rule.UNCLEAR
    assert rule.outcome([(0.01, 0.01), (0.0, 0.01)], margin=0.05) == rule.AGREES
    assert rule.outcome([(0.04, 0.01), (0.04, 0.01)], margin=0.05) == rule.UNCLEAR
    assert rule.outcome([(-0.2, 0.01), (-0.2, 0.01)], margin=0.05) == rule.DIFFERS
    assert rule.together([rule.AGREES, rule.UNCLEAR, rule.DIFFERS]) == rule.DIFFERS
    assert rule.together([rule.AGREES, rule.UNCLEAR]) == rule.UNCLEAR
    assert rule.together([rule.AGREES, rule.AGREES]) == rule.AGREES
