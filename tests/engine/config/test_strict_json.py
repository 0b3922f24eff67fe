"""JSON that is not trusted: equal to the standard library's, or refused with one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.config.parse.strict_json import parse_json

VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.floats(-1e300, 1e300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(value=VALUES)
def test_it_reads_what_can_be_written_again(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("1e400", "the number 1e400 is beyond 64-bit floats"),
        ("[-1e999]", "the number -1e999 is beyond 64-bit floats"),
        ("[NaN]", "NaN is not JSON"),
        ("9" * 301, "a number has 301 digits, and at most 300 may be"),
        ("9" * 5000, "a number has 5000 digits, and at most 300 may be"),
        ("[" * 102 + "]" * 102, "nested too deeply, at most 100 levels may be"),
        ('{"a":' * 99999, "nested too deeply, at most 100 levels may be"),
        ('{"a": [{"b": 1, "b": 1}]}', "the key 'b' occurs twice in an object"),
        ('["\\ud800"]', "a string holds half a surrogate pair, which is no text"),
        ("", "Expecting value"),
    ],
)
def test_a_value_beyond_the_bounds_is_refused(text: str, cause: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_json(text)
    assert str(caught.value).startswith(cause)
    assert len(str(caught.value)) < 100
