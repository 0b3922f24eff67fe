"""Request bodies of the protocol, and malformed replies."""

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

EXTRA_IDS = IdLists(cnt=np.array([2, 1], np.uint16), ids=np.array([3, 8, 5], np.uint32))
WITH_EXTRA_IDS = RequestBody(ids=[5, 6, 7], rows=2, k=2, extra_ids=EXTRA_IDS)
WITHOUT_EXTRA_IDS = RequestBody(ids=[5, 6, 7], rows=2, k=2)
VALUES = np.array([[-1.5, -2.5], [-3.5, -np.inf]])


def entry(lp: Any) -> dict[str, Any]:
    return {"logprob": lp, "rank": 1, "decoded_token": None}


def make_reply(**changes: Any) -> dict[str, Any]:
    """Return a reply with token 6 outside the top 2 of row 0 and token 7 within that of row 1."""
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
    } | changes


def read(reply: Any, request: RequestBody = WITH_EXTRA_IDS) -> Any:
    return request.read(GENERATE, {"teacher"}, json.dumps(reply).encode())


def test_both_request_bodies_exactly() -> None:
    assert WITH_EXTRA_IDS.to_json(GENERATE, "teacher") == {
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
    assert WITHOUT_EXTRA_IDS.to_json(COMPLETIONS, "teacher") == {
        "model": "teacher",
        "prompt": [5, 6, 7],
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 2,
    }


def test_a_reply_has_the_token_the_topk_and_the_extra_ids() -> None:
    found = read(make_reply())
    np.testing.assert_allclose(found.lp, [-4.0, -0.1])
    assert found.ids.tolist() == [[9, 4], [7, 2]]
    np.testing.assert_allclose(found.top_lp, [[-0.5, -2.0], [-0.1, -np.inf]])
    np.testing.assert_allclose(found.at, [-1.5, -2.5, -3.5])


def test_ties_sort_by_id() -> None:
    rows = [None, {"9": entry(-1.0), "6": entry(-1.0)}, {"8": entry(-1.0), "7": entry(-1.0)}]
    assert read(make_reply(prompt_logprobs=rows)).ids.tolist() == [[6, 9], [7, 8]]


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
    assert read(make_reply(prompt_token_id_logprobs=npy(header()))).at.tolist() == [0, 0, 0]


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
def test_a_malformed_packed_array_is_an_error(text: str) -> None:
    with pytest.raises(AnswerError):
        read(make_reply(prompt_token_id_logprobs=text))


def test_pickled_objects_are_never_loaded() -> None:
    with pytest.raises(AnswerError):
        read(make_reply(prompt_token_id_logprobs=objects()))


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
def test_malformed_rows_are_an_error(row: Any) -> None:
    rows = make_reply()["prompt_logprobs"][:2]
    with pytest.raises(AnswerError, match="position 2"):
        read(make_reply(prompt_logprobs=[*rows, row]))


def nested(depth: int) -> Any:
    reply: Any = []
    for _ in range(depth):
        reply = [reply]
    return reply


LONG = RequestBody(ids=[4, 5, 6, 7], rows=2, k=2)


def long(prompt_row: Any, **changes: Any) -> dict[str, Any]:
    rows = make_reply()["prompt_logprobs"]
    return make_reply(prompt_logprobs=[None, prompt_row, *rows[1:]], **changes)


@pytest.mark.parametrize("row", [{"9": entry(-1.0), "4": entry(-2.0)}, ["5"], "5", 5])
def test_another_token_in_the_prompt_is_an_error(row: Any) -> None:
    with pytest.raises(AnswerError, match="position 1 without the token 5 that was sent"):
        read(long(row), LONG)


def test_without_prompt_rows_the_echoed_ids_are_checked() -> None:
    for row in (None, {}, {"5": entry(-1.0), "4": entry(-2.0), "9": entry(-1.5)}):
        np.testing.assert_allclose(read(long(row), LONG).lp, [-4.0, -0.1])
    assert read(long(None, prompt_token_ids=LONG.ids), LONG).ids.tolist() == [[9, 4], [7, 2]]
    with pytest.raises(AnswerError, match="other tokens than were sent"):
        read(long(None, prompt_token_ids=[4, 9, 6, 7]), LONG)
    choice = make_reply()["choices"][0] | long(None, prompt_token_ids=[9, 5, 6, 7])
    with pytest.raises(AnswerError, match="other tokens than were sent"):
        LONG.read(COMPLETIONS, {"teacher"}, json.dumps({"choices": [choice]}).encode())


@pytest.mark.parametrize("name", ["x" * 10_000, ["teacher"], nested(900), 7])
def test_a_reply_of_another_model_is_a_short_error(name: Any) -> None:
    with pytest.raises(AnswerError, match="and 'teacher' was requested") as caught:
        read(make_reply(model=name))
    assert len(caught.value.cause) < 200


def test_null_log_probs_are_an_error() -> None:
    rows = [*make_reply()["prompt_logprobs"][:2], {"7": entry(-1.0), "2": entry(None)}]
    with pytest.raises(AnswerError, match="a log-prob of nan at a best id"):
        check_answer(
            read(make_reply(prompt_logprobs=rows)), np.array([6, 7]), EXTRA_IDS, k=2, n_vocab=99
        )


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b'"x"', b"[" * 1_000_000, b'{"a": NaN}', b"\xff\xfe", b'{"choices": [']
    + [json.dumps(make_reply(choices=c)).encode() for c in ([], [{}, {}], None, [3])],
)
def test_bytes_that_are_not_a_reply_are_an_error(data: bytes) -> None:
    with pytest.raises(AnswerError):
        WITH_EXTRA_IDS.read(GENERATE, {"teacher"}, data)


@pytest.mark.parametrize("count", [2, 4, "3", -1])
def test_another_count_of_tokens_is_an_error(count: Any) -> None:
    with pytest.raises(AnswerError, match="and 3 were sent"):
        read(make_reply(usage={"prompt_tokens": count}))


def test_the_size_of_a_reply_is_bounded_by_its_request() -> None:
    larger = RequestBody(ids=list(range(100)), rows=50, k=64)
    assert (
        len(json.dumps(make_reply()))
        < WITH_EXTRA_IDS.most_bytes(GENERATE)
        < larger.most_bytes(GENERATE)
        < 100 * 65 * 1024
    )
    sizes = [body.expected_bytes(GENERATE) for body in (WITH_EXTRA_IDS, WITHOUT_EXTRA_IDS)]
    assert sizes[0] - sizes[1] == 8 * 2 * 2
