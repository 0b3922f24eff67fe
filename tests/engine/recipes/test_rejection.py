"""Rules of rejection: texts worked by hand, and properties at their bounds."""

import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.recipes.rejection import (
    rejection,
    repeats_block,
    repeats_line,
    repeats_ngram,
)

BOXED = "\\boxed{4}"


def noise(count: int, seed: int = 0) -> str:
    """Return characters without long repetitions."""
    return "".join(random.Random(seed).choices(string.ascii_letters, k=count))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"2 + 2 = 4, so {BOXED}", ""),
        ("2 + 2 = 4", "missing"),
        ("\n".join(["  so we try the next one "] * 5) + "\n" + BOXED, "repeated_line"),
        ("\n".join(["so we try the next one"] * 4) + BOXED, ""),
        ("\n".join(["nineteen characters"] * 9) + BOXED, ""),
        ("x" + "\nx".join([noise(100)] * 3) + BOXED, "repeated_ngram"),
        ("x" + "\nx".join([noise(99) + "yz"[i % 2] for i in range(3)]) + BOXED, "repeated_ngram"),
        (noise(100) + "a" + noise(100) + "b" + noise(98) + BOXED, ""),
        ("-" * 250 + BOXED, ""),
        ("-" * 300 + BOXED, "repeated_ngram"),
        (noise(4900) + noise(50, 1) * 3 + BOXED, "repeated_block"),
        (noise(4900) + noise(50, 1) * 2 + noise(49, 1) + "." + BOXED, ""),
        (noise(4800) + noise(50, 1) * 3 + BOXED, ""),
    ],
)
def test_reason_of_a_text_worked_by_hand(text: str, reason: str) -> None:
    assert rejection(text, truncated=False, require="\\boxed") == reason
    assert rejection(text, truncated=True, require="") == "truncated"


def test_nothing_is_required_of_a_text_without_a_rule() -> None:
    assert rejection("no box", truncated=False, require="") == ""


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 9),
    st.lists(st.integers(0, 130), min_size=2, max_size=4),
    st.integers(90, 110),
    st.integers(0, 400),
)
def test_repetitions_count_from_their_bound_on(
    seed: int, gaps: list[int], size: int, before: int
) -> None:
    """Place one text several times with noise between: the count alone decides."""
    part = noise(size, seed)
    text = noise(before, 50) + "".join(part + noise(gap, 60 + i) for i, gap in enumerate(gaps))
    assert repeats_ngram(text) == (len(gaps) >= 3 and size >= 100)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 300), st.integers(0, 300))
def test_a_period_repeats_a_block_where_it_divides_it(period: int, length: int, after: int) -> None:
    text = noise(30, 1) + (noise(period, 2) * 300)[:length] + noise(after, 3)
    expected = any(
        text[i : i + 50] == text[i + 50 : i + 100] == text[i + 100 : i + 150]
        for i in range(len(text) - 149)
    )
    assert repeats_block(text) == expected


def test_a_megabyte_of_near_repetitions_is_searched() -> None:
    """Take a time that grows with the length: with its square this would not end in a day."""
    # A period of 101 in parts of 250 characters: each window twice, never three times apart.
    text = "".join((noise(101, i) * 3)[:250] for i in range(4200))
    assert len(text) > 1_000_000
    assert not repeats_line(text)
    assert not repeats_ngram(text)
    assert not repeats_block(text)
    end = noise(50, 9999) * 3
    assert repeats_block(text + end)
    assert repeats_ngram(text + end + end)
