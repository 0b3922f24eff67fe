"""What is asked, to the letter, and answers that no server of good will sends."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest

from logitcask.engine.backends.returned import check_answer
from logitcask.engine.backends.server.protocol import COMPLETIONS, GENERATE, RequestBody
from logitcask.engine.errors import AnswerError
from logitcask.engine.types import IdLists
from tests.engine.backends.server.fake_server import packed

AT = IdLists(cnt=np.array([2, 1], np.uint16), ids=np.array([3, 8, 5], np.uint32))
ASKED = RequestBody(ids=[5, 6, 7], rows=2, k=2, extra_ids=AT)
PLAIN = RequestBody(ids=[5, 6, 7], rows=2, k=2)
VALUES = np.array([[-1.5, -2.5], [-3.5, -np.inf]])


def entry(lp: Any) -> dict[str, Any]:
    return {"logprob": lp, "rank": 1, "decoded_token": None}


def answered(**changed: Any) -> dict[str, Any]:
    """Row 0: the token 6 beyond the two best; row 1: the token 7 among them, the other at -inf."""
    rows = [
        None,
        {"9": entry(-0.5), "4": entry(-2.0), "6": entry(-4.0)},
        {"7": entry(-0.1), "2": entry(-9999.0)},
    ]
    return {
        "model": "teacher",
        "choices": [{"index": 0, "finish_reason": "length"}],
        "prompt_logprobs": rows,
        "prompt_token_id_logprobs": packed(VALUES),
    } | changed


def read(said: Any, question: RequestBody = ASKED) -> Any:
    return question.read(GENERATE, {"teacher"}, json.dumps(said).encode())


def test_both_questions_to_the_letter() -> None:
    assert ASKED.to_json(GENERATE, "teacher") == {
        "model": "teacher",
        "token_ids": [5, 6, 7],
        "sampling_params": {
            "max_tokens": 1,
            "temperature": 0.0,
            "detokenize": False,
            "prompt_logprobs": 2,
            "prompt_logprob_token_ids": [[3, 8], [5, -1]],
            "prompt_logprob_start": 0,
        },
    }
    assert PLAIN.to_json(COMPLETIONS, "teacher") == {
        "model": "teacher",
        "prompt": [5, 6, 7],
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 2,
    }


def test_an_answer_is_the_token_the_best_and_the_asked() -> None:
    found = read(answered())
    np.testing.assert_allclose(found.lp, [-4.0, -0.1])
    assert found.ids.tolist() == [[9, 4], [7, 2]]
    np.testing.assert_allclose(found.top_lp, [[-0.5, -2.0], [-0.1, -np.inf]])
    np.testing.assert_allclose(found.at, [-1.5, -2.5, -3.5])


def test_the_lower_id_comes_first_among_equals() -> None:
    rows = [None, {"9": entry(-1.0), "6": entry(-1.0)}, {"8": entry(-1.0), "7": entry(-1.0)}]
    assert read(answered(prompt_logprobs=rows)).ids.tolist() == [[6, 9], [7, 8]]


def npy(header: str, version: bytes = b"\x01\x00", data: bytes = b"\0" * 16) -> str:
    text = header.encode() + b" " * 3 + b"\n"
    size = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    return base64.b64encode(b"\x93NUMPY" + version + size + text + data).decode()


def header(descr: str = "'<f4'", order: str = "False", shape: str = "(2, 2)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"


def objects() -> str:
    stream = io.BytesIO()
    np.save(stream, np.array([[None, 1.0], [2.0, 3.0]], object), allow_pickle=True)
    return base64.b64encode(stream.getvalue()).decode()


def test_a_packed_array_is_read_by_its_header() -> None:
    assert read(answered(prompt_token_id_logprobs=npy(header()))).at.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "text",
    [
        *(npy(header(), b"\x02\x00"), npy(header("'>f4'")), npy(header("'<f8'"))),
        *(npy(header(order="True")), npy(header(shape="(4,)"))),
        npy(header(shape="(1000000000, 1000000000)")),
        *(npy(header(shape="(2, -2)")), npy(header("'|O'"))),
        *(npy("{'descr': __import__('os').getcwd()}"), npy("(" * 5000)),
        *(npy(header(), data=b"\0" * 15), npy(header(), data=b"\0" * 17)),
        *("", "!!!", "AAAA", "A" * 100_000, npy("{1: 2, 'a': 3}"), npy("{{}: 1}"), npy("-" * 900)),
    ],
)
def test_a_packed_array_of_another_make_is_refused(text: str) -> None:
    with pytest.raises(AnswerError):
        read(answered(prompt_token_id_logprobs=text))


def test_pickled_objects_are_never_loaded() -> None:
    with pytest.raises(AnswerError):
        read(answered(prompt_token_id_logprobs=objects()))


@pytest.mark.parametrize(
    "row",
    [
        *([], {}, None, "x", 7, {"7": entry(-1.0)}, {"7": -1.0, "2": -2.0}),
        {"7": entry([]), "2": entry(-1.0)},
        {"7": {"rank": 1}, "2": entry(-1.0)},
        {"9" * 30: entry(-1.0), "7": entry(-2.0)},
        {"9" * 5000: entry(-1.0), "7": entry(-2.0)},
        {"7": entry(-1.0), "07": entry(-1.0)},
        {"3": entry(-1.0), "2": entry(-1.0)},
    ],
)
def test_rows_that_are_none_are_refused(row: Any) -> None:
    rows = answered()["prompt_logprobs"][:2]
    with pytest.raises(AnswerError, match="position 2"):
        read(answered(prompt_logprobs=[*rows, row]))


def nested(depth: int) -> Any:
    said: Any = []
    for _ in range(depth):
        said = [said]
    return said


LONG = RequestBody(ids=[4, 5, 6, 7], rows=2, k=2)


def long(prompt_row: Any, **changed: Any) -> dict[str, Any]:
    rows = answered()["prompt_logprobs"]
    return answered(prompt_logprobs=[None, prompt_row, *rows[1:]], **changed)


@pytest.mark.parametrize("row", [{"9": entry(-1.0), "4": entry(-2.0)}, ["5"], "5", 5])
def test_another_token_in_the_prompt_is_refused(row: Any) -> None:
    with pytest.raises(AnswerError, match="position 1 without the token 5 that was sent"):
        read(long(row), LONG)


def test_the_prompts_rows_may_be_left_out_and_its_echo_then_tells() -> None:
    for row in (None, {}, {"5": entry(-1.0), "4": entry(-2.0), "9": entry(-1.5)}):
        np.testing.assert_allclose(read(long(row), LONG).lp, [-4.0, -0.1])
    assert read(long(None, prompt_token_ids=LONG.ids), LONG).ids.tolist() == [[9, 4], [7, 2]]
    with pytest.raises(AnswerError, match="other tokens than were sent"):
        read(long(None, prompt_token_ids=[4, 9, 6, 7]), LONG)
    choice = answered()["choices"][0] | long(None, prompt_token_ids=[9, 5, 6, 7])
    with pytest.raises(AnswerError, match="other tokens than were sent"):
        LONG.read(COMPLETIONS, {"teacher"}, json.dumps({"choices": [choice]}).encode())


@pytest.mark.parametrize("name", ["x" * 10_000, ["teacher"], nested(900), 7])
def test_an_answer_of_another_model_is_refused_in_a_line(name: Any) -> None:
    with pytest.raises(AnswerError, match="and 'teacher' was requested") as caught:
        read(answered(model=name))
    assert len(caught.value.cause) < 200


def test_null_is_no_log_prob() -> None:
    rows = [*answered()["prompt_logprobs"][:2], {"7": entry(-1.0), "2": entry(None)}]
    with pytest.raises(AnswerError, match="a log-prob of nan at a best id"):
        check_answer(read(answered(prompt_logprobs=rows)), np.array([6, 7]), AT, k=2, n_vocab=99)


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b'"x"', b"[" * 1_000_000, b'{"a": NaN}', b"\xff\xfe", b'{"choices": [']
    + [json.dumps(answered(choices=c)).encode() for c in ([], [{}, {}], None, [3])],
)
def test_bytes_that_are_no_answer_are_refused(data: bytes) -> None:
    with pytest.raises(AnswerError):
        ASKED.read(GENERATE, {"teacher"}, data)


@pytest.mark.parametrize("count", [2, 4, "3", -1])
def test_another_count_of_tokens_than_were_sent_is_refused(count: Any) -> None:
    with pytest.raises(AnswerError, match="and 3 were sent"):
        read(answered(usage={"prompt_tokens": count}))


def test_what_is_read_is_bounded_by_what_was_asked() -> None:
    wide = RequestBody(ids=list(range(100)), rows=50, k=64)
    assert len(json.dumps(answered())) < ASKED.most_bytes() < wide.most_bytes() < 100 * 65 * 1024
    assert ASKED.expected_bytes() - PLAIN.expected_bytes() == 8 * 2 * 2
