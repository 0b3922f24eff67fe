"""The demo's task: its solutions are correct digit by digit, and its splits are disjoint."""

import re
from itertools import islice, product
from pathlib import Path

import pytest

from logitcask.engine.demo.models import make_tokenizer
from logitcask.engine.demo.task import SPLITS, Problem, Task, hundredth, write_prompts
from logitcask.engine.errors import ConfigError
from logitcask.engine.prompts.graders import open_grader
from logitcask.engine.prompts.prompts import read_prompts
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.types import Prompt

STEP = re.compile(r"(\d)([+-])(\d)(c?)=(\d)(c?);")
TWO_DIGITS = [Problem(a, op, b, 2) for a, op, b in product(range(10, 100), "+-", range(10, 100))]


def test_hand_worked():
    assert Problem(361, "-", 220, 3).solution == "1-0=1;6-2=4;3-2=1;>141"
    assert Problem(250, "-", 586, 3).solution == "~6-0=6;8-5=3;5-2=3;>-336"
    assert Problem(336, "+", 664, 3).solution == "6+4=0c;3+6c=0c;3+6c=0c;>1000"
    assert Problem(302, "-", 125, 3).solution == "2-5=7c;0-2c=7c;3-1c=1;>177"


def test_every_step_is_right_and_the_steps_make_the_answer():
    for problem in TWO_DIGITS:
        work, _, answer = problem.solution.rpartition(">")
        steps = STEP.findall(work)
        assert "".join(f"{p}{op}{q}{i}={d}{o};" for p, op, q, i, d, o in steps) == work.lstrip("~")
        sign = 1 if problem.op == "+" else -1
        total, carried = 0, False
        for place, (p, _, q, came_in, digit, goes_out) in enumerate(steps):
            assert bool(came_in) == carried
            carried = bool(goes_out)
            # Carries have the operation's sign: p - q - in = digit - 10 out.
            expected = int(digit) + sign * 10 * carried
            assert int(p) + sign * (int(q) + bool(came_in)) == expected
            total += int(digit) * 10**place
        if problem.op == "+":
            total += carried * 10 ** len(steps)
        assert (-total if work[0] == "~" else total) == int(answer)
        assert int(answer) == (
            problem.a + problem.b if problem.op == "+" else problem.a - problem.b
        )


def test_splits_cover_all_problems_and_are_disjoint():
    cuts = sorted(SPLITS.values())
    assert [low for low, _ in cuts] == [0, *(high for _, high in cuts[:-1])]
    assert cuts[-1][1] == 100
    for low, high in cuts:
        share = sum(low <= hundredth(problem) < high for problem in TWO_DIGITS) / len(TWO_DIGITS)
        assert share == pytest.approx((high - low) / 100, abs=0.02)


def test_draws_of_different_splits_are_disjoint_for_every_seed():
    task = Task(2)
    seen: dict[Problem, str] = {}
    for seed, split in product(range(3), SPLITS):
        drawn = task.draw(split, 400, seed)
        assert len(set(drawn)) == 400
        assert task.draw(split, 400, seed) == drawn
        for problem in [*drawn, *islice(task.stream(split, seed + 7), 400)]:
            assert seen.setdefault(problem, split) == split
    assert task.draw("evaluation", 400, 0) != task.draw("evaluation", 400, 1)


def test_a_draw_of_most_of_a_split_is_refused():
    with pytest.raises(ConfigError, match="about 1620, of which half"):
        Task(2).draw("evaluation", 1000, 0)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("1-0=1;6-2=4;3-2=1;>141", True),
        (">141", True),
        ("1-0=1;6-2=4;3-2=1;>142", False),
        ("141", False),
        (">141>", False),
        (">141 ", False),
        (">0141", False),
        ("", False),
    ],
)
def test_verifier(response: str, right: bool):
    problem = Problem(361, "-", 220, 3)
    assert problem.solved_by(response) is right
    prompt = Prompt(id="p", token_ids=(1,), answer=problem.answer)
    assert open_grader("logitcask.engine.demo.task:solves", [prompt])(prompt, response) == right


def test_prompts_file_is_read_by_rollout(tmp_path: Path):
    problems = Task(3).draw("prompts", 50, 0)
    write_prompts(tmp_path / "main.jsonl", problems)
    prompts = read_prompts(
        tmp_path / "main.jsonl",
        make_tokenizer(),
        Rendering(chat_template=False),
        max_prompt_tokens=8,
    )
    assert [p.answer for p in prompts] == [problem.answer for problem in problems]
    assert {len(p.token_ids) for p in prompts} == {8}
    assert len({p.id for p in prompts}) == 50


def test_every_solution_fits():
    assert max(len(p.solution) + 1 for p in TWO_DIGITS) <= Task(2).max_new_tokens
