"""Graders: the extracted answer, and errors of graders."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcask.engine.errors import ConfigError, GraderError, PromptError
from logitcask.engine.prompts.answers import final_answer
from logitcask.engine.prompts.graders import exact, open_grader
from logitcask.engine.types import Prompt


def prompt(answer: str | None = "42") -> Prompt:
    return Prompt(id="p3", token_ids=(1,), answer=answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", ""),
        ("first\n  the  last line. \n\n", "the last line"),
        (r"so \boxed{1} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{7} Answer: 8", "7"),
        (r"Answer: 8 and \boxed{never closed", r"8 and \boxed{never closed"),
        ("Answer: 3\nwait\nANSWER:  $4$.\nbye", "4"),
        ("48/2 = 24\n#### 72", "72"),
        ("$$x + 1$$", "x + 1"),
        ("1,000", "1,000"),
        ("$", "$"),
    ],
)
def test_the_answer_that_is_read(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@given(st.text(alphabet="ab1 .$\n", max_size=12))
def test_a_boxed_answer_counts_inside_any_text(noise: str) -> None:
    response = f"{noise}\\boxed{{42}}{noise}"
    assert exact(prompt(), response) == 1.0
    assert exact(prompt("43"), response) == 0.0


def test_exact_needs_an_answer() -> None:
    assert open_grader("exact", [prompt()])(prompt("#### 5"), "Answer: 5.") == 1.0
    with pytest.raises(PromptError, match="'p3' has no answer"):
        open_grader("exact", [prompt(), prompt(None)])


MODULE = """
limit = 3
def half(prompt, response): return 0.5
def length(prompt, response): return len(response)
def word(prompt, response): return "good"
def nan(prompt, response): return float("nan")
def broken(prompt, response): raise KeyError(prompt.id)
def lonely(prompt): return 1.0
"""


@pytest.fixture
def grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "grading_of_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "grading_of_test"
    sys.modules.pop("grading_of_test", None)


def test_a_function_of_the_user(grader: str) -> None:
    assert open_grader(f"{grader}:half", [prompt(None)])(prompt(None), "x") == 0.5


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("nearly", "neither 'exact', 'contains', 'normalised' nor MODULE:FUNCTION"),
        (":half", "neither"),
        ("no_such_module:half", "no_such_module cannot be imported"),
        ("GRADING:hal", "has no hal"),
        ("GRADING:lonely", "cannot be called with"),
        ("GRADING:limit", "cannot be called with"),
    ],
)
def test_an_invalid_grader_is_refused_at_the_start(grader: str, name: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        open_grader(name.replace("GRADING", grader), [])


@pytest.mark.parametrize("name", ["length", "word", "nan"])
def test_a_reward_is_a_number_from_0_to_1(grader: str, name: str) -> None:
    grade = open_grader(f"{grader}:{name}", [])
    with pytest.raises(GraderError, match=r"on prompt 'p3': .* is no number in \[0, 1\]"):
        grade(prompt(), "abc")


def test_an_exception_of_a_grader_is_the_cause(grader: str) -> None:
    with pytest.raises(GraderError, match="on prompt 'p3': KeyError") as caught:
        open_grader(f"{grader}:broken", [])(prompt(), "abc")
    assert isinstance(caught.value.__cause__, KeyError)
