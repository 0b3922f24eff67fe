"""Graders that compare with the prompt's answer: tables of cases, and what holds for any text."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.config.prompts import GRADER_NAMES
from logitcask.engine.errors import PromptError
from logitcask.engine.prompts.answers import contains_words, normal_form, words
from logitcask.engine.prompts.graders import GRADERS, contains, exact, normalised, open_grader
from logitcask.engine.types import Prompt


def prompt(answer: str) -> Prompt:
    return Prompt(id="p", token_ids=(1,), answer=answer)


def test_every_described_grader_is_there() -> None:
    assert list(GRADERS) == list(GRADER_NAMES)
    for name in GRADER_NAMES:
        assert open_grader(name, [prompt("Paris")])(prompt("Paris"), "Paris") == 1.0


SAME = [
    ["1000", "1,000", "1000.0", "1e3", "1E3", r"1{,}000", r"1\,000", "+1000", "$1000", "2000/2"],
    ["1/2", "0.5", ".50", "2/4", r"\frac12", r"\frac{1}{2}", r"\dfrac{1.0}{2}", r"\frac 1 2"],
    ["-1/2", "\u22120.5", r"-\frac{1}{2}", "- 0.5"],
    ["50%", r"50\%", "50.0 %"],
    ["50", "50°", r"50^\circ", r"50^{\circ}", "050"],
    ["Paris", "paris", "**Paris**", '"Paris"', r"\text{Paris}", "the Paris", "`PARIS`"],
    ["new york", "New  York", "\u201cNew York\u201d"],
    ["(1,2)", "(1, 2)", r"\left(1, 2\right)", "( 1,2 )"],
    ["1, 200"],
    ["0,5"],
    ["0.33"],
    ["1/3"],
    [r"1\frac{1}{2}"],
    ["11/2"],
    [r"\Delta"],
    [r"\delta"],
    ["x+1"],
    ["1/0"],
    ["10\u00b2"],
    ["102"],
    ["A"],
    ["1e401"],
    ["\u00e9", "e\u0301"],
    ["**"],
    ["$"],
]
"""Each list: answers that are equal to one another, and to no other."""


def test_equal_normal_forms_are_the_same_answer() -> None:
    forms = [{normal_form(each) for each in group} for group in SAME]
    assert [len(each) for each in forms] == [1] * len(SAME), forms
    assert len(set.union(*forms)) == len(SAME), forms


CASES = [
    ("Paris", "The capital is PARIS.", True),
    ("Paris", "Parisian", False),
    ("New York", "in new  york, of course", True),
    ("New York", "new in York", False),
    ("5", "2 + 3 = 5.", True),
    ("5", "5.5, 1/5, -5, .5, 12:05, 5kg, x5 and 15", False),
    ("-5", "x=-5", True),
    ("5", "2-5", True),
    ("1,000", "1,000 of them", True),
    ("1000", "1,000 of them", False),
    ("\u00e9t\u00e9", "L'\u00c9TE\u0301!", True),
    ("stra\u00dfe", "die STRASSE", True),
    ("\u6771\u4eac", "\u9996\u90fd\u306f\u6771\u4eac\u3067\u3059", True),
    ("\u4eac\u6771", "\u6771\u4eac", False),
    ("\u0939\u093f", "\u0939\u093f\u0928\u094d\u0926\u0940", False),
    ("a.b*", "aXb and abbb", False),
    ("a.b*", "it is (a.b)", True),
    ("Paris", "", False),
]


@pytest.mark.parametrize(("answer", "response", "right"), CASES)
def test_whole_words_are_contained(answer: str, response: str, right: bool) -> None:
    assert contains(prompt(answer), response) == right


TEXT = st.text(alphabet="aT1e0.,/-%$\\{} \n*\u0301\u00e9", max_size=16)


@given(TEXT.filter(words), TEXT, TEXT)
@settings(max_examples=50)
def test_an_answer_in_a_sentence_is_contained(answer: str, before: str, after: str) -> None:
    assert contains_words(f"{before} so, {answer} ! {after}", answer)
    assert not contains_words(before, f"{answer} x")


@given(TEXT, TEXT)
@settings(max_examples=50)
def test_normalised_is_right_where_exact_is(answer: str, response: str) -> None:
    for each in (response, answer):
        assert normalised(prompt(answer), each) >= exact(prompt(answer), each)


@given(st.fractions(max_denominator=1000), st.integers(1, 9))
@settings(max_examples=50)
def test_numbers_are_equal_by_value(value: Fraction, factor: int) -> None:
    above, below = value.numerator, value.denominator
    form = normal_form(f"{above}/{below}")
    assert normal_form(f"{above * factor}/{below * factor}") == form
    assert normal_form(f"{above + 1}/{below}") != form
    assert normal_form(f"{above * 10_000:,}") == normal_form(f"{above}e4")


@pytest.mark.parametrize(
    ("name", "answer", "cause"),
    [
        ("contains", "+", "has no word"),
        ("contains", " ", "has no word"),
        ("normalised", " . ", "is empty"),
    ],
)
def test_an_answer_that_cannot_be_compared_is_refused(name: str, answer: str, cause: str) -> None:
    with pytest.raises(PromptError, match=cause):
        open_grader(name, [prompt("4"), prompt(answer)])


def test_long_hostile_responses_end() -> None:
    """Run into no timeout, as a quadratic way would."""
    for part in ("\\boxed{", "{", "**", "\\text{", "1,", "5 ^ { "):
        response = part * (100_000 // len(part))
        for grade in (exact, normalised, contains):
            assert grade(prompt("the answer is 42"), response) == 0.0
